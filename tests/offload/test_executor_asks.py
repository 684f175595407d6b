"""What the executor asks those who still read live state, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowtide.core.device import Device
from lowtide.core.state import Memory
from lowtide.offload import one_update
from tests.offload.test_executor import PLAN, Bench, assert_same, emulated, expected

__all__ = ["emulated"]  # a fixture

# What the plan says of a bench with six subgroups: 4, 1, 0, 3 are for the device, 2 and 5 for the
# host; 0 and 3 stay there.


NAMES = ("master", "first moment", "second moment", "weights")


class Reader:
    """Reads all state of a bench, and sees what is overwritten before it was asked.

    Args:
        blocked: Subgroups that are not released before somebody insists.
        released: Called with each subgroup that was asked for.
    """

    is_reading = True

    def __init__(
        self,
        bench: Bench,
        blocked: set[int] | None = None,
        released: Callable[[int], object] = lambda _index: None,
    ) -> None:
        self.blocked = blocked or set()
        self._released = released
        self._tensors = {
            tensor.data_ptr(): (index, name, tensor)
            for index, each in enumerate(bench.subgroups)
            for name, tensor in zip(
                ("master", "m", "v", "weights"), each.overwritten(), strict=True
            )
        }
        self._before = {place: t.clone() for place, (_, _, t) in self._tensors.items()}
        self.told: list[int] = []
        self.asked: dict[int, list[str]] = {}  # by subgroup, in the order of the first question
        bench.authority.add_reader(self)

    def hurry(self, memory: Memory) -> None:
        self.told += list(dict.fromkeys(self._tensors[place][0] for place in memory[:, 0].tolist()))

    def is_released(self, memory: Memory) -> bool:
        return all(self._tensors[place][0] not in self.blocked for place in memory[:, 0].tolist())

    def release(self, memory: Memory) -> None:
        for place in memory[:, 0].tolist():
            index, name, tensor = self._tensors[place]
            if name not in self.asked.get(index, []):
                assert torch.equal(tensor, self._before[place]), f"{index}: {name} is overwritten"
                self.asked.setdefault(index, []).append(name)
        for index in {self._tensors[place][0] for place in memory[:, 0].tolist()}:
            self._released(index)

    def assert_was_asked(self) -> None:
        for place, (index, name, tensor) in self._tensors.items():
            if not torch.equal(tensor, self._before[place]):
                assert name in self.asked[index], f"{index}: {name} was overwritten"


def test_the_host_goes_on_while_the_device_would_have_to_wait(emulated: Device) -> None:
    bench = Bench(emulated)
    # While subgroup 5 is copied, 4 becomes free.
    reader = Reader(bench, {4}, lambda index: reader.blocked.clear() if index == 2 else None)
    bench.run(bench.plan(**PLAN))
    assert reader.told == [4, 2, 1, 0, 5, 3]
    assert list(reader.asked) == [2, 4, 1, 0, 3, 5]
    assert reader.asked[0] == reader.asked[3] == ["weights"], "a resident's state changes elsewhere"
    reader.assert_was_asked()
    reader.is_reading = False
    bench.executor.drain()
    assert_same(bench.state(), expected(1))


def test_what_stays_blocked_is_waited_for_in_the_end(emulated: Device) -> None:
    bench = Bench(emulated)
    reader = Reader(bench, {1})
    trace = bench.run(bench.plan(**PLAN))
    assert list(reader.asked) == [4, 2, 5, 1, 0, 3]
    reader.assert_was_asked()
    assert not trace.is_degraded
    reader.is_reading = False
    bench.executor.drain()
    assert_same(bench.state(), expected(1))


@pytest.mark.parametrize("blocked", [set(), {1}])
def test_what_comes_home_after_a_failure_is_asked_for(
    emulated: Device, monkeypatch: pytest.MonkeyPatch, blocked: set[int]
) -> None:
    bench = Bench(emulated)
    bench.run(bench.plan(**PLAN))  # 0 and 3 are newer on the device from here on
    reader = Reader(bench, blocked)
    real = one_update.update_there

    def breaks(where: str, *args: Any) -> None:
        if where == "device":
            raise RuntimeError("kernel")
        real(where, *args)

    monkeypatch.setattr(one_update, "update_there", breaks)
    bench.run(bench.plan(**PLAN))
    assert bench.executor.failure is not None
    assert "master" in reader.asked[0]
    reader.assert_was_asked()
    assert_same(bench.state(), expected(2))


def test_draining_asks_too(emulated: Device) -> None:
    bench = Bench(emulated)
    bench.run(bench.plan(**PLAN))
    reader = Reader(bench)
    bench.executor.drain()
    assert set(reader.asked) == {0, 3}
    reader.assert_was_asked()
    bench.executor.drain()
    assert len(reader.asked[0]) == len(set(reader.asked[0]))
