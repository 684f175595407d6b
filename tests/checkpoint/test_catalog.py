"""`list_checkpoints`: what lies in a folder and in which state it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path, PurePath

import pytest

from lowtide.checkpoint import list_checkpoints
from lowtide.checkpoint.store import catalog, processes
from lowtide.checkpoint.store.catalog import Entry, is_checkpoint
from lowtide.core.errors import CheckpointError
from tests.helpers.checkpoints import ATTEMPT, make_checkpoint, make_part, make_stock


def _states(folder: Path, **options: float) -> dict[str, str]:
    return {entry.path.name: entry.state for entry in list_checkpoints(folder, **options)}


def _age(folder: Path, seconds: float) -> None:
    at = time.time() - seconds
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (at, at))


@pytest.fixture
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_process_whose_first_thread_has_ended_may_still_write(tmp_path: Path) -> None:
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        end_s = time.monotonic() + 60.0
        while processes.state_and_start(process.pid)[0] != "Z" and time.monotonic() < end_s:
            time.sleep(0.01)
        assert processes.state_and_start(process.pid)[0] == "Z"
        assert processes.is_running(process.pid, since_s=time.time())
    finally:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not processes.is_running(process.pid, since_s=time.time())
        process.wait()


def test_a_zombie_writes_no_more(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1)
    make_part(tmp_path, 1, pid=child.pid, time_s=time.time())
    assert list(_states(tmp_path).values()) == ["in progress"]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended; nobody has asked how
    assert list(_states(tmp_path).values()) == ["abandoned"]
    child.communicate()


def test_entries_say_what_is_known(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 9)
    (tmp_path / "latest").write_text("global_step9\n")
    (entry,) = list_checkpoints(str(tmp_path))
    files = [p for p in path.rglob("*") if p.is_file()]
    assert entry == Entry(
        tag="global_step9",
        path=path,
        state="complete",
        step=9,
        time_s=json.loads((path / "lowtide.json").read_text())["time_s"],
        size_bytes=sum(p.stat().st_size for p in files),
        files=len(files),
        world_size=2,
        is_latest=True,
    )
    assert entry.is_published
    assert json.loads(json.dumps(entry.as_dict()))["path"] == str(path)


def test_newest_step_comes_first(tmp_path: Path) -> None:
    for step in (9, 100, 10):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 50, name="best")
    make_stock(tmp_path, 60)
    tags = [entry.tag for entry in list_checkpoints(tmp_path)]
    assert tags == ["global_step100", "global_step60", "best", "global_step10", "global_step9"]
    (tmp_path / "latest").write_text("global_step10")
    assert [e.tag for e in list_checkpoints(tmp_path) if e.is_latest] == ["global_step10"]


def test_each_state_is_told_from_the_others(tmp_path: Path, dead_pid: int) -> None:
    now_s = time.time()
    make_checkpoint(tmp_path, 1)
    make_stock(tmp_path, 2)
    (make_checkpoint(tmp_path, 3) / "mp_rank_00_model_states.pt").unlink()
    os.truncate(make_checkpoint(tmp_path, 4) / "mp_rank_00_model_states.pt", 100)
    (make_checkpoint(tmp_path, 5) / "lowtide.json").unlink()
    (make_checkpoint(tmp_path, 6) / "lowtide.json").write_text("{")
    (make_checkpoint(tmp_path, 7) / "manifest-00001.json").unlink()
    make_part(tmp_path, 8, time_s=now_s)
    make_part(tmp_path, 9, pid=dead_pid, time_s=now_s)
    make_checkpoint(tmp_path, 10).rename(tmp_path / f".global_step10.{ATTEMPT}.part")
    make_checkpoint(tmp_path, 11).rename(tmp_path / ".global_step11.0123abcd.trash")
    (tmp_path / "logs").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "zero_to_fp32.py").touch()
    assert _states(tmp_path) == {
        "global_step1": "complete",
        "global_step2": "unverified",
        "global_step3": "incomplete",
        "global_step4": "incomplete",
        "global_step5": "incomplete",
        "global_step6": "incomplete",
        "global_step7": "incomplete",
        f".global_step8.{ATTEMPT}.part": "in progress",
        f".global_step9.{ATTEMPT}.part": "abandoned",
        f".global_step10.{ATTEMPT}.part": "complete",
        ".global_step11.0123abcd.trash": "trash",
    }
    by_step = {entry.step: entry for entry in list_checkpoints(tmp_path)}
    assert (by_step[10].tag, by_step[10].is_published) == ("global_step10", False)
    assert (by_step[8].tag, by_step[8].world_size) == ("global_step8", None)


def test_owner_elsewhere_is_judged_by_age(tmp_path: Path, dead_pid: int) -> None:
    now_s = time.time()
    part = make_part(tmp_path, 1, host="elsewhere", pid=dead_pid, time_s=now_s)
    unsigned = make_part(tmp_path, 2)
    (unsigned / "owner.json").write_text("{")
    assert set(_states(tmp_path).values()) == {"in progress"}
    for path in (part, unsigned):
        _age(path, 100)
    assert set(_states(tmp_path).values()) == {"in progress"}
    assert set(_states(tmp_path, max_age_s=90).values()) == {"abandoned"}
    os.utime(part / "mp_rank_00_model_states.pt")  # one file is still written to
    assert _states(tmp_path, max_age_s=90)[part.name] == "in progress"


def test_process_that_took_over_a_dead_owners_number_is_another(tmp_path: Path) -> None:
    mine = make_part(tmp_path, 1, time_s=time.time())
    assert _states(tmp_path) == {mine.name: "in progress"}
    make_part(tmp_path, 1, time_s=time.time() - 30 * 86400)  # this process is younger
    assert _states(tmp_path) == {mine.name: "abandoned"}


@pytest.mark.parametrize("pid", [-1, 2**40])
def test_number_that_is_no_process_is_dead(tmp_path: Path, pid: int) -> None:
    part = make_part(tmp_path, 1, pid=pid, time_s=time.time())
    assert _states(tmp_path) == {part.name: "abandoned"}


def test_start_of_this_process_is_known() -> None:
    state, started_s = processes.state_and_start(os.getpid())
    assert state == "R"
    assert started_s is not None
    assert started_s < time.time() + 1
    assert processes.state_and_start(2**30) == ("", None)


def test_unreadable_latest_is_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    (tmp_path / "latest").write_bytes(b"\xff")
    assert not list_checkpoints(tmp_path)[0].is_latest


def test_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: cannot be listed \(No such file"):
        list_checkpoints(tmp_path / "gone")


def test_checkpoint_is_told_from_a_folder_of_them(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    assert is_checkpoint(path)
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "gone")
    assert not is_checkpoint(path / "lowtide.json")


def make_tagged(folder: Path, step: int, tag: str) -> Path:
    return make_checkpoint(folder, step, name=tag, tag=tag, ranks=1)


def test_tags_with_slashes_are_seen_below(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for step, tag in ((1, "a"), (2, "run/step2"), (3, "run/long/step3"), (4, "1/2/3/4/step4")):
        make_tagged(folder, step, tag)
    make_tagged(folder, 5, "1/2/3/4/5/step5")  # deeper than it is looked
    make_tagged(folder, 6, "run/.hidden/step6")
    make_tagged(folder, 7, "a/inside/step7")  # below a checkpoint
    make_tagged(elsewhere, 8, "step8")
    (folder / "link").symlink_to(elsewhere)
    make_part(folder / "run", 9)
    (folder / "latest").write_text("run/step2")
    assert [entry.tag for entry in list_checkpoints(folder)] == ["a"]
    entries = list_checkpoints(folder, below=True)
    tags = [entry.tag for entry in entries]
    assert tags == ["run/global_step9", "1/2/3/4/step4", "run/long/step3", "run/step2", "a"]
    assert [entry.is_published for entry in entries] == [False, True, True, True, True]
    assert [entry.tag for entry in entries if entry.is_latest] == ["run/step2"]
    assert entries[3].path == folder / "run" / "step2"
    assert PurePath("link") not in catalog._places_below(folder, PurePath())


def test_only_so_many_folders_are_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalog, "_MOST_FOLDERS", 3)
    for number in range(3):
        make_tagged(tmp_path, number, f"run{number}/step")
    assert len(list_checkpoints(tmp_path, below=True)) == 3
    assert caplog.text == ""
    make_tagged(tmp_path, 3, "run3/step")
    assert len(list_checkpoints(tmp_path, below=True)) == 3
    assert "more than 3 folders below it" in caplog.text


@pytest.mark.parametrize("place", ["..", "a/../..", "/", "link", "link/below"])
def test_no_place_leads_out_of_the_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "out" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a folder below"):
        catalog.list_place(tmp_path / "folder", PurePath(place))
