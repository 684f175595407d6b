"""Jobs that are killed: at every point of the protocol, at random, and one rank of two.

Nothing that a rank was told is complete may be lost, and nothing else may bear a name. For
more rounds of random kills: ``LOWTIDE_CRASH_ROUNDS=300 pytest -k random tests/checkpoint``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowtide.checkpoint import verify
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.store.catalog import read_latest
from lowtide.core.restart import TRASH, read_record
from tests.checkpoint.crash_worker import (
    KEEP,
    PEER_GONE,
    Order,
    level_folders,
    load_step,
    tag_of,
)
from tests.checkpoint.ranks import DETAILS, hidden, on_all, save, savers
from tests.checkpoint.test_saver import assert_holds, wait_all
from tests.helpers.ranks import REPOSITORY, environment, free_port

pytestmark = pytest.mark.dist
ROUNDS = int(os.environ.get("LOWTIDE_CRASH_ROUNDS", "15"))
EVER_S = 60.0
PLACE = "lowtide.checkpoint"
KILLED = -signal.SIGKILL


class Nursery:
    """Starts ranks within moments, by forking them off a process that has torch."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.crash_worker"],
            cwd=REPOSITORY,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


class Run:
    """One start of a job."""

    count = 0

    def __init__(
        self, nursery: Nursery, root: Path, *, on_rank: dict[int, dict[str, Any]] | None = None,
        **common: Any,
    ) -> None:  # fmt: skip
        Run.count += 1
        self.root, self._nursery, port = root, nursery, free_port()
        root.mkdir(exist_ok=True)
        self.codes: dict[int, int | None] = {}
        self.pids: dict[int, int] = {}
        self._outputs: list[Path] = []
        self._logs: dict[int, Path] = {}
        for rank in range(common.get("world_size", 2)):
            log = f"{Run.count:05d}-{rank}.jsonl"
            output = root / f"{log}.txt"
            options = {**common, **(on_rank or {}).get(rank, {})}
            order = Order(root=str(root), log=log, port=port, rank=rank, **options)
            question = {"order": json.loads(order.as_json()), "output": str(output)}
            self.pids[rank] = nursery.ask(start=question)
            self.codes[rank] = None
            self._outputs.append(output)
            self._logs[rank] = root / "logs" / log

    def look(self) -> dict[int, int | None]:
        """Return the exit codes, None for those that live."""
        for rank, pid in self.pids.items():
            if self.codes[rank] is None:
                self.codes[rank] = self._nursery.ask(poll=pid)
        return self.codes

    def wait(self, ranks: set[int] | None = None, *, any_of: bool = False) -> None:
        """Wait until `ranks` (all) have ended, or one of them."""
        ranks = set(self.pids) if ranks is None else ranks
        end_s = time.monotonic() + EVER_S
        while True:
            ended = [self.look()[rank] is not None for rank in ranks]
            if any(ended) if any_of else all(ended):
                return
            if time.monotonic() > end_s:
                self.kill()
                raise AssertionError(f"exit codes {self.codes}\n{self.output()}\n{self.facts()}")
            time.sleep(0.01)

    def kill(self, ranks: set[int] | None = None, number: int = signal.SIGKILL) -> None:
        for rank in set(self.pids) if ranks is None else ranks:
            if self.look()[rank] is None:
                os.kill(self.pids[rank], number)

    def output(self) -> str:
        return "\n".join(p.read_text() for p in self._outputs if p.exists())

    def facts(self, rank: int | None = None) -> list[dict[str, Any]]:
        """Return what ranks have written down."""
        logs = self._logs.values() if rank is None else [self._logs[rank]]
        lines = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    def values(self, name: str, rank: int | None = None) -> list[Any]:
        return [fact[name] for fact in self.facts(rank) if name in fact]


def run_to_end(nursery: Nursery, root: Path, **options: Any) -> Run:
    """Start the job, let it make its steps, and check how it ended."""
    run = Run(nursery, root, **options)
    run.wait()
    assert set(run.codes.values()) == {0}, run.output()
    assert "Traceback" not in run.output()
    assert run.values("closed") == [True] * len(run.pids)
    return run


