"""Two jobs and one folder: the second is told, nothing is lost, and the dead block nobody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lowtide.checkpoint.claims import _MOST
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.store import claim
from lowtide.checkpoint.store.claim import CLAIM_FILE, Holder, occupy
from lowtide.checkpoint.store.processes import start_ticks
from lowtide.core.errors import CheckpointError
from tests.checkpoint.node_runs import start
from tests.checkpoint.ranks import file_name, on_all, save, savers
from tests.helpers.ranks import environment

EVER = 30.0
ELSEWHERE = {"host": "elsewhere", "boot": "another"}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that does nothing for as long as it lives."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch for a moment only."""
    monkeypatch.setattr(claim, "WATCH_S", 0.4)
    monkeypatch.setattr(claim, "_LOOK_S", 0.02)


def holder(process: subprocess.Popen[bytes] | None = None, **changes: Any) -> Holder:
    pid = os.getpid() if process is None else process.pid
    other = replace(Holder.of_this_process("another run"), pid=pid, started_ticks=start_ticks(pid))
    return replace(other, **changes)


def put(folder: Path, other: Holder, *, age_s: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CLAIM_FILE
    path.write_text(json.dumps(asdict(other)))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def save_fails(all_savers: list[Saver], folder: Path, step: int = 1, **options: Any) -> set[str]:
    """Save where every rank is to be refused; return what they were told."""

    def begin(saver: Saver) -> str:
        tag = options.get("tag", f"step{step}")
        with pytest.raises(CheckpointError) as raised:
            saver.begin(folder, tag, step=step, details={"config": {}, "client_keys": []})
        assert saver.current is None
        return str(raised.value)

    return set(on_all([lambda s=saver: begin(s) for saver in all_savers]))  # type: ignore[misc]


def saved(all_savers: list[Saver], folder: Path, step: int = 1, **options: Any) -> bool:
    save(all_savers, folder, step, **options)
    done = [lambda s=saver: s.wait(Stage.COMMITTED, EVER) for saver in all_savers]  # type: ignore[misc]
    return all(on_all(done))


def test_second_job_is_told_on_all_ranks_and_goes_on_when_the_first_has_been_killed(
    tmp_path: Path,
) -> None:
    code = (
        "import sys, pathlib\n"
        "from lowtide.checkpoint.saving import Stage\n"
        "from tests.checkpoint.ranks import save, savers\n"
        "with savers(1) as one:\n"
        "    save(one, pathlib.Path(sys.argv[1]), 1)\n"
        "    print(one[0].wait(Stage.COMMITTED, 30), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    env = environment({"SLURM_JOB_ID": "4711"})
    argv = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(argv, stdin=-1, stdout=-1, env=env) as first, savers(2) as all_savers:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"True\n"
            before = (tmp_path / "step1" / file_name(0)).read_bytes()
            (told,) = save_fails(all_savers, tmp_path)
            assert f"process {first.pid}, Slurm job 4711, since 20" in told
            assert f"{tmp_path}: another job saves its checkpoints there (host " in told
            assert sorted(os.listdir(tmp_path)) == [CLAIM_FILE, "latest", "step1"]
            assert (tmp_path / "step1" / file_name(0)).read_bytes() == before
        finally:
            first.kill()
            first.wait()
        assert saved(all_savers, tmp_path, 2)
        assert Holder.read(tmp_path / CLAIM_FILE).pid == os.getpid()  # type: ignore[union-attr]
    assert {"latest", "step1", "step2"} == set(os.listdir(tmp_path)) - {CLAIM_FILE}


@pytest.mark.usefixtures("quick")
def test_job_elsewhere_is_alive_as_long_as_its_claim_is_renewed(tmp_path: Path) -> None:
    path = put(tmp_path, holder(**ELSEWHERE))
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(0.05):
            os.utime(path)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with savers(2) as all_savers:
            (told,) = save_fails(all_savers, tmp_path)
            assert "(host elsewhere, process " in told
            is_over.set()
            renewing.join()
            assert saved(all_savers, tmp_path)  # after it was watched in vain
    finally:
        is_over.set()


@pytest.mark.parametrize(
    ("changes", "age_s"),
    [
        pytest.param(ELSEWHERE, 70.0, id="silent for long"),
        pytest.param({"boot": "before it was started again"}, 70.0, id="node restarted"),
        pytest.param({**ELSEWHERE, "job": "7", "restart": "0"}, 0.0, id="requeued"),
        pytest.param({"started_ticks": 1}, 0.0, id="number given to another process"),
        pytest.param({"pid": 2**22 + 1}, 0.0, id="killed"),
    ],
)
def test_claim_of_the_dead_costs_a_restart_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], age_s: float
) -> None:
    monkeypatch.setattr(claim, "watch", None)  # nobody is watched
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    put(tmp_path, holder(**{"job": "7", "restart": "1", **changes}), age_s=age_s)
    with savers(2) as all_savers:
        assert saved(all_savers, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step1"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("text", ["", "[]", '{"id": 5}', "\0\0"])
def test_claim_that_cannot_be_read_counts_by_its_time_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / CLAIM_FILE).write_text(text)
    assert occupy(tmp_path / CLAIM_FILE, holder()) == Holder()
    assert not claim.watch(tmp_path / CLAIM_FILE, Holder())
    assert occupy(tmp_path / CLAIM_FILE, holder(), dead=Holder()) is None


