"""States on a device, savers that find them there, and lanes that stand still or fail."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lowtide.checkpoint import verify
from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Saving
from lowtide.checkpoint.staging import Stager
from lowtide.checkpoint.staging.movers import LANE
from lowtide.checkpoint.staging.ring import Ring
from lowtide.core.device import Device, DeviceEvent, Lane
from lowtide.core.device.homes import Homes
from tests.checkpoint.ranks import DETAILS, make_boards, make_config

EVER_S = 30.0
PAGE = 4096
ARENA = {"memory_bytes": 48 * MIB}
RINGS = {"ring smaller than a tensor": 8 * MIB, "ring larger than all": 64 * MIB}


def ring_of(saver: Saver) -> Ring | None:
    """Return the pinned memory of a saver, once it has been allocated."""
    return saver.stager._by_lane.ring


def place(device: Device, value: torch.Tensor) -> torch.Tensor:
    """Return `value` in memory of `device` that begins on a page, as host memory would here."""
    size = -(-value.nbytes // PAGE) * PAGE
    memory = device.empty(size, torch.uint8)[: value.nbytes].view(value.dtype).view(value.shape)
    with torch.no_grad():
        return memory.copy_(value)


def on_a_page(value: torch.Tensor) -> torch.Tensor:
    """Return `value` in host memory that begins on a page, so that layouts are comparable."""
    memory = torch.empty(value.nbytes + PAGE, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % PAGE :][: value.nbytes]
    return memory.view(value.dtype).view(value.shape).copy_(value)


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return tensors of many kinds: several chunks long, tiny, and in between."""
    random = torch.Generator().manual_seed(seed)
    return {
        "small": torch.randn(1000, generator=random),
        "large": torch.randn(9 * MIB // 4 + 7, generator=random),
        "half": torch.randn(300, 7, generator=random).bfloat16(),
        "middle": torch.randn(MIB // 2, generator=random),
        "counter": torch.tensor(seed + 5),
        "bytes": torch.randint(0, 256, (4 * MIB - 3,), dtype=torch.uint8, generator=random),
    }


def state_on(device: Device, seed: int = 0) -> dict[str, Any]:
    """Return a state of which most is on `device`, with views, a parameter and host tensors."""
    placed = {name: place(device, value) for name, value in values(seed).items()}
    return {
        **placed,
        "host": on_a_page(torch.arange(3 * MIB // 4) + seed),
        "view": placed["large"][100:200],
        "transposed": placed["half"].t(),
        "parameter": torch.nn.Parameter(placed["middle"]),
        "text": "as it is",
        "host too": torch.arange(10) + seed,
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Fail unless two states are equal."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name].cpu(), value.detach().cpu()), name
        else:
            assert found[name] == value


def copy_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return `state` in memory of its own."""
    return {
        name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }


@contextlib.contextmanager
def saver_for(
    device: Device, *, ring_bytes: int = 8 * MIB, buffer_bytes: int = 16 * MIB, **settings: Any
) -> Iterator[Saver]:
    """Give a saver that knows `device`; closed in the end."""
    stager = Stager(Homes([device]), pinned_bytes=ring_bytes)
    config = make_config(**settings)
    saver = Saver(config, make_boards(1)[0], buffer_bytes=buffer_bytes, stager=stager)
    try:
        yield saver
    finally:
        saver.close(5.0)


def save(
    saver: Saver,
    folder: Path,
    state: Any,
    step: int = 1,
    is_stable: Callable[[torch.Tensor], bool] = lambda _: True,
) -> Saving:
    """Save `state` as the file state.pt of step`step`."""
    saver.begin(folder, f"step{step}", step=step, details=DETAILS)
    saver.add(state, "state.pt", is_stable=is_stable)
    return saver.end()


def load(folder: Path, step: int = 1) -> dict[str, Any]:
    """Check a checkpoint, and return what torch finds in it."""
    assert verify(folder / f"step{step}").is_ok
    loaded: dict[str, Any] = torch.load(folder / f"step{step}" / "state.pt", weights_only=False)
    return loaded


def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end_s = time.monotonic() + EVER_S
    while not is_so():
        assert time.monotonic() < end_s, "waited for in vain"
        time.sleep(0.001)


class Gate:
    """Holds up a device's checkpoint lane until it is opened."""

    def __init__(self, device: Device) -> None:
        self._open = threading.Event()
        device.lane(LANE).run(self._open.wait, EVER_S)

    def open(self) -> None:
        """Let the lane go on."""
        self._open.set()


class Fault:
    """Lets one copy of a device's checkpoint lane fail.

    Args:
        device: Whose lane.
        at: Which copy from now on, from 0.
        how: "refused" by the lane at once, or "fails" when its turn comes.
    """

    def __init__(self, device: Device, at: int, how: str) -> None:
        self.copies = 0
        lane = device.lane(LANE)
        stock = type(lane).copy

        def copy(dst: torch.Tensor, src: torch.Tensor, *, label: str = "copy") -> DeviceEvent:
            number, self.copies = self.copies, self.copies + 1
            if number != at:
                return stock(lane, dst, src, label=label)
            if how == "refused":
                raise RuntimeError("the lane is ill")
            return lane.run(_fail)

        self._lane: Lane = lane
        lane.copy = copy  # type: ignore[method-assign]

    def remove(self) -> None:
        """Make the lane well."""
        del self._lane.copy


def _fail() -> None:
    raise OSError("the copy engine is ill")


class Operations:
    """Counts what a device's checkpoint lane is asked for."""

    def __init__(self, device: Device) -> None:
        self.count = 0
        lane = device.lane(LANE)
        for name in ("copy", "run"):
            setattr(lane, name, self._counted(getattr(lane, name)))

    def _counted(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.count += 1
            return stock(*args, **options)

        return call


def many_on(device: Device, count: int) -> dict[str, torch.Tensor]:
    """Return so many small tensors, each in memory of its own, and a few larger ones."""
    random = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 27_000, (count,), generator=random)
    sizes[count // 3 :: count // 3] = MIB // 2 + 5  # bytes: copied by themselves
    made = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=random) for n in sizes]
    return {f"t{i}": device.empty(len(v), v.dtype).copy_(v) for i, v in enumerate(made)}