def run_until_death(nursery: Nursery, root: Path, **options: Any) -> Run:
    """Start the job and wait until a rank dies of its own; the launcher then kills the others."""
    run = Run(nursery, root, **options)
    run.wait(any_of=True)
    run.kill()
    run.wait()
    assert KILLED in run.codes.values(), f"nobody has died\n{run.output()}"
    assert set(run.codes.values()) <= {KILLED, PEER_GONE}, run.output()
    assert "Traceback" not in run.output()
    return run


def promised(run: Run, what: str = "committed") -> int:
    return max(run.values(what), default=0)


def check_names(folder: Path, *, most: int = KEEP + 2) -> None:
    """Fail unless whatever bears a name in `folder` is a whole checkpoint of one step."""
    if not folder.is_dir():
        return
    visible = [path for path in folder.iterdir() if path.name[0] != "." and path.name != "latest"]
    assert len(visible) <= most, sorted(path.name for path in visible)
    for path in visible:
        record = read_record(path)
        assert record is not None, path
        assert verify(path).is_ok, (path, verify(path).damage)
        assert tag_of(record["step"]) == path.name
        for rank in range(2):
            assert load_step(path, rank)["where"] == [rank, record["step"]]


def check_went_on(run: Run, at_least: int) -> int:
    """Fail unless all ranks of `run` have loaded one step, and none older than `at_least`."""
    loaded = [run.values("loaded", rank) for rank in run.pids]
    assert all(each == loaded[0] and len(each) == 1 for each in loaded), (loaded, run.output())
    step: int = loaded[0][0]
    assert step >= at_least, f"step {at_least} was promised, {step} was found: {run.facts()}"
    return step


# -- at every point of the protocol ---------------------------------------------------------------


def at(name: str, when: str = "before", *, nth: int = 1, where: str = "") -> dict[str, Any]:
    return {"at": f"{PLACE}.{name}", "when": when, "nth": nth, "where": where}


# Step 4 is saved twice, so step 5 is the sixth checkpoint.
ANYONE = {
    "folder is not made": at("saver:make_part_folder", where=".step5."),
    "folder is made": at("saver:make_part_folder", "after", where=".step5."),
    "files are being written": at("saver:wait_durable", where="step5"),
    "files are written": at("saver:wait_durable", "after", where="step5"),
    "manifest is not written": at("store.commit:write_manifest", where=".step5."),
    "manifest is half written": at("store.folders:os.replace", nth=6, where=".part/manifest-"),
    "manifest is written": at("store.commit:write_manifest", "after", where=".step5."),
}
LEADER = {
    "folder has no owner": at("store.folders:json.dumps", nth=11, where="'pid'"),
    "folder has half an owner": at("store.folders:os.replace", nth=11, where="owner.json"),
    "votes are there": at("store.commit:write_record", where=".step5."),
    "record is half written": at("store.folders:os.replace", nth=6, where=".part/lowtide.json"),
    "record is written": at("store.commit:write_record", "after", where=".step5."),
    "owner is removed": at("store.folders:sync_folder", where=".step5."),
    "folder has its name": at("store.folders:os.rename", "after", where="/step5'"),
    "latest is not written": at("store.commit:write_latest", where="'step5'"),
    "latest is half written": at("store.folders:os.replace", nth=6, where="/latest'"),
    "latest is written": at("store.commit:write_latest", "after", where="'step5'"),
    "others do not know": at("board:Board.post", nth=6, where="outcome"),
    "others know": at("board:Board.post", "after", nth=6, where="outcome"),
    "old ones are there": at("keeping:prune", nth=6),
    "an old one is trash": at("store.retention:os.rename", "after", where="/last'), Posix"),
    "an old one is half removed": at("store.retention:os.unlink", "after", nth=15, where=".trash/"),
}
REPLACING = {
    "again, with its record": at("store.commit:publish", nth=2, where=".step4."),
    "between two names": at("store.folders:os.rename", "after", where="/step4'), PosixPath"),
    "names are exchanged": at("store.folders:_exchange", "after", where=".step4."),
    "the replaced one is trash": at("store.folders:shutil.rmtree", where=".step4."),
    "replaced": at("store.commit:publish", "after", nth=2, where=".step4."),
}
DRAINING_ANYONE = {
    "before it is copied": at("drain:Drain.bring", nth=6),
    "it is being copied": at("drain:wait_durable", where="step5"),
    "it is copied": at("drain:wait_durable", "after", where="step5"),
    "copy has its manifest": at("store.commit:write_manifest", "after", where="/slow/.step5."),
}
DRAINING_LEADER = {
    "copy is voted for": at("store.commit:write_record", where="/slow/.step5."),
    "copy has its record": at("store.commit:publish", where="/slow/.step5."),
    "copy has its name": at("store.commit:write_latest", where="/slow'), 'step5'"),
    "others do not know of the copy": at("board:Board.post", nth=6, where="/1/outcome"),
    "old copy is trash": at("store.retention:os.rename", "after", where="/slow/last'), Posix"),
}


