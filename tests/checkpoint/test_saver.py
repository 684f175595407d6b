"""From `begin` to COMMITTED: what is on disk, what every rank knows, and what faults do."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint import list_checkpoints, verify
from lowtide.checkpoint import saver as saver_module
from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Level, Stage
from lowtide.checkpoint.store import commit
from lowtide.checkpoint.store.catalog import read_latest
from lowtide.checkpoint.store.folders import make_part_folder, remove
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import read_record
from tests.checkpoint.ranks import DETAILS, file_name, hidden, on_all, save, savers, state_of
from tests.helpers.checkpoints import make_part
from tests.helpers.plugin_suite import open_files, resident_bytes

EVER = 30.0


def wait_all(all_savers: list[Saver], stage: Stage = Stage.DRAINED) -> list[bool]:
    return on_all([lambda s=saver: s.wait(stage, EVER) for saver in all_savers])  # type: ignore[misc]


def assert_holds(checkpoint: Path, step: int, world_size: int = 2) -> None:
    """Fail unless every rank's state of `step` is there, whole."""
    assert verify(checkpoint).is_ok
    for rank in range(world_size):
        loaded = torch.load(checkpoint / file_name(rank), weights_only=False)
        expected = state_of(rank, step)
        assert torch.equal(loaded["weights"], expected["weights"])
        assert (loaded["rank"], loaded["step"]) == (rank, step)


def test_checkpoint_is_complete_on_all_ranks_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    with savers(3) as all_savers:
        savings = save(all_savers, tmp_path, 7)
        assert wait_all(all_savers) == [True] * 3
    assert [saving.stage for saving in savings] == [Stage.DRAINED] * 3
    assert_holds(tmp_path / "step7", 7, world_size=3)
    assert read_latest(tmp_path) == "step7"
    assert hidden(tmp_path) == set()
    record = read_record(tmp_path / "step7")
    assert record is not None
    assert (record["step"], record["world_size"], record["tag"]) == (7, 3, "step7")
    assert len(record["manifests"]) == 3
    assert "owner.json" not in os.listdir(tmp_path / "step7")


def test_nothing_has_the_name_before_all_ranks_are_done(tmp_path: Path) -> None:
    with savers(2) as all_savers:
        first, second = all_savers
        pair = [None, None]

        def begin(saver: Saver) -> None:
            saver.begin(tmp_path, "step1", step=1, details=DETAILS)
            rank = saver.board.rank
            saver.add(state_of(rank, 1), file_name(rank), is_stable=lambda _: True)

        on_all([lambda: begin(first), lambda: begin(second)])
        pair[0] = first.end()
        assert pair[0].wait(Stage.DURABLE, EVER)
        time.sleep(0.2)
        assert not (tmp_path / "step1").exists()
        assert read_latest(tmp_path) is None
        assert [entry.state for entry in list_checkpoints(tmp_path)] == ["in progress"]
        second.end()
        assert wait_all(all_savers) == [True, True]
    assert_holds(tmp_path / "step1", 1)


def test_memory_may_change_after_capture(tmp_path: Path) -> None:
    with savers(2) as all_savers:
        states = [state_of(rank, 3) for rank in range(2)]
        save(all_savers, tmp_path, 3, states=states)
        for saver in all_savers:
            saver.wait_captured()
        for state in states:
            state["weights"].zero_()
        assert wait_all(all_savers) == [True, True]
    assert_holds(tmp_path / "step3", 3)


def test_change_between_save_and_update_is_found_and_the_checkpoint_not_used(
    tmp_path: Path,
) -> None:
    with savers(2) as all_savers:
        for step in range(1, 31):
            states = [state_of(rank, step) for rank in range(2)]
            savings = save(all_savers, tmp_path, step, states=states)
            states[1]["weights"].add_(1.0)
            wait_all(all_savers)
            if savings[0].stage is not Stage.FAILED:  # it had been captured before the change
                assert_holds(tmp_path / f"step{step}", step)
                continue
            assert {saving.stage for saving in savings} == {Stage.FAILED}
            assert "were changed between save_checkpoint and the update" in str(savings[0].error)
            assert not (tmp_path / f"step{step}").exists()
            assert hidden(tmp_path) == set()
            return
    pytest.fail("captured before the change, thirty times")


