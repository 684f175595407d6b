"""What an update did, and when: the measured counterpart of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowtide.core.device import DeviceEvent

LANES = ("host", "prefetch", "device", "flush", "upload")
_OF_DEVICES = LANES[1:]  # they draw themselves in telemetry
STORAGE_LANES = ("read", "write")  # with the number of the path behind


@dataclass(frozen=True)
class Operation:
    """One entry of a step's trace.

    Attributes:
        subgroup: Key of the subgroup.
        lane: One of `LANES`: update on the host, copies of state to the device, update there,
            copies back, copies of rounded parameters to the device. Or of storage: ``"read0"``
            and ``"write0"`` for the first path and so on.
        nbytes: Bytes moved; 0 for updates.
        params: Parameters updated; 0 for copies.
        begin_s: `time.perf_counter` seconds.
        end_s: `time.perf_counter` seconds.
    """

    subgroup: str
    lane: str
    nbytes: int
    params: int
    begin_s: float
    end_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return the entry for JSON."""
        return dataclasses.asdict(self)


@dataclass
class StepTrace:
    """One update, recorded while it runs and resolved when somebody asks."""

    begin_s: float = 0.0
    end_s: float = 0.0
    is_degraded: bool = False  # a failure on the device was made good on the host
    is_typical: bool = True  # gradients of device pieces came as the plan had counted on
    _entries: list[tuple[str, str, int, int, Callable[[], tuple[float, float]]]] = field(
        default_factory=list
    )

    @property
    def makespan_s(self) -> float:
        """Wall time of the update."""
        return self.end_s - self.begin_s

    def add(self, subgroup: str, params: int, begin_s: float, end_s: float) -> None:
        """Record an update on the host."""
        self._entries.append((subgroup, "host", 0, params, lambda: (begin_s, end_s)))

    def add_transfer(
        self, subgroup: str, lane: str, nbytes: int, begin_s: float, end_s: float
    ) -> None:
        """Record a read from or a write to storage. From any thread."""
        self._entries.append((subgroup, lane, nbytes, 0, lambda: (begin_s, end_s)))

    def add_event(
        self, subgroup: str, lane: str, event: DeviceEvent, *, nbytes: int = 0, params: int = 0
    ) -> None:
        """Record an operation of a device lane."""
        entry = (subgroup, lane, nbytes, params, lambda: (event.begin_s, event.end_s))
        self._entries.append(entry)

    def on_host(self) -> list[Operation]:
        """Return updates on the host and transfers of storage: no look at a GPU's clock."""
        return [
            Operation(key, lane, nbytes, params, *times())
            for key, lane, nbytes, params, times in self._entries
            if lane not in _OF_DEVICES
        ]

    def transfers(self) -> dict[str, tuple[int, float]]:
        """Return what each lane of storage has moved: bytes, and seconds in which it worked."""
        found: dict[str, tuple[int, float]] = {}
        for _, lane, nbytes, _, times in self._entries:
            if lane.startswith(STORAGE_LANES):
                (begin_s, end_s), (known, busy_s) = times(), found.get(lane, (0, 0.0))
                found[lane] = known + nbytes, busy_s + end_s - begin_s
        return found

    def operations(self) -> list[Operation]:
        """Return all operations, by their begin. Only after the update has ended."""
        found = [
            Operation(key, lane, nbytes, params, *times())
            for key, lane, nbytes, params, times in self._entries
        ]
        return sorted(found, key=lambda each: (each.begin_s, each.lane, each.subgroup))

    def shifted(self) -> list[Operation]:
        """Return all operations with times from the begin of the update."""
        return [
            dataclasses.replace(
                each, begin_s=each.begin_s - self.begin_s, end_s=each.end_s - self.begin_s
            )
            for each in self.operations()
        ]

    def busy_s(self) -> dict[str, float]:
        """Return how long each lane worked."""
        busy = dict.fromkeys(LANES, 0.0)
        for each in self.operations():
            busy[each.lane] = busy.get(each.lane, 0.0) + each.end_s - each.begin_s
        return busy