def check_restart(nursery: Nursery, root: Path, at_least: int, levels: int) -> None:
    """Fail unless the next start finds what was promised, goes on, and leaves no traces."""
    run = run_to_end(nursery, root, levels=levels, steps=3, is_patient=True)
    step = check_went_on(run, at_least) + 3
    for folder in level_folders(root, levels):
        check_names(folder, most=KEEP)
        assert hidden(folder) == set()
        assert read_latest(folder) == tag_of(step)


def die_and_go_on(
    nursery: Nursery, root: Path, death: dict[str, Any], *, rank: int = 0, **options: Any
) -> Run:
    """Die at step 4 or 5, look at what is left, and start again."""
    common = {"steps": 7, "is_patient": True, "levels": 1, **options}
    run = run_until_death(nursery, root, on_rank={rank: {"deaths": [death]}}, **common)
    assert promised(run) in (4, 5)
    for folder in level_folders(root, common["levels"]):
        check_names(folder)
    if common["levels"] == 2:
        other = shutil.copytree(root, root.with_name("other"))
        shutil.rmtree(other / "fast")  # as when a node is lost
        check_restart(nursery, other, promised(run, "drained"), 2)
    check_restart(nursery, root, promised(run), common["levels"])
    return run


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ANYONE)
def test_rank_dies_when(nursery: Nursery, tmp_path: Path, point: str, rank: int) -> None:
    die_and_go_on(nursery, tmp_path / "root", ANYONE[point], rank=rank)


@pytest.mark.parametrize("point", LEADER)
def test_leader_dies_when(nursery: Nursery, tmp_path: Path, point: str) -> None:
    die_and_go_on(nursery, tmp_path / "root", LEADER[point])


@pytest.mark.parametrize("use_exchange", [True, False])
@pytest.mark.parametrize("point", REPLACING)
def test_leader_dies_while_a_checkpoint_is_replaced(
    nursery: Nursery, tmp_path: Path, point: str, use_exchange: bool
) -> None:
    if point == "between two names" and use_exchange:
        pytest.skip("that is one step here")
    options = {"use_exchange": use_exchange}
    die_and_go_on(nursery, tmp_path / "root", REPLACING[point], **options)


@pytest.mark.parametrize("point", DRAINING_ANYONE | DRAINING_LEADER)
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_dies_on_the_way_to_the_slow_level_when(
    nursery: Nursery, tmp_path: Path, point: str, rank: int
) -> None:
    if rank == 1 and point in DRAINING_LEADER:
        pytest.skip("only the leader comes here")
    death = (DRAINING_ANYONE | DRAINING_LEADER)[point]
    run = die_and_go_on(nursery, tmp_path / "root", death, rank=rank, levels=2)
    assert promised(run, "drained") in (4, 5)  # where the death comes after the copy's commit


