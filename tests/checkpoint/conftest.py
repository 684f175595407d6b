"""The device that tensors are on; where there is a GPU, that one too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lowtide.core.device import Device, open_device
from tests.checkpoint.on_device import ARENA
from tests.helpers.devices import device_kinds

KINDS = [kind for kind in device_kinds() if kind != "cpu"]


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Open a device."""
    kind = request.param
    with open_device(kind, **(ARENA if kind == "emulated" else {})) as opened:
        yield opened