def test_two_checkpoints_in_flight(tmp_path: Path) -> None:
    with savers(2) as all_savers:
        for step in (1, 2, 3):
            save(all_savers, tmp_path, step)
        assert wait_all(all_savers) == [True, True]
    for step in (1, 2, 3):
        assert_holds(tmp_path / f"step{step}", step)
    assert read_latest(tmp_path) == "step3"


def test_larger_than_the_buffer(tmp_path: Path) -> None:
    with savers(1, buffer_bytes=16 * MIB) as all_savers:
        states = [{"weights": torch.randn(30 * MIB // 4), "rank": 0, "step": 1}]
        save(all_savers, tmp_path, 1, states=states)
        assert wait_all(all_savers) == [True]
    loaded = torch.load(tmp_path / "step1" / file_name(0), weights_only=False)
    assert torch.equal(loaded["weights"], states[0]["weights"])


def test_a_tag_used_again_is_replaced_whole(tmp_path: Path) -> None:
    with savers(2) as all_savers:
        for step in (1, 2):
            save(all_savers, tmp_path, step, tag="best")
            assert wait_all(all_savers) == [True, True]
            assert_holds(tmp_path / "best", step)
    assert hidden(tmp_path) == set()


def test_a_tag_used_again_without_exchange(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lowtide.checkpoint.store.folders._exchange", lambda *_: False)
    test_a_tag_used_again_is_replaced_whole(tmp_path)


def test_failure_of_one_rank_fails_all_and_training_goes_on(tmp_path: Path) -> None:
    with savers(2) as all_savers:
        save(all_savers, tmp_path, 1)
        assert wait_all(all_savers) == [True, True]

        def save_badly(saver: Saver) -> Any:
            rank = saver.board.rank
            saving = saver.begin(tmp_path, "step2", step=2, details=DETAILS)
            saver.add(state_of(rank, 2), file_name(rank), is_stable=lambda _: True)
            if rank == 1:  # a folder where a file is to be: as sudden as a full disk
                (saving.part() / "blocked.pt").mkdir()
                saver.add(state_of(rank, 2), "blocked.pt", is_stable=lambda _: True)
            return saver.end()

        savings = on_all([lambda s=s: save_badly(s) for s in all_savers])  # type: ignore[misc]
        assert wait_all(all_savers) == [False, False]
        for saving, saver in zip(savings, all_savers, strict=True):
            assert saving.stage is Stage.FAILED
            assert "blocked.pt" in str(saver.last_error)
        save(all_savers, tmp_path, 3)
        assert wait_all(all_savers) == [True, True]
    assert not (tmp_path / "step2").exists()
    assert read_latest(tmp_path) == "step3"
    assert hidden(tmp_path) == set()


def test_a_rank_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with savers(2, commit_timeout_s=0.5) as all_savers:
        first, second = all_savers
        on_all([lambda s=s: s.begin(tmp_path, "s", step=1, details=DETAILS) for s in all_savers])  # type: ignore[misc]
        first.add({}, "a.pt", is_stable=lambda _: True)
        saving = first.end()
        assert not first.wait(Stage.COMMITTED, EVER)
        assert saving.stage is Stage.FAILED
        assert "no word from rank 1" in str(saving.error)
        second.abandon(second.current, "test")  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


def test_update_does_not_wait_longer_than_allowed(tmp_path: Path) -> None:
    slow = [{"path": str(tmp_path), "bytes_per_s": 4.0 * MIB}]
    with savers(1, max_wait_s=0.2, tiers=slow) as (saver,):
        states = [{"weights": torch.randn(64 * MIB // 4)}]  # four times the buffer
        (saving,) = save([saver], tmp_path, 1, states=states)
        begin_s = time.monotonic()
        saver.wait_captured()
        assert time.monotonic() - begin_s < 10.0  # at this rate all of it takes 16 s
        assert not saver.wait(Stage.COMMITTED, EVER)
        assert saving.stage is Stage.FAILED
        assert "was not copied within 0.2 s" in str(saving.error)
    assert not (tmp_path / "step1").exists()


def test_eager_mode_captures_before_end_returns(tmp_path: Path) -> None:
    with savers(1, lazy=False) as all_savers:
        (saving,) = save(all_savers, tmp_path, 1)
        assert saving.stage is not Stage.REQUESTED


def test_close_finishes_what_is_on_its_way(tmp_path: Path) -> None:
    with savers(2) as all_savers:
        save(all_savers, tmp_path, 1)
        assert on_all([lambda s=s: s.close(EVER) for s in all_savers]) == [True, True]  # type: ignore[misc]
    assert_holds(tmp_path / "step1", 1)


@pytest.mark.parametrize("first_batch_bytes", [1, 1 << 30], ids=["under way", "not begun"])
def test_save_that_ended_in_an_exception_is_abandoned(
    tmp_path: Path, monkeypatch: Any, first_batch_bytes: int
) -> None:
    batch = "lowtide.checkpoint.files.ranges.FIRST_BATCH_BYTES"
    monkeypatch.setattr(batch, first_batch_bytes)
    with savers(1) as (saver,):
        saver.begin(tmp_path, "step1", step=1, details=DETAILS)
        saver.add(state_of(0, 1), file_name(0), is_stable=lambda _: True)
        with pytest.raises((AttributeError, pickle.PicklingError)):
            saver.add({"x": torch.ones(5000), "f": lambda: 0}, "x.pt", is_stable=lambda _: True)
        save([saver], tmp_path, 2)
        assert wait_all([saver]) == [True]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step2"]


def test_retention_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    with savers(2, keep=2, keep_every_n_steps=4) as all_savers:
        for step in range(1, 8):
            save(all_savers, tmp_path, step)
            assert wait_all(all_savers) == [True, True]
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["step4", "step6", "step7"]


def test_single_file_is_there_on_return(tmp_path: Path) -> None:
    with savers(1) as (saver,):
        saver.save_file({"x": torch.arange(5)}, tmp_path / "pytorch_model.bin")
        assert torch.equal(torch.load(tmp_path / "pytorch_model.bin")["x"], torch.arange(5))
        with pytest.raises(CheckpointError, match="nowhere"):
            saver.save_file({}, tmp_path / "nowhere" / "x.bin")
    assert os.listdir(tmp_path) == ["pytorch_model.bin"]


def test_leftovers_of_a_dead_run_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / f".step1.{'0' * 16}.part"
    dead.mkdir()
    owner = {"host": os.uname().nodename, "pid": 999_999_999, "time_s": 1.0}
    (dead / "owner.json").write_text(json.dumps(owner))
    (dead / "half.pt").write_bytes(b"x")
    with savers(1) as all_savers:
        save(all_savers, tmp_path, 2)
        assert wait_all(all_savers) == [True]
    assert not dead.exists()


def test_what_others_put_into_the_folder_stays(tmp_path: Path) -> None:
    with savers(1) as (saver,):
        save([saver], tmp_path, 1)
        (tmp_path / "step1" / "offloaded").mkdir(parents=True, exist_ok=True)  # as DeepSpeed's NVMe
        (tmp_path / "step1" / "offloaded" / "x.swp").write_text("theirs")
        saver.wait(Stage.COMMITTED, EVER)
    assert (tmp_path / "step1" / file_name(0)).is_file()
    assert (tmp_path / "step1" / "offloaded" / "x.swp").read_text() == "theirs"


def test_cycles_in_a_state_end(tmp_path: Path) -> None:
    state: dict[str, Any] = {"weights": torch.arange(5)}
    state["self"] = state
    with savers(1) as (saver,):
        save([saver], tmp_path, 1, states=[state])
        assert saver.wait(Stage.COMMITTED, EVER)
    loaded = torch.load(tmp_path / "step1" / file_name(0), weights_only=False)
    assert loaded["self"] is loaded


# -- levels ---------------------------------------------------------------------------------------


def tiers(*folders: Path, **first: Any) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [{"path": str(folder)} for folder in folders]
    entries[0] |= first
    return entries


def test_checkpoint_comes_down_to_every_level(tmp_path: Path) -> None:
    fast, middle, slow = (tmp_path / name for name in ("fast", "middle", "slow"))
    with savers(2, tiers=tiers(fast, middle, slow)) as all_savers:
        save(all_savers, slow, 5)
        assert wait_all(all_savers) == [True, True]
    for folder in (fast, middle, slow):
        assert_holds(folder / "step5", 5)
        assert read_latest(folder) == "step5"
        assert hidden(folder) == set()


def test_other_folders_are_written_directly(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    with savers(1, tiers=tiers(fast, slow)) as all_savers:
        save(all_savers, tmp_path / "best", 5)
        assert wait_all(all_savers) == [True]
    assert (tmp_path / "best" / "step5").is_dir()
    assert not fast.exists()


def test_levels_have_their_own_interval_and_retention(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    entries = [{"path": str(fast), "keep": 1}, {"path": str(slow), "every": 3}]
    with savers(2, tiers=entries, keep=5) as all_savers:
        for step in range(1, 8):
            save(all_savers, slow, step)
            assert wait_all(all_savers) == [True, True]
    assert [e.tag for e in list_checkpoints(fast)] == ["step7"]
    assert [e.tag for e in list_checkpoints(slow)] == ["step6", "step3"]


def test_auto_level_gets_a_checkpoint_when_rank_0_says_that_it_is_time(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    entries = [{"path": str(fast)}, {"path": str(slow), "every": "auto"}]
    with savers(2, tiers=entries) as all_savers:

        def save_next(step: int) -> None:
            save(all_savers, slow, step)
            assert wait_all(all_savers) == [True, True]

        router = all_savers[0].router
        save_next(1)
        assert 0 < router.interval_s(1) < EVER, "as long as the first one took"
        for _ in range(3):
            router.costs.begin(1)
            router.costs.end(1, 1000.0)
        save_next(2)
        assert router.intervals_s() == {str(slow): 1000.0}
        router._last_s[1] -= 1000.0
        save_next(3)
        save_next(4)
    assert [e.tag for e in list_checkpoints(fast)] == ["step4", "step3", "step2", "step1"]
    assert [e.tag for e in list_checkpoints(slow)] == ["step3", "step1"]


def test_a_level_that_fails_is_left_out_until_it_works(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    fast.write_text("not a folder")
    with savers(2, tiers=tiers(fast, slow)) as all_savers:
        first = save(all_savers, slow, 1)
        assert wait_all(all_savers) == [False, False]
        assert first[0].stage is Stage.FAILED
        save(all_savers, slow, 2)
        assert wait_all(all_savers) == [True, True]
    assert_holds(slow / "step2", 2)


def test_damage_of_the_fast_level_is_not_copied_down(tmp_path: Path, monkeypatch: Any) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    with savers(1, tiers=tiers(fast, slow)) as (saver,):
        stock = saver._drain.bring

        def damage(saving: Any, above: Any, level: Any, **options: Any) -> None:
            path = fast / "step1" / file_name(0)
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)
            stock(saving, above, level, **options)

        monkeypatch.setattr(saver._drain, "bring", damage)
        (saving,) = save([saver], slow, 1)
        assert not saver.wait(Stage.DRAINED, EVER)
        assert saving.stage is Stage.COMMITTED  # on the first level
        assert "has changed on its disk" in str(saver.last_error)
    assert not (slow / "step1").exists()


def test_slow_level_gets_the_newest_and_skips_what_is_superseded(
    tmp_path: Path, monkeypatch: Any
) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    with savers(1, tiers=tiers(fast, slow)) as (saver,):
        gate = threading.Event()
        stock = saver._drain.bring

        def gated(*args: Any, **options: Any) -> None:
            gate.wait(EVER)
            stock(*args, **options)

        monkeypatch.setattr(saver._drain, "bring", gated)
        savings = [save([saver], slow, step)[0] for step in (1, 2, 3, 4)]
        assert saver.wait(Stage.COMMITTED, EVER)
        gate.set()
        assert saver.wait(Stage.DRAINED, EVER)
    on_slow = {entry.tag for entry in list_checkpoints(slow)}
    assert "step4" in on_slow
    for saving in savings:
        assert bool(saving.superseded) == (saving.tag not in on_slow)
    assert any(saving.superseded for saving in savings)


@pytest.mark.parametrize("every", [3, "auto"])
def test_a_level_gets_its_turn_also_where_newer_ones_wait_for_another(
    tmp_path: Path, monkeypatch: Any, every: Any
) -> None:
    folders = [tmp_path / name for name in ("fast", "middle", "slow")]
    entries = [{"path": str(path)} for path in folders[:2]]
    entries.append({"path": str(folders[2]), "every": every})
    with savers(1, tiers=entries) as (saver,):
        gate = threading.Event()
        stock = saver._drain.bring
        monkeypatch.setattr(saver._drain, "bring", lambda *a: gate.wait(EVER) and stock(*a))
        savings = []
        saver.router.costs.end(2, 1000.0)  # what "auto" makes of it: not again for long
        for step in (1, 2, 3, 4, 5):
            if every == "auto":
                saver.router._last_s[2] = time.monotonic() - 1000.0 * (step == 3)
            savings += save([saver], folders[2], step)
        assert saver.wait(Stage.COMMITTED, EVER)
        gate.set()
        assert saver.wait(Stage.DRAINED, EVER)
    found = [{entry.tag for entry in list_checkpoints(folder)} for folder in folders]
    assert found == [{e.tag for e in savings}, {"step1", "step5"}, {"step3"}]
    assert_holds(folders[2] / "step3", 3, world_size=1)
    assert [len(each.superseded) for each in savings] == [0, 1, 1, 1, 0]
    assert saver.router.costs._saves == {0: 5, 1: 2, 2: 1}, "what is left out costs nothing"


def test_an_auto_level_that_missed_a_checkpoint_gets_the_next(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    slow.write_text("not a folder")
    entries = [{"path": str(fast)}, {"path": str(slow), "every": "auto"}]
    with savers(1, tiers=entries) as (saver,):
        saver.router.costs.end(1, 1000.0)
        save([saver], slow, 1)
        assert wait_all([saver]) == [False]
        slow.unlink()
        for step in (2, 3):
            save([saver], slow, step)
            assert wait_all([saver]) == [True]
    assert [e.tag for e in list_checkpoints(slow)] == ["step2"]


def test_no_thread_and_no_file_is_left(tmp_path: Path) -> None:
    def once() -> None:
        with savers(2, tiers=tiers(tmp_path / "a", tmp_path / "b")) as all_savers:
            save(all_savers, tmp_path / "b", 1)
            wait_all(all_savers)

    once()
    threads, files = threading.active_count(), open_files()
    once()
    assert threading.active_count() == threads
    assert open_files() <= files


def test_two_hundred_checkpoints_leave_nothing_behind(tmp_path: Path) -> None:
    states = [{f"t{i}": torch.zeros(1 << 13) for i in range(32)}]  # 1 MiB
    with savers(1, keep=2) as (saver,):

        def save_until(last: int) -> tuple[int, int, int]:
            for step in range(saver._count + 1, last + 1):
                save([saver], tmp_path, step, states=states)
                assert saver.wait(Stage.DRAINED, EVER)
            return resident_bytes(), open_files(), threading.active_count()

        memory, files, threads = save_until(80)  # caches fill up, the history is at its limit
        later_memory, later_files, later_threads = save_until(280)
        assert later_threads == threads
        assert later_files < files + 20, "one of each save would be 200; some may be in use now"
        assert later_memory - memory < 20 << 20, "a tenth of what was saved would show"
    assert [e.tag for e in list_checkpoints(tmp_path)] == ["step280", "step279"]


def test_a_lower_level_that_stands_still_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The writer is held back by a rate; nobody who waits for it knows, so it is a disk that hangs.
    monkeypatch.setattr(Level, "pace_s", 0.0)
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    entries = [{"path": str(fast)}, {"path": str(slow), "bytes_per_s": 1.0}]
    with savers(2, tiers=entries, stall_timeout_s=2.0) as all_savers:
        savings = []
        for step in (1, 2, 3):
            savings.append(save(all_savers, slow, step)[0])
            on_all([saver.wait_captured for saver in all_savers])
            assert all(saver.wait(Stage.COMMITTED, EVER) for saver in all_savers)
            assert not savings[-1].has_ended, "it is still on its way to the slow level"
        assert wait_all(all_savers) == [False, False]
        for saver in all_savers:
            assert saver.last_error is not None
            assert "slow" in str(saver.last_error)
        assert savings[0].stage is Stage.COMMITTED
        assert "no byte" in str(savings[0].error)
    assert [e.tag for e in list_checkpoints(fast)] == ["step3", "step2", "step1"]
    assert [e.state for e in list_checkpoints(slow) if e.is_published] == []


def test_a_level_that_does_not_answer_keeps_neither_the_save_nor_the_next_level(
    tmp_path: Path, monkeypatch: Any
) -> None:
    # As system calls on a hanging file system: they come back when it does, and cannot be ended.
    fast, slow, answers = tmp_path / "fast", tmp_path / "slow", threading.Event()

    def hangs_on_fast(work: Any) -> Any:
        def hanging(path: Path, *args: Any, **kwargs: Any) -> None:
            if fast in path.parents and not answers.wait(EVER):
                raise AssertionError(f"{path} was waited for")
            work(path, *args, **kwargs)

        return hanging

    monkeypatch.setattr(saver_module, "make_part_folder", hangs_on_fast(make_part_folder))
    monkeypatch.setattr(commit, "remove", hangs_on_fast(remove))
    tiers = [{"path": str(fast)}, {"path": str(slow)}]
    with savers(2, tiers=tiers, max_wait_s=0.2, stall_timeout_s=3.0) as all_savers:
        try:
            lost = save(all_savers, slow, 1)
            assert wait_all(all_savers) == [False, False]
            assert "no answer within 0.2 s: the storage hangs" in str(lost[1].error)
            save(all_savers, slow, 2)
            assert wait_all(all_savers) == [True, True]
            assert_holds(slow / "step2", 2)
            assert not (fast / "step2").exists()
        finally:
            answers.set()
        for thread in threading.enumerate():
            if thread.name == "lowtide-checkpoint-errand":
                thread.join(EVER)
        save(all_savers, slow, 3)
        assert wait_all(all_savers) == [True, True]
        assert_holds(fast / "step3", 3)


def test_a_failed_save_beside_the_levels_leaves_no_level_out(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    (tmp_path / "file").write_text("no folder")
    tiers = [{"path": str(fast)}, {"path": str(slow)}]
    with savers(2, tiers=tiers) as all_savers:
        save(all_savers, tmp_path / "file", 1)
        assert wait_all(all_savers) == [False, False]
        save(all_savers, slow, 2)
        assert wait_all(all_savers) == [True, True]
    assert_holds(fast / "step2", 2)


def test_scripts_that_a_killed_run_was_copying_are_removed(tmp_path: Path) -> None:
    for name, age_s in ((".scripts.01234567", 3600.0), (".scripts.89abcdef", 0.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "zero_to_fp32.py").write_text("half of i")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    with savers(1) as all_savers:
        save(all_savers, tmp_path, 1)
        assert wait_all(all_savers) == [True]
    assert hidden(tmp_path) == {".scripts.89abcdef"}  # that may be this run's own


def test_tags_with_slashes_are_kept_and_cleaned_up_beside_each_other(tmp_path: Path) -> None:
    for run in ("run1", "run2"):
        make_part(tmp_path / run, 9, pid=2**22 + 1)
    with savers(2, keep=2) as all_savers:
        for step in range(1, 5):
            for tag in (f"step{step}", f"run1/step{step}"):
                save(all_savers, tmp_path, step, tag=tag)
                assert wait_all(all_savers) == [True, True]
    assert [entry.tag for entry in list_checkpoints(tmp_path, below=True)] == [
        "run2/global_step9",  # another job's: that will clean up there
        "run1/step4",
        "step4",
        "run1/step3",
        "step3",
    ]


def test_nothing_is_removed_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "link").symlink_to(tmp_path / "elsewhere")
    with savers(2, keep=1) as all_savers:
        for step in range(1, 4):
            save(all_savers, tmp_path / "checkpoints", step, tag=f"link/step{step}")
            assert wait_all(all_savers) == [True, True]
    assert len(list_checkpoints(tmp_path / "elsewhere")) == 3


def test_a_rate_that_is_allowed_is_no_hang(tmp_path: Path) -> None:
    entries = [{"path": str(tmp_path), "bytes_per_s": 8 * MIB}]  # a chunk in half a second
    with savers(1, tiers=entries, stall_timeout_s=0.1) as (saver,):
        saver.begin(tmp_path, "step1", step=1, details=DETAILS)
        for name, chunks in (("first.pt", 2), ("behind.pt", 1)):
            state = {"weights": torch.zeros(chunks * MIB - 4096)}
            saver.add(state, name, is_stable=lambda _: True)
        saver.end()
        saver.save_file({"step": 1}, tmp_path / "alone.pt")  # behind both
        assert saver.wait(Stage.DRAINED, EVER), saver.last_error
    assert verify(tmp_path / "step1").is_ok
    assert torch.load(tmp_path / "alone.pt") == {"step": 1}


def test_nor_on_the_way_down(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    entries = [{"path": str(fast)}, {"path": str(slow), "bytes_per_s": 8 * MIB}]
    with savers(1, tiers=entries, stall_timeout_s=0.1) as (saver,):
        save([saver], slow, 1, states=[{"weights": torch.zeros(MIB - 4096)}])
        assert saver.wait(Stage.DRAINED, EVER), saver.last_error
    assert verify(slow / "step1").is_ok