@pytest.mark.parametrize(
    "second",
    [
        at("keeping:finish_published"),
        at("store.folders:os.rename", nth=1),
        at("store.folders:os.rename", nth=2),  # between the two names
        at("store.folders:os.rename", "after", nth=2),
        at("keeping:finish_published", "after"),
        at("keeping:remove_abandoned", "after"),
    ],
    ids=str,
)
def test_next_start_dies_while_it_cleans_up(
    nursery: Nursery, tmp_path: Path, second: dict[str, Any]
) -> None:
    death = REPLACING["again, with its record"]
    common = {"steps": 7, "is_patient": True}
    run = run_until_death(nursery, tmp_path, on_rank={0: {"deaths": [death]}}, **common)
    again = run_until_death(nursery, tmp_path, on_rank={0: {"deaths": [second]}}, **common)
    check_went_on(again, promised(run))
    check_names(tmp_path / "fast")
    check_restart(nursery, tmp_path, promised(run), 1)


# -- at random ------------------------------------------------------------------------------------


class Campaign:
    """Kills one job again and again in the same folders."""

    def __init__(self, nursery: Nursery, root: Path, levels: int, seed: int) -> None:
        self._nursery, self._root, self._levels = nursery, root, levels
        self._random = random.Random(seed)
        self._folders = level_folders(root, levels)
        self._left: dict[Path, set[str]] = {folder: set() for folder in self._folders}
        self._promised = self._promised_slow = 0
        self.counts: Counter[str] = Counter()

    def go(self) -> None:
        """Start, kill, look."""
        choose = self._random
        if self._levels == 2 and choose.random() < 0.1:
            shutil.rmtree(self._folders[0], ignore_errors=True)
            self._promised = self._promised_slow
            self._left[self._folders[0]] = set()
            self.counts["fast level lost"] += 1
        run = Run(
            self._nursery,
            self._root,
            levels=self._levels,
            is_patient=choose.random() < 0.3,
            use_exchange=choose.random() < 0.5,
        )
        self._kill(run)
        assert set(run.codes.values()) <= {KILLED, PEER_GONE}, run.output()
        if len(run.values("loaded")) == len(run.pids):
            self.counts["loaded"] += 1
            check_went_on(run, self._promised)
        self._promised = max(self._promised, promised(run))
        self._promised_slow = max(self._promised_slow, promised(run, "drained"))
        committed = {fact["attempt"] for fact in run.facts() if "committed" in fact}
        self.counts["committed"] += len(committed)
        for folder in self._folders:
            self._check(folder, has_cleaned=len(committed) > 1)

    def finish(self) -> None:
        """Start for a last time."""
        check_restart(self._nursery, self._root, self._promised, self._levels)

    def _kill(self, run: Run) -> None:
        choose = self._random
        time.sleep(choose.uniform(0.03, 1.2))
        victim = choose.choice(["job", "job", "rank 0", "rank 1"])
        self.counts[f"killed: {victim}"] += 1
        if victim != "job":
            run.kill({int(victim[-1])})
            time.sleep(choose.choice([0.0, 0.02, 0.2]))
        run.kill()
        run.wait()

    def _check(self, folder: Path, *, has_cleaned: bool) -> None:
        check_names(folder, most=KEEP + 4)  # what is being brought down stays, too
        now = hidden(folder)
        if has_cleaned:
            assert not self._left[folder] & now, "the next start has not cleaned up"
        assert len(now) < 10, sorted(now)
        for name in now:
            is_whole = not name.endswith(TRASH) and read_record(folder / name) is not None
            ending = "latest" if name.startswith(".latest.") else name.rpartition(".")[2]
            kind = "whole" if is_whole else ending
            self.counts[f"left: {kind}"] += 1
        self._left[folder] = now


