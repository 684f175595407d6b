"""Removing checkpoints: what goes, what never goes, and that any moment is a good one to die."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import pytest

from lowtide.checkpoint import list_checkpoints, verify
from lowtide.checkpoint.store.integrity import find_damage
from lowtide.checkpoint.store.retention import finish_published, prune, remove_abandoned
from lowtide.core import restart
from lowtide.core.errors import CheckpointError
from tests.helpers.checkpoints import ATTEMPT, make_checkpoint, make_part, make_stock

CALLS = ("rename", "unlink", "rmdir", "fsync")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _steps(folder: Path) -> list[int | None]:
    return [entry.step for entry in list_checkpoints(folder)]


def _as_part(path: Path, attempt: str = ATTEMPT) -> Path:
    return path.rename(path.with_name(f".{path.name}.{attempt}.part"))


# ---- prune


def test_newest_and_milestones_stay(tmp_path: Path) -> None:
    for step in (10, 20, 25, 30, 40, 50):
        make_checkpoint(tmp_path, step)
    done = prune(tmp_path, keep=2, keep_every=20)
    assert [entry.step for entry in done.removed] == [30, 25, 10]
    assert [entry.step for entry in done.kept] == [50, 40, 20]
    assert _steps(tmp_path) == [50, 40, 20]
    assert done.removed_bytes == sum(entry.size_bytes for entry in done.removed)
    assert all(verify(entry.path).is_ok for entry in done.kept)
    assert prune(tmp_path, keep=2, keep_every=20).removed == []


def test_dry_run_says_the_same_and_changes_nothing(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    (tmp_path / ".global_step5.0123abcd.trash").mkdir()
    before = sorted(tmp_path.rglob("*"))
    planned = prune(tmp_path, keep=1, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert prune(tmp_path, keep=1) == planned


def test_what_is_named_foreign_or_unfinished_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        make_checkpoint(tmp_path, step)
    stock = make_stock(tmp_path, 4)
    (tmp_path / "latest").write_text("global_step2")
    broken = make_checkpoint(tmp_path, 5)
    (broken / "mp_rank_00_model_states.pt").unlink()
    part = make_part(tmp_path, 6, pid=2**40)
    hidden = _as_part(make_checkpoint(tmp_path, 7))
    target = make_checkpoint(tmp_path / "elsewhere", 8)
    (tmp_path / "global_step8").symlink_to(target)
    done = prune(tmp_path, keep=1, protect=("global_step3",))
    assert [entry.step for entry in done.removed] == [1]
    assert {
        *(stock.name, broken.name, part.name, hidden.name),
        *("global_step2", "global_step3", "global_step8", "global_step9"),
    } <= _names(tmp_path)
    assert verify(target).is_ok


def test_newest_complete_one_stays_though_newer_ones_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    (tmp_path / "global_step3" / "lowtide.json").unlink()
    prune(tmp_path, keep=1)
    assert _names(tmp_path) == {"global_step2", "global_step3"}


def test_old_trash_goes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    trash = make_checkpoint(tmp_path, 1).rename(tmp_path / ".global_step1.0123abcd.trash")
    (trash / "link").symlink_to(tmp_path)
    assert prune(tmp_path, keep=1).removed_bytes > 0
    assert _names(tmp_path) == {"global_step2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep: got 0, allowed is 1 or more"),
        ({"keep": 1, "keep_every": 0}, "keep_every: got 0, allowed is 1 or more"),
    ],
)
def test_wrong_numbers_are_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        prune(tmp_path, **options)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        prune(tmp_path / "gone", keep=1)


def test_failure_is_an_error_that_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"global_step1: cannot be renamed or removed \(Perm"):
        prune(tmp_path, keep=1)
    assert find_damage(tmp_path / "global_step1") is None


def test_two_at_once_do_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        make_checkpoint(tmp_path, step)
    real = os.rename

    def late(source: Path, target: Path) -> None:  # the other process was faster
        shutil.rmtree(source)
        real(source, target)

    monkeypatch.setattr(os, "rename", late)
    prune(tmp_path, keep=1)
    assert _names(tmp_path) == {"global_step2"}


# ---- what killed runs left


def test_only_abandoned_parts_are_removed(tmp_path: Path) -> None:
    gone = make_part(tmp_path, 1, pid=2**40, time_s=time.time())
    live = make_part(tmp_path, 2, time_s=time.time())
    far = make_part(tmp_path, 3, host="elsewhere", time_s=time.time())
    hidden = _as_part(make_checkpoint(tmp_path, 4))
    (hidden / "owner.json").write_text((gone / "owner.json").read_text())
    make_checkpoint(tmp_path, 5)
    assert remove_abandoned(tmp_path) == [gone]
    assert _names(tmp_path) == {live.name, far.name, hidden.name, "global_step5"}
    assert remove_abandoned(tmp_path, max_age_s=-1) == [far]


def test_finished_checkpoint_gets_its_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    hidden = _as_part(make_checkpoint(tmp_path, 2))
    assert restart.choose(tmp_path, find_damage=find_damage).tag == hidden.name
    assert finish_published(tmp_path) == ["global_step2"]
    assert _names(tmp_path) == {"global_step1", "global_step2"}
    assert restart.choose(tmp_path, find_damage=find_damage).tag == "global_step2"
    assert finish_published(tmp_path) == []


def _named(folder: Path, step: int, time_s: float, *, is_part: bool) -> Path:
    """Make the checkpoint "last" of a step and a time."""
    path = make_checkpoint(folder, step, name="last")
    record = restart.read_record(path)
    assert record is not None
    record["time_s"] = time_s
    restart.write_durable(path / restart.RECORD_FILE, record, has_checksum=True)
    return _as_part(path) if is_part else path


@pytest.mark.parametrize(
    ("part", "holder", "tags", "step"),
    [
        ((20, 2.0), (10, 1.0), ["last"], 20),  # it was about to take the place
        ((20, 2.0), (20, 1.0), ["last"], 20),  # the same step, saved again
        ((10, 1.0), (20, 2.0), [], 20),  # it was replaced: two names were exchanged
        ((10, 2.0), (20, 1.0), None, 20),  # a run that went back: both stay
    ],
)
def test_name_that_is_taken(
    tmp_path: Path,
    part: tuple[int, float],
    holder: tuple[int, float],
    tags: list[str] | None,
    step: int,
) -> None:
    hidden = _named(tmp_path, *part, is_part=True)
    _named(tmp_path, *holder, is_part=False)
    assert finish_published(tmp_path) == (tags or [])
    assert _names(tmp_path) == ({"last"} if tags is not None else {"last", hidden.name})
    record = restart.read_record(tmp_path / "last")
    assert record is not None
    assert record["step"] == step
    assert verify(tmp_path / "last").is_ok


def test_foreign_or_damaged_holder_of_the_name_stays(tmp_path: Path) -> None:
    for step in (1, 2):
        hidden = _as_part(make_checkpoint(tmp_path, step))
        assert hidden.is_dir()
    make_stock(tmp_path, 1)
    (make_checkpoint(tmp_path, 2) / "lowtide.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert finish_published(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoint_that_is_being_named_is_left_to_its_process(tmp_path: Path) -> None:
    hidden = _as_part(make_checkpoint(tmp_path, 1))
    owner = make_part(tmp_path, 2, time_s=time.time()) / "owner.json"
    (hidden / "owner.json").write_text(owner.read_text())
    assert finish_published(tmp_path) == []
    (hidden / "owner.json").unlink()
    assert finish_published(tmp_path) == ["global_step1"]


# ---- dying at any call


class _DiedError(BaseException):
    """Not an OSError: nothing may catch it."""


@contextmanager
def _dying(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[list[str]]:
    """Let the call number `at` of those that change something end the process, as it were."""
    calls: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if len(calls) == at:
                raise _DiedError
            calls.append(name)
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield calls


def _mixed(folder: Path) -> None:
    for step in (10, 20, 30, 40):
        make_checkpoint(folder, step)
    (folder / "latest").write_text("global_step30")
    make_part(folder, 50, pid=2**40, time_s=time.time())
    _named(folder, 8, 2.0, is_part=True)
    _named(folder, 7, 1.0, is_part=False)
    make_checkpoint(folder, 5).rename(folder / ".global_step5.0123abcd.trash")


def _all(folder: Path) -> None:
    finish_published(folder)
    remove_abandoned(folder)
    prune(folder, keep=1, protect=("last",))


def test_any_call_may_be_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    _mixed(model)
    shutil.copytree(model, tmp_path / "whole")
    _all(tmp_path / "whole")
    end = {"global_step30", "global_step40", "last", "latest"}
    assert _names(tmp_path / "whole") == end
    for at in range(200):
        folder = tmp_path / f"at{at}"
        shutil.copytree(model, folder)
        with _dying(monkeypatch, at) as calls:
            try:
                _all(folder)
            except _DiedError:
                assert len(calls) == at
            else:
                break
        assert restart.choose(folder, find_damage=find_damage).tag == "global_step40"
        latest = (folder / "latest").read_text()
        for entry in list_checkpoints(folder):
            if entry.is_published:  # what bears a name is whole
                assert entry.state == "complete"
                assert verify(entry.path, threads=1).is_ok
        assert latest in _names(folder)
        lasts = [
            e.step for e in list_checkpoints(folder) if e.tag == "last" and e.state == "complete"
        ]
        assert 8 in lasts  # under its name or still hidden
        _all(folder)
        assert _names(folder) == end
        shutil.rmtree(folder)
    assert at > 40


def test_rename_is_synced_before_anything_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    with _dying(monkeypatch, 10**6) as calls:
        prune(tmp_path, keep=1)
    assert calls[:3] == ["rename", "fsync", "unlink"]


# ---- tags with slashes


def test_each_folder_below_is_thinned_out_by_itself(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for step in range(1, 5):
        for tag in (f"step{step}", f"run1/step{step}", f"run2/step{step}"):
            make_checkpoint(folder, step, name=tag, tag=tag, ranks=1)
        make_checkpoint(folder, step, name=f"own/step{step}", ranks=1)  # saved to "own" itself
        make_checkpoint(elsewhere, step, name=f"step{step}", tag=f"link/step{step}", ranks=1)
    (folder / "link").symlink_to(elsewhere)
    (folder / "latest").write_text("run1/step1")
    make_checkpoint(folder, 1, name="run2/x").rename(folder / "run2" / ".x.0123abcd.trash")
    make_checkpoint(folder, 1, name="own/x").rename(folder / "own" / ".x.0123abcd.trash")
    planned = prune(folder, keep=2, dry_run=True, protect=["run2/step2"])
    done = prune(folder, keep=2, protect=["run2/step2"])
    assert done == planned
    assert _names(folder) == {"step3", "step4", "run1", "run2", "own", "link", "latest"}
    assert _names(folder / "run1") == {"step1", "step3", "step4"}
    assert _names(folder / "run2") == {"step2", "step3", "step4"}
    assert _names(folder / "own") == {*(f"step{step}" for step in range(1, 5)), ".x.0123abcd.trash"}
    assert _names(elsewhere) == {f"step{step}" for step in range(1, 5)}
    removed = [entry.tag for entry in done.removed]
    assert sorted(removed) == ["run1/step2", "run2/step1", "step1", "step2"]
    assert _names(tmp_path) == {"checkpoints", "elsewhere"}


def test_one_place_is_thinned_out_alone(tmp_path: Path) -> None:
    for step in range(1, 4):
        for tag in (f"step{step}", f"run1/step{step}"):
            make_checkpoint(tmp_path, step, name=tag, tag=tag, ranks=1)
    prune(tmp_path, keep=1, place=PurePath("run1"))
    assert _names(tmp_path) == {"step1", "step2", "step3", "run1"}
    assert _names(tmp_path / "run1") == {"step3"}
    prune(tmp_path, keep=2, place=PurePath())
    assert _names(tmp_path) == {"step2", "step3", "run1"}
    with pytest.raises(CheckpointError, match="is not a folder below"):
        prune(tmp_path / "run1", keep=1, place=PurePath(".."))
