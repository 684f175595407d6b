"""The one list of devices to test on: a machine with a GPU runs every test there as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch

# Small: the arena of an emulated device is touched when it is opened.
EMULATED_BYTES = 4 << 20


def device_kinds() -> list[Any]:
    """Return the kinds that `lowtide.core.device.open_device` can open here, for parametrize."""
    kinds = ["cpu", "emulated"]
    gpu = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
    return [*kinds, *gpu]


def device_options(kind: str) -> dict[str, Any]:
    """Return the arguments of `open_device` that keep a device of this kind small."""
    return {"memory_bytes": EMULATED_BYTES} if kind == "emulated" else {}