@pytest.mark.slow
@pytest.mark.parametrize("levels", [1, 2])
def test_nothing_is_lost_when_jobs_are_killed_at_random(
    nursery: Nursery, tmp_path: Path, levels: int
) -> None:
    seed = int(os.environ.get("LOWTIDE_CRASH_SEED", time.time_ns() % 10**6))
    campaign = Campaign(nursery, tmp_path, levels, seed)
    print(f"seed {seed}")
    try:
        for _ in range(ROUNDS):
            campaign.go()
        campaign.finish()
    finally:
        print(f"{levels} levels, {ROUNDS} rounds: {dict(sorted(campaign.counts.items()))}")


# -- those who live on ----------------------------------------------------------------------------


def run_alone(
    nursery: Nursery, root: Path, death: dict[str, Any], *, rank: int, **options: Any
) -> dict[str, Any]:
    """Let `rank` die in the last of three saves; return what the other one has written down."""
    common = {"steps": 3, "is_patient": True, "is_last_alone": True, "commit_timeout_s": 1.0}
    deaths = {rank: {"deaths": [death]}}
    run = Run(nursery, root, on_rank=deaths, **{**common, **options})
    run.wait({1 - rank})
    run.kill()
    run.wait()
    assert run.codes == {rank: KILLED, 1 - rank: 0}, run.output()
    assert "Traceback" not in run.output()
    assert run.values("loaded") == [0, 0]
    check_names(root / "fast")
    seen: dict[str, Any] = {}
    for fact in run.facts(1 - rank):
        seen |= fact
    return seen


@pytest.mark.parametrize("phase", ["writes", "votes"])
def test_leader_hears_that_a_rank_died_before_it(
    nursery: Nursery, tmp_path: Path, phase: str
) -> None:
    points = {
        "writes": at("saver:wait_durable", where="last"),
        "votes": at("store.commit:write_manifest", "after", where=".last."),
    }
    seen = run_alone(nursery, tmp_path, points[phase], rank=1)
    assert (seen["committed"], seen["failed"]) == (2, 3)
    assert "no word from rank 1 within 1 s" in seen["error"]
    assert seen["closed"] is True
    check_restart(nursery, tmp_path, 2, 1)


def test_rank_that_dies_after_its_vote_costs_nothing(nursery: Nursery, tmp_path: Path) -> None:
    death = at("board:Board.post", "after", nth=3, where="vote")
    seen = run_alone(nursery, tmp_path, death, rank=1)
    assert (seen["committed"], seen["closed"]) == (3, True)
    assert "failed" not in seen
    check_restart(nursery, tmp_path, 3, 1)


@pytest.mark.parametrize("phase", ["votes", "decides", "tells"])
def test_ranks_hear_that_the_leader_died(nursery: Nursery, tmp_path: Path, phase: str) -> None:
    points = {
        "votes": at("store.commit:write_manifest", where=".last."),
        "decides": at("store.commit:write_record", "after", where=".last."),
        "tells": at("board:Board.post", nth=3, where="outcome"),
    }
    seen = run_alone(nursery, tmp_path, points[phase], rank=0)
    assert (seen["committed"], seen["failed"]) == (2, 3)
    assert "store of torch.distributed cannot be reached" in seen["error"]
    assert "its host, usually rank 0, has ended" in seen["error"]
    assert seen["closed"] is True
    check_restart(nursery, tmp_path, 2, 1)


def test_rank_ends_though_the_leader_hangs(nursery: Nursery, tmp_path: Path) -> None:
    death = at("store.commit:write_record", where=".last.") | {"number": signal.SIGSTOP}
    seen = run_alone(nursery, tmp_path, death, rank=0, close_s=2.0)
    assert (seen["committed"], seen["failed"]) == (2, 3)
    assert "not complete within 2 s of the end of the run" in seen["error"]
    assert seen["closed"] is False
    check_restart(nursery, tmp_path, 2, 1)


