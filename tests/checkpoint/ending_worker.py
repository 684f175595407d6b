"""Run on 2 ranks by test_board.py: a script leaves its process group while a save is going on."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from lowtide.checkpoint.board import open_board
from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.saver import Saver
from tests.checkpoint.ranks import DETAILS, file_name, make_config, state_of
from tests.helpers.ranks import leave_result


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    config = make_config(tiers=[{"path": sys.argv[1], "bytes_per_s": 4.0 * MIB}])
    saver = Saver(config, open_board(), buffer_bytes=16 * MIB)
    saver.begin(Path(sys.argv[1]), "last", step=1, details=DETAILS)
    saver.add(state_of(rank, 1, elements=MIB), file_name(rank), is_stable=lambda _: True)
    saving = saver.end()
    dist.destroy_process_group()
    was_under_way = not saving.has_ended  # at this rate it takes a second
    saver.close(30.0)
    leave_result([was_under_way, saving.stage.value, str(saving.error)])


if __name__ == "__main__":
    main()
