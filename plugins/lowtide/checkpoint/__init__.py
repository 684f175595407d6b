"""Checkpoints that are written while training goes on, and are known to be whole when read.

`list_checkpoints` and `verify` need neither torch nor DeepSpeed; `load_state` reads the parameters
of a checkpoint whatever number of ranks wrote it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowtide.checkpoint.state import load_state
    from lowtide.checkpoint.store.catalog import list_checkpoints
    from lowtide.checkpoint.store.integrity import verify

__all__ = ["list_checkpoints", "load_state", "verify"]

_HOMES = {"list_checkpoints": "store.catalog", "load_state": "state", "verify": "store.integrity"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # No module here may bear one of these names: imported, it would stand in place of the function.
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