def test_engines_of_one_process_are_one_job(tmp_path: Path) -> None:
    with savers(2) as first:
        assert saved(first, tmp_path, 1)
        with savers(2) as second:
            assert saved(second, tmp_path, 2)
        assert (tmp_path / CLAIM_FILE).exists()
        assert saved(first, tmp_path, 3)
    assert not (tmp_path / CLAIM_FILE).exists()


def test_job_that_was_thought_dead_overwrites_nothing(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    with savers(2) as all_savers:
        assert saved(all_savers, tmp_path, 1)
        other = put(tmp_path, holder(sleeper))
        savings = save(all_savers, tmp_path, 2, tag="step1")
        assert not any(saver.wait(Stage.COMMITTED, EVER) for saver in all_savers)
        for saving in savings:
            assert f"rank 0: {tmp_path}: another job saves its checkpoints" in str(saving.error)
        record = json.loads((tmp_path / "step1" / "lowtide.json").read_text())
        assert record["step"] == 1
        other.unlink()  # that job has ended
        assert saved(all_savers, tmp_path, 3)


def test_claim_does_not_come_back_while_a_script_removes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.01)
    folder = tmp_path / "checkpoint-10"  # what Hugging Face's trainer names, and removes
    with savers(1) as all_savers:
        assert saved(all_savers, folder, 1)
        renewed = (folder / CLAIM_FILE).stat().st_mtime_ns
        wait_for(lambda: (folder / CLAIM_FILE).stat().st_mtime_ns != renewed)
        shutil.rmtree(folder)
        time.sleep(0.1)
        assert not folder.exists()
        assert saved(all_savers, folder, 2)
        assert (folder / CLAIM_FILE).exists()


