"""Lowtide: plugins for an unmodified DeepSpeed and Megatron-core, switched on in the JSON.

Importing this package is cheap and changes nothing. `initialize` takes `deepspeed.initialize`'s
arguments; `enable` makes `deepspeed.initialize` itself honour the ``"lowtide"`` block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "disable", "enable", "initialize"]

if TYPE_CHECKING:
    from lowtide.hosts.deepspeed import disable, enable, initialize


def __getattr__(name: str) -> Any:
    if name in ("initialize", "enable", "disable"):
        from lowtide.hosts import deepspeed

        return getattr(deepspeed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
