"""Accelerate, and so Hugging Face `Trainer`, with the ``"lowtide"`` block in the DeepSpeed JSON.

Accelerate walks the whole DeepSpeed JSON and takes every ``"auto"`` for one of its own; an
``"auto"`` inside our block makes `Accelerator.prepare` raise. While that walk runs, our block is
out of its sight; every other ``"auto"`` is treated as before.

Where a plugin spreads one model over ranks, those must read the same batches; see
`_shared_batches`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from lowtide.core.config import BLOCK
from lowtide.hosts import _patches, _shared_batches
from lowtide.hosts._patches import Patch

logger = logging.getLogger("lowtide")


def install() -> None:
    """Make Accelerate honour the ``"lowtide"`` block, now or as soon as it is imported.

    Idempotent. Logs, and changes nothing, when this Accelerate has no such walk: it may not need
    the change, and a script whose block holds no ``"auto"`` must not fail for it.
    """
    _patches.install(_PATCHES)


def uninstall() -> None:
    """Undo `install`: Accelerate's own methods, no import hook. Idempotent."""
    _patches.uninstall(_PATCHES)


def _warn(name: str) -> None:
    logger.warning(
        "lowtide: this version of accelerate has no %s; if it refuses an \"auto\" "
        'inside the "%s" block, write the value out',
        name, BLOCK,
    )  # fmt: skip


def _without_block(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return `stock` (the walk) with our block hidden while it runs."""

    @functools.wraps(stock)
    def deepspeed_config_process(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = getattr(self, "deepspeed_config", None)
        block = config.get(BLOCK) if isinstance(config, dict) else None
        if config is None or block is None:  # no block, or the walk descending into a section
            return stock(self, *args, **kwargs)
        # None in its place keeps the order of the keys, is no section to descend into, and counts
        # as "not set" where values are compared.
        config[BLOCK] = None
        try:
            return stock(self, *args, **kwargs)
        finally:
            config[BLOCK] = block

    return deepspeed_config_process


_PATCHES = (
    # The package that re-exports the class, not the file that defines it: its name is stable.
    Patch("accelerate.utils", "DeepSpeedPlugin", "deepspeed_config_process", _without_block, _warn),
    *_shared_batches.PATCHES,
)
