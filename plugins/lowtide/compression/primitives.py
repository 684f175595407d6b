"""The inner loops of ``lowtide.sz``: native where it is built, else the reference in numpy.

Both give the same bits; `lowtide.compression.reference` documents the functions.
"""

from __future__ import annotations

from typing import Any

from lowtide.core.native import native_or_none


def primitives() -> Any:
    """Return the module with the inner loops; warns once where it is the slow one."""
    module = native_or_none()
    if module is not None:
        return module.compression
    from lowtide.compression import reference

    return reference
