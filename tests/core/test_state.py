"""The state authority never lets a reader take a copy that is not the newest."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from lowtide.core.errors import LowtideError, StaleStateError, UnknownNameError
from lowtide.core.state import (
    Location,
    Memory,
    StateAuthority,
    StateEntry,
    memory_of,
    merged,
    outside,
)

HOST, DEVICE, IN_FLIGHT = Location.HOST, Location.DEVICE, Location.IN_FLIGHT
WAIT_S = 30.0


class Owner:
    """A stand-in for the offload plugin; brings its keys home in the way the test asks for."""

    __hash__ = None  # type: ignore[assignment]  # owners need not be hashable

    def __init__(self, state: StateAuthority, count: int = 3, mode: str = "at once") -> None:
        self.state, self.mode = state, mode
        self.calls: list[list[str]] = []
        self.threads: list[threading.Thread] = []
        self.keys = [f"subgroup/{number}" for number in range(count)]
        for key in self.keys:
            state.register(key, drain=self.drain)

    def __eq__(self, other: object) -> bool:
        return self is other

    def drain(self, keys: Sequence[str]) -> None:
        self.calls.append(list(keys))
        if self.mode == "at once":
            for key in keys:
                self.state.publish(key, HOST, self.state.where(key).version)
        elif self.mode == "later":
            for key in keys:
                self.state.publish(key, IN_FLIGHT, self.state.where(key).version)
            self.threads.append(threading.Timer(0.05, self.arrive, [list(keys)]))
            self.threads[-1].start()
        elif self.mode == "fails":
            raise OSError("link down")

    def arrive(self, keys: list[str]) -> None:
        for key in keys:
            self.state.publish(key, HOST, self.state.where(key).version)


@pytest.fixture
def state() -> StateAuthority:
    return StateAuthority()


def test_a_new_key_is_on_the_host_at_version_zero(state: StateAuthority) -> None:
    state.register("b")
    state.register("a", location=DEVICE, version=4)
    assert state.where("b") == StateEntry(HOST, 0)
    assert state.where("a") == StateEntry(DEVICE, 4)
    assert state.keys() == ["a", "b"]
    state.publish("b", DEVICE, 1)
    assert state.where("b") == StateEntry(DEVICE, 1)
    state.unregister("b")
    assert state.keys() == ["a"]


def test_versions_never_go_back(state: StateAuthority) -> None:
    state.register("m")
    state.publish("m", DEVICE, 7)
    with pytest.raises(
        StaleStateError, match=r'"m": cannot publish version 6, version 7 on device'
    ):
        state.publish("m", HOST, 6)
    assert state.where("m") == StateEntry(DEVICE, 7)
    state.publish("m", HOST, 7)
    assert state.where("m") == StateEntry(HOST, 7)


def test_names_are_checked(state: StateAuthority) -> None:
    state.register("subgroup/1")
    with pytest.raises(LowtideError, match='"subgroup/1": registered already'):
        state.register("subgroup/1")
    for ask in (
        lambda: state.where("subgroup/l"),
        lambda: state.publish("subgroup/l", HOST, 1),
        lambda: state.unregister("subgroup/l"),
        lambda: state.ensure_host(["subgroup/l"]),
        lambda: state.snapshot(["subgroup/l"]).__enter__(),
    ):
        with pytest.raises(UnknownNameError, match='Did you mean "subgroup/1"'):
            ask()
    with pytest.raises(ValueError, match="moon"):
        state.publish("subgroup/1", "moon", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["at once", "later"])
def test_ensure_host_drains_what_is_away_in_one_call(state: StateAuthority, mode: str) -> None:
    owner = Owner(state, 4, mode)
    other = Owner.__new__(Owner)
    state.register("frozen")
    state.publish("subgroup/1", DEVICE, 3)
    state.publish("subgroup/2", DEVICE, 3)
    state.publish("subgroup/3", HOST, 3)
    assert state.ensure_host(timeout_s=WAIT_S) == {
        "frozen": 0, "subgroup/0": 0, "subgroup/1": 3, "subgroup/2": 3, "subgroup/3": 3
    }  # fmt: skip
    assert owner.calls == [["subgroup/1", "subgroup/2"]]
    assert state.where("subgroup/1") == StateEntry(HOST, 3)
    assert state.ensure_host(timeout_s=WAIT_S)["subgroup/1"] == 3
    assert len(owner.calls) == 1  # nothing was away
    assert other != owner


def test_ensure_host_asks_only_for_the_keys_it_was_given(state: StateAuthority) -> None:
    owner = Owner(state)
    for key in owner.keys:
        state.publish(key, DEVICE, 1)
    assert state.ensure_host(["subgroup/2"]) == {"subgroup/2": 1}
    assert owner.calls == [["subgroup/2"]]
    assert state.where("subgroup/0").location == DEVICE


def test_ensure_host_calls_every_owner(state: StateAuthority) -> None:
    first = Owner(state, 2)
    second = Owner.__new__(Owner)
    second.__dict__ |= {"state": state, "mode": "later", "calls": [], "threads": []}
    state.register("other", drain=second.drain, location=DEVICE, version=2)
    state.publish("subgroup/0", DEVICE, 1)
    assert state.ensure_host() == {"other": 2, "subgroup/0": 1, "subgroup/1": 0}
    assert (first.calls, second.calls) == ([["subgroup/0"]], [["other"]])


def test_ensure_host_names_what_stays_away(state: StateAuthority) -> None:
    Owner(state, 2, "forgets")
    state.publish("subgroup/1", DEVICE, 5)
    with pytest.raises(
        StaleStateError, match=r"\(subgroup/1: version 5 is on device\): .*no drain, or it left"
    ):
        state.ensure_host()
    state.register("alone", location=DEVICE)
    with pytest.raises(StaleStateError, match="alone: version 0 is on device"):
        state.ensure_host(["alone"])


def test_ensure_host_gives_up_on_what_never_arrives(state: StateAuthority) -> None:
    state.register("lost", location=IN_FLIGHT, version=2)
    with pytest.raises(StaleStateError, match=r"lost: version 2 is on in_flight.*within 0.05 s"):
        state.ensure_host(timeout_s=0.05)


def test_ensure_host_gives_up_when_another_reader_is_stuck_in_a_drain(
    state: StateAuthority,
) -> None:
    gate, begun = threading.Event(), threading.Event()

    def drain(keys: Sequence[str]) -> None:
        begun.set()
        gate.wait(WAIT_S)
        for key in keys:
            state.publish(key, HOST, 1)

    state.register("slow", drain=drain)
    state.publish("slow", DEVICE, 1)
    reader = threading.Thread(target=state.ensure_host)
    reader.start()
    assert begun.wait(WAIT_S)
    with pytest.raises(StaleStateError, match=r"another drain did not end within 0\.05 s"):
        state.ensure_host(timeout_s=0.05)
    assert state.where("slow").location == DEVICE  # the book is open during a drain
    gate.set()
    reader.join(WAIT_S)
    assert state.where("slow") == StateEntry(HOST, 1)


def test_a_second_reader_finds_the_work_done(state: StateAuthority) -> None:
    owner = Owner(state, 1, "later")
    state.publish("subgroup/0", DEVICE, 1)
    readers = [threading.Thread(target=state.ensure_host) for _ in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(WAIT_S)
    assert state.where("subgroup/0") == StateEntry(HOST, 1)
    # One that came while it was in flight may have asked once more, never all six.
    assert owner.calls[0] == ["subgroup/0"]


def test_the_error_of_a_drain_passes(state: StateAuthority) -> None:
    owner = Owner(state, 1, "fails")
    state.publish("subgroup/0", DEVICE, 1)
    with pytest.raises(OSError, match="link down"):
        state.ensure_host()
    owner.mode = "at once"
    assert state.ensure_host() == {"subgroup/0": 1}


def test_a_snapshot_hands_out_entries_and_accepts_standing_still(state: StateAuthority) -> None:
    Owner(state, 2)
    state.publish("subgroup/1", HOST, 3)
    with state.snapshot() as entries:
        state.publish("subgroup/1", HOST, 3)  # says nothing new
    assert entries == {"subgroup/0": StateEntry(HOST, 0), "subgroup/1": StateEntry(HOST, 3)}


@pytest.mark.parametrize(
    "steps",
    [
        [(HOST, 4)],
        [(IN_FLIGHT, 3)],
        [(DEVICE, 3)],
        [(IN_FLIGHT, 3), (HOST, 3)],  # there and back: the memory may have been another's
    ],
)
def test_a_snapshot_notices_what_moved_while_it_was_read(
    state: StateAuthority, steps: list[tuple[Location, int]]
) -> None:
    Owner(state, 3)
    state.publish("subgroup/1", HOST, 3)

    def move() -> None:
        for location, version in steps:
            state.publish("subgroup/1", location, version)
        state.publish("subgroup/2", DEVICE, 9)  # not part of it

    with (
        pytest.raises(
            StaleStateError, match=r"read: subgroup/1 \(was version 3 on host\); discard"
        ),
        state.snapshot(["subgroup/0", "subgroup/1"]),
    ):
        move()


def test_a_snapshot_notices_a_key_that_changed_hands(state: StateAuthority) -> None:
    state.register("a")
    with pytest.raises(StaleStateError, match="a "), state.snapshot():
        state.unregister("a")
    state.register("a")

    def change_hands() -> None:
        state.unregister("a")
        state.register("a")

    with pytest.raises(StaleStateError, match="a "), state.snapshot():
        change_hands()


@pytest.mark.parametrize("away", [DEVICE, IN_FLIGHT])
def test_a_snapshot_of_host_copies_refuses_stale_ones(
    state: StateAuthority, away: Location
) -> None:
    state.register("m", location=away, version=2)
    with (
        pytest.raises(StaleStateError, match=rf"m: version 2 is on {away.value}.*ensure_host\(\)"),
        state.snapshot(),
    ):
        pytest.fail("the body must not run")


def test_a_snapshot_of_wherever_it_is_refuses_only_what_is_in_flight(
    state: StateAuthority,
) -> None:
    state.register("m", location=DEVICE, version=2)
    with state.snapshot(location=None) as entries:
        assert entries["m"].location == DEVICE
    with state.snapshot(location=DEVICE):
        pass
    state.publish("m", IN_FLIGHT, 2)
    with pytest.raises(StaleStateError, match="settled"), state.snapshot(location=None):
        pytest.fail("the body must not run")


def test_the_readers_own_error_is_not_replaced(state: StateAuthority) -> None:
    state.register("m")

    def read() -> None:
        state.publish("m", HOST, 1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), state.snapshot():
        read()


def test_no_reader_sees_a_stale_copy_under_many_updates(state: StateAuthority) -> None:
    """An owner moves and updates real values; what a clean snapshot read is always consistent."""
    host = {f"subgroup/{number}": 0 for number in range(3)}
    device = dict(host)
    owner_lock = threading.Lock()
    stop = threading.Event()

    def drain(keys: Sequence[str]) -> None:
        with owner_lock:
            for key in keys:
                if state.where(key).location == DEVICE:
                    host[key] = device[key]
                    state.publish(key, HOST, state.where(key).version)

    for key in host:
        state.register(key, drain=drain)

    def own() -> None:
        version = 0
        while not stop.is_set():
            version += 1
            for key in host:
                with owner_lock:
                    state.publish(key, IN_FLIGHT, state.where(key).version)
                    device[key] = version
                    state.publish(key, DEVICE, version)
            stop.wait(0.0005)

    owner = threading.Thread(target=own)
    owner.start()
    clean = 0
    for _ in range(3000):
        try:
            state.ensure_host(timeout_s=WAIT_S)
            with state.snapshot() as entries:
                seen = dict(host)
        except StaleStateError:
            continue
        assert seen == {key: entry.version for key, entry in entries.items()}
        clean += 1
        if clean == 100:
            break
    stop.set()
    owner.join(WAIT_S)
    assert clean > 0


def stretches(*pairs: tuple[int, int]) -> Memory:
    return np.array(pairs, np.uint64).reshape(-1, 2)


def test_memory_is_merged_where_it_touches_or_overlaps() -> None:
    memory = stretches((30, 40), (0, 10), (10, 20), (5, 7), (38, 45), (60, 61))
    assert merged(memory).tolist() == [[0, 20], [30, 45], [60, 61]]
    assert merged(stretches()).tolist() == []


def test_what_is_not_all_inside_is_outside() -> None:
    covered = stretches((10, 20), (30, 40))
    memory = stretches((10, 20), (12, 13), (0, 5), (5, 11), (19, 21), (20, 30), (39, 40), (15, 35))
    assert outside(memory, covered).tolist() == [[0, 5], [5, 11], [19, 21], [20, 30], [15, 35]]
    assert outside(memory, stretches()).tolist() == memory.tolist()


class Reader:
    def __init__(self, is_reading: bool = True) -> None:
        self.is_reading = is_reading
        self.free = np.zeros((1, 2), np.uint64)
        self.asked: list[tuple[str, list[list[int]]]] = []

    def hurry(self, memory: Memory) -> None:
        self.asked.append(("hurry", memory.tolist()))

    def is_released(self, memory: Memory) -> bool:
        return bool((memory == self.free).all(1).any())

    def release(self, memory: Memory) -> None:
        self.asked.append(("release", memory.tolist()))


def test_readers_are_asked_in_order_and_only_while_they_read() -> None:
    state, reader, idle = StateAuthority(), Reader(), Reader(is_reading=False)
    assert not state.is_read()
    state.add_reader(idle)
    assert not state.is_read()
    state.add_reader(reader)
    assert state.is_read()
    a, b = torch.zeros(4), torch.zeros(2, 3)
    places = [[t.data_ptr(), t.data_ptr() + t.nbytes] for t in (b, a)]
    state.coming([b, torch.empty(0), a])
    state.before_overwrite([a])
    state.before_overwrite([torch.empty(0)])
    assert reader.asked == [("hurry", places), ("release", places[1:])]
    assert idle.asked == []


def test_memory_may_be_overwritten_once_no_reader_needs_it() -> None:
    state, readers, tensor = StateAuthority(), [Reader(), Reader()], torch.zeros(4)
    assert state.may_overwrite([tensor])
    for reader in readers:
        state.add_reader(reader)
    assert state.may_overwrite([torch.empty(0)])
    for reader in readers:
        assert not state.may_overwrite([tensor])
        reader.free = memory_of([tensor])
    assert state.may_overwrite([tensor])
    readers[0].free = memory_of([])
    readers[0].is_reading = False
    assert state.may_overwrite([tensor])
    assert not any(reader.asked for reader in readers), "to look is not to ask"


def test_promises_are_looked_up_each_time_and_can_be_taken_back() -> None:
    state, tensors = StateAuthority(), [torch.zeros(4)]
    assert len(state.promised()) == 0
    state.promise("owner", lambda: tensors)
    assert state.promised().tolist() == memory_of(tensors).tolist()
    tensors.append(torch.zeros(1000))
    state.promise("other", lambda: tensors[:1])
    assert state.promised().tolist() == merged(memory_of(tensors)).tolist()
    state.withdraw("owner")
    assert state.promised().tolist() == memory_of(tensors[:1]).tolist()
    state.withdraw("owner")  # again


def test_memory_with_gaps_cannot_be_guarded() -> None:
    with pytest.raises(LowtideError, match=r"strides \(1, 4\).*contiguous ones; pass the flat"):
        memory_of([torch.zeros(3, 4).t()])
