"""The one error a user of this example can cause, and how a rank leaves with it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


class UsageError(Exception):
    """Wrong input: the text says where, what was found, what is allowed and what to do.

    `train.py` prints it as one line and ends with exit code 2.
    """


def tell_launcher(message: str) -> None:
    """Put a message into the closing summary of `torch.distributed.run`.

    The launcher reads the first error of each rank from a file whose name it passes down;
    without it the summary only says that some rank had an exit code.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    record = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"message": record}), encoding="utf-8")
    except OSError:
        return  # the line printed by this rank already says it