def test_ranks_end_though_the_leaders_commit_hangs(nursery: Nursery, tmp_path: Path) -> None:
    death = at("store.commit:write_record", where=".last.") | {"number": 0}
    common = {"steps": 3, "is_patient": True, "is_last_alone": True, "close_s": 1.0}
    run = Run(nursery, tmp_path, on_rank={0: {"deaths": [death]}}, **common)
    run.wait()
    assert run.codes == {0: 0, 1: 0}, run.output()
    assert run.values("failed") == [3, 3]
    assert run.values("closed") == [False, False]
    check_restart(nursery, tmp_path, 2, 1)


def test_a_late_rank_leaves_nothing_behind_once_it_has_come(tmp_path: Path) -> None:
    with savers(2, commit_timeout_s=0.3) as all_savers:
        first, second = all_savers
        save_one = lambda saver: saver.begin(tmp_path, "late", step=1, details=DETAILS)  # noqa: E731
        on_all([lambda: save_one(first), lambda: save_one(second)])
        first.end()
        assert not first.wait(Stage.COMMITTED, EVER_S)
        assert "no word from rank 1" in str(first.last_error)
        assert len(hidden(tmp_path)) == 1  # rank 1 may be writing there
        second.end()
        assert not second.wait(Stage.COMMITTED, EVER_S)
        save(all_savers, tmp_path, 2)
        assert wait_all(all_savers) == [True, True]
        assert hidden(tmp_path) == set()


# -- full disks -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a disk on which three checkpoints have room, and not four."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=30)
    if done.returncode != 0:
        pytest.skip("this user may not mount a small disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=30)


def check_gone_through(run: Run, *, text: str, committed: list[int]) -> None:
    """Fail unless the saves of steps 3 and 4 have failed on all ranks, and no other."""
    for rank in run.pids:
        assert run.values("failed", rank) == [3, 4, 4]
        assert run.values("committed", rank) == committed
    assert all(text in error for error in run.values("error"))


def test_rank_that_may_not_write_large_files_fails_all_until_it_may(
    nursery: Nursery, tmp_path: Path
) -> None:
    run = run_to_end(nursery, tmp_path, steps=6, is_patient=True, full_from=3, full_to=5)
    check_gone_through(run, text="File too large", committed=[1, 2, 5, 6])
    assert "rank 1: " in run.values("error", 0)[0]
    check_names(tmp_path / "fast", most=KEEP)
    assert hidden(tmp_path / "fast") == set()
    check_restart(nursery, tmp_path, 6, 1)


@pytest.mark.parametrize("levels", [1, 2])
def test_full_disk_fails_checkpoints_until_there_is_room(
    nursery: Nursery, tmp_path: Path, small_disk: Path, levels: int
) -> None:
    last = level_folders(tmp_path, levels)[-1]
    last.symlink_to(small_disk)
    options = {"full_from": 3, "full_to": 5, "filler": str(small_disk / "filler.bin")}
    run = run_to_end(nursery, tmp_path, levels=levels, steps=6, is_patient=True, **options)
    committed = [1, 2, 5, 6] if levels == 1 else [1, 2, 3, 4, 4, 5, 6]
    check_gone_through(run, text="No space left", committed=committed)
    for folder in level_folders(tmp_path, levels):
        check_names(folder, most=KEEP)
        assert hidden(folder) == set()
    assert run.values("drained", 0)[-1] == 6
    check_restart(nursery, tmp_path, 6, levels)


def test_replaced_checkpoint_comes_back_when_the_new_one_cannot_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowtide.checkpoint.store.folders._exchange", lambda *_: False)
    stock = Path.rename
    with savers(2) as all_savers:
        save(all_savers, tmp_path, 1, tag="best")
        assert wait_all(all_savers) == [True, True]

        def refuse(path: Path, target: Path) -> Path:
            if target == tmp_path / "best" and path.name.endswith(".part"):
                raise OSError("no")
            return stock(path, target)

        monkeypatch.setattr(Path, "rename", refuse)
        save(all_savers, tmp_path, 2, tag="best")
        assert wait_all(all_savers) == [False, False]
    assert_holds(tmp_path / "best", 1)
    assert hidden(tmp_path) == set()
