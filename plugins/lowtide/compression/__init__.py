"""Error-bounded lossy compression of floating-point arrays.

``compress`` and ``decompress`` work on numpy arrays and torch tensors in host memory; ``inspect``
says what a stream holds without decoding it; ``get_codec`` gives a codec for many arrays.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowtide.compression.api import compress, decompress, inspect, register_model
    from lowtide.core.codec import get_codec

__all__ = ["compress", "decompress", "get_codec", "inspect", "register_model"]

_HOMES = dict.fromkeys(
    ("compress", "decompress", "inspect", "register_model"), "lowtide.compression.api"
)
_HOMES["get_codec"] = "lowtide.core.codec"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # No module here may bear one of these names: imported, it would stand in place of the function.
    return getattr(import_module(_HOMES[name]), name)
