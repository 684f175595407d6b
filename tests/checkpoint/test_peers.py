"""From node to node: copies that are refused, hang or are damaged, and who may ask for them."""

from __future__ import annotations

import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from lowtide.checkpoint import verify
from lowtide.checkpoint.nodes.epochs import copy_folder
from lowtide.checkpoint.nodes.peers import Peers, _Pace
from lowtide.checkpoint.nodes.wire import Wire, connect
from lowtide.checkpoint.saving import Stage
from lowtide.core.errors import CheckpointError
from tests.checkpoint.node_runs import (
    EVER,
    assert_found,
    flip,
    start,
)
from tests.checkpoint.ranks import file_name
from tests.helpers.plugin_suite import open_files


def test_a_partner_that_hangs_is_given_up_and_the_checkpoint_stays(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("lowtide.checkpoint.nodes.peers.own_hosts", lambda: ["127.0.0.1"])
    with start(tmp_path, every=1, stall_timeout_s=0.5) as run, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = {"hosts": ["127.0.0.1"], "port": silent.getsockname()[1]}
        run.savers[2].board.post("peers/2", address)
        savings = run.save(1)
        for saving in savings:
            assert saving.stage is Stage.DRAINED
            assert saving.is_replicated is False
            assert "rank 0: rank 2 on node 1: cannot be called (127.0.0.1 port" in str(
                saving.replica_error
            )
            assert "timed out" in str(saving.replica_error)
    assert verify(tmp_path / "shared/step1").is_ok
    assert verify(tmp_path / "node1/step1").is_ok


def test_a_partner_that_stops_reading_is_given_up(tmp_path: Path, monkeypatch: Any) -> None:
    gate = threading.Event()
    monkeypatch.setattr(Peers, "_take", lambda *_: gate.wait(EVER))
    with start(tmp_path, stall_timeout_s=0.5) as run:
        savings = run.save(1)
        assert savings[0].is_replicated is False
        assert "timed out" in str(savings[0].replica_error)
        gate.set()


def test_a_partner_without_room_says_so(tmp_path: Path) -> None:
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1/.copies").write_text("not a folder")
    with start(tmp_path) as run:
        savings = run.save(1)
        assert {saving.stage for saving in savings} == {Stage.DRAINED}
        for saving in savings:
            assert "rank 0: node 1: [Errno 20] Not a directory" in str(saving.replica_error)
            assert "rank 2" not in str(saving.replica_error)
    assert (tmp_path / "node0/.copies/step1/2").is_dir()


def test_a_file_that_has_changed_on_its_disk_is_not_copied(
    tmp_path: Path, monkeypatch: Any
) -> None:
    stock = Peers.send_copy

    def send_copy(self: Peers, level: Any, **options: Any) -> None:
        if self.nodes.rank == 1:
            flip(level.folder / "step1" / file_name(1))
        stock(self, level, **options)

    monkeypatch.setattr(Peers, "send_copy", send_copy)
    with start(tmp_path) as run:
        savings = run.save(1)
        assert savings[0].is_replicated is False
        assert "what came is not what was written" in str(savings[0].replica_error)
    assert not copy_folder(tmp_path / "node1", "step1", 1).exists()
    assert copy_folder(tmp_path / "node1", "step1", 0).exists()
    assert not list((tmp_path / "node1/.copies/step1").glob(".*"))


def test_a_caller_with_a_wrong_token_gets_nothing(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.save(1)
        peers = run.savers[0].peers
        assert peers is not None
        for token in ("0" * 32, "", "0" * 300):
            with pytest.raises(CheckpointError, match=r"the other side|reset|Broken"):
                connect(["127.0.0.1"], peers.port, token=token, timeout_s=5.0)
        with connect(["127.0.0.1"], peers.port, token=peers._token, timeout_s=5.0) as wire:
            request = {"do": "give", "level": 0, "tag": "step1", "rank": 0, "is_copy": False}
            wire.tell({**request, "attempt": "f" * 16, "names": []})
            with pytest.raises(CheckpointError, match="of another attempt"):
                wire.hear()


@pytest.mark.parametrize(
    "request_",
    [
        {"do": "take", "level": 0, "tag": "../out", "attempt": "0" * 16, "rank": 0},
        {"do": "take", "level": 0, "tag": "/out", "attempt": "0" * 16, "rank": 0},
        {"do": "take", "level": 0, "tag": "x", "attempt": "../out", "rank": 0},
        {"do": "take", "level": 7, "tag": "x", "attempt": "0" * 16, "rank": 0},
        {"do": "remove", "level": 0, "tag": "x", "attempt": "0" * 16, "rank": 0},
        ["take"],
    ],
)
def test_a_request_out_of_bounds_is_refused(tmp_path: Path, request_: Any) -> None:
    with start(tmp_path, per_node=1) as run:
        peers = run.savers[0].peers
        assert peers is not None
        with connect(["127.0.0.1"], peers.port, token=peers._token, timeout_s=5.0) as wire:
            wire.tell(request_)
            with pytest.raises(CheckpointError, match=r"node 0: (cannot read the request|a list)"):
                wire.hear()
    assert not list(tmp_path.rglob("*out*"))


def test_a_frame_has_an_end_and_so_has_a_wait() -> None:
    ends = socket.socketpair()
    with Wire(ends[0], timeout_s=5.0) as sender, Wire(ends[1], timeout_s=0.05) as receiver:
        sender.send(b"x" * 10)
        assert receiver.receive(10) == b"x" * 10
        with pytest.raises(TimeoutError):
            receiver.receive()
        sender.send(b"x" * 11)
        with pytest.raises(CheckpointError, match="a frame of 11 bytes came, allowed are 10"):
            receiver.receive(10)


def test_no_thread_and_no_file_is_left(tmp_path: Path) -> None:
    def once() -> None:
        with start(tmp_path) as run:
            run.save(1)
            shutil.rmtree(tmp_path / "node1")
            assert_found(run, tmp_path, "step1")

    once()
    threads, files = threading.active_count(), open_files()
    once()
    assert threading.active_count() == threads
    assert open_files() <= files


def test_copies_keep_to_the_rate_of_their_level(monkeypatch: Any) -> None:
    now_s = [100.0]
    monkeypatch.setattr("lowtide.checkpoint.nodes.peers.time.monotonic", lambda: now_s[0])
    waits: list[float] = []

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            now_s[0] += timeout or 0.0
            return False

    pace = _Pace(10.0, Clock())
    for _ in range(3):
        pace(20)
    now_s[0] += 1.0  # the network was slow itself
    pace(20)
    assert waits == [2.0, 2.0, 2.0, 1.0]
    _Pace(None, Clock())(20)
    assert len(waits) == 4