def wait_for(is_true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + EVER
    while not is_true():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_old_folders_are_let_go(tmp_path: Path) -> None:
    with savers(1) as all_savers:
        for step in range(_MOST + 2):
            assert saved(all_savers, tmp_path / f"checkpoint-{step}", step)
        claimed = {path.parent.name for path in tmp_path.glob(f"*/{CLAIM_FILE}")}
        assert claimed == {f"checkpoint-{step}" for step in range(2, _MOST + 2)}


def test_folder_that_hangs_holds_no_other_one_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, own, goes_on = claim.Shared(), holder(run="mine"), threading.Event()
    occupied = claim.occupy

    def slow(path: Path, *arguments: Any, **options: Any) -> Holder | None:
        if path.parent.name == "frozen":
            assert goes_on.wait(30)
        return occupied(path, *arguments, **options)

    monkeypatch.setattr(claim, "occupy", slow)
    for name in ("frozen", "healthy"):
        (tmp_path / name).mkdir()
    taken: dict[str, Any] = {}

    def take(name: str) -> None:
        taken[name] = shared.take(tmp_path / name, own, object())

    frozen, healthy = (
        threading.Thread(target=take, args=(name,), daemon=True) for name in ("frozen", "healthy")
    )
    frozen.start()
    healthy.start()
    healthy.join(20)
    is_blocked = healthy.is_alive()
    goes_on.set()
    frozen.join(20)
    assert not is_blocked
    assert sorted(taken) == ["frozen", "healthy"]
    for _, each in taken.values():
        each.release()


@pytest.mark.parametrize("has_links", [True, False])
def test_one_of_many_at_once_replaces_a_dead_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    own = [holder(id=f"{i:016x}", run=f"run{i}") for i in range(8)]
    for attempt in range(20):
        path = put(tmp_path / str(attempt), holder(pid=2**22 + 1))
        got = on_all([lambda each=each, path=path: occupy(path, each) for each in own])  # type: ignore[misc]
        winners = [each for each, other in zip(own, got, strict=True) if other is None]
        assert winners == [Holder.read(path)]
        assert os.listdir(path.parent) == [CLAIM_FILE]


def no_links(*_: Any) -> None:
    raise PermissionError(1, "no links here")


def test_all_ranks_are_told_of_one_nodes_disk(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    put(tmp_path / "node1", holder(sleeper))
    with start(tmp_path) as run:
        (told,) = save_fails(run.savers, run.shared)
        assert told.startswith(f"{tmp_path / 'node1'}: another job saves its checkpoints there")
        assert not (tmp_path / "node0" / CLAIM_FILE).exists()  # a job that is refused holds nothing
        sleeper.kill()
        sleeper.wait()
        assert {saving.stage for saving in run.save(1)} == {Stage.DRAINED}


def test_jobs_share_a_folder_where_their_tags_have_folders_of_their_own(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    put(tmp_path / "run1", holder(sleeper))
    with savers(1) as all_savers:
        assert saved(all_savers, tmp_path, 1, tag="run2/step1")
        (told,) = save_fails(all_savers, tmp_path, tag="run1/step1")
        assert told.startswith(f"{tmp_path / 'run1'}: another job")


def test_start_says_it_where_another_job_saves(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with savers(1, tiers=[{"path": str(tmp_path)}]) as (saver,):
        saver.claims.warn(saver.router.levels)
        assert caplog.text == ""
        assert saved([saver], tmp_path)
        saver.claims.warn(saver.router.levels)  # its own
        assert caplog.text == ""
        put(tmp_path, holder(sleeper))
        saver.claims.warn(saver.router.levels)
        assert f"{tmp_path}: another job saves its checkpoints there" in caplog.text


def test_folder_that_cannot_be_written_is_left_to_the_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with savers(2) as all_savers:
        assert not saved(all_savers, tmp_path / "file" / "checkpoints")
        assert "cannot be made" in str(all_savers[0].last_error)


def test_what_a_killed_claimant_left_is_removed(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    lock = put(tmp_path, holder(pid=2**22 + 1)).replace(tmp_path / f"{CLAIM_FILE}.lock")
    put(tmp_path, holder(sleeper)).replace(tmp_path / f"{CLAIM_FILE}.01234567")  # it lives
    put(tmp_path, holder(pid=2**22 + 1)).replace(tmp_path / f"{CLAIM_FILE}.89abcdef")
    put(tmp_path, holder(**ELSEWHERE), age_s=2e4).replace(tmp_path / f"{CLAIM_FILE}.89abcd00")
    put(tmp_path, holder(pid=2**22 + 1))  # to be replaced under the lock that was left
    with savers(1) as all_savers:
        assert saved(all_savers, tmp_path)
        assert not lock.exists()
    assert sorted(os.listdir(tmp_path)) == [f"{CLAIM_FILE}.01234567", "latest", "step1"]
