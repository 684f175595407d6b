"""Which checkpoint a start goes on from, and how a stop is asked for, agreed and written down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowtide.core import restart
from lowtide.core.config import StopConfig
from lowtide.core.errors import CheckpointError

# ---- checkpoints


def _checkpoint(folder: Path, step: int, *, recorded: bool, ranks: int = 2) -> Path:
    path = folder / f"global_step{step}"
    path.mkdir(parents=True)
    for rank in range(ranks):
        for kind in ("optim", "model"):
            name = f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
            torch.save({"x": torch.arange(1000)}, path / name)
    if recorded:
        restart.write_record(path, step=step, world_size=ranks, config={"telemetry": {}})
    return path


def _flip_byte(raw: bytes) -> bytes:
    place = raw.index(torch.arange(1000).numpy().tobytes()) + 4000
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


PART = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize("recorded", [True, False])
def test_newest_complete_checkpoint_is_chosen(tmp_path: Path, recorded: bool) -> None:
    for step in (10, 9, 100):  # by number, not by name
        _checkpoint(tmp_path, step, recorded=recorded)
    choice = restart.choose(tmp_path, world_size=2)
    assert (choice.tag, choice.step, choice.skipped) == ("global_step100", 100, [])
    assert restart.choose(tmp_path / "missing").tag is None


@pytest.mark.parametrize(
    ("recorded", "damage", "message"),
    [
        (True, lambda p: (p / PART).unlink(), "cannot be read"),
        (True, lambda p: (p / PART).write_bytes(b""), "has 0 bytes"),
        (True, lambda p: os.truncate(p / PART, 3000), "has 3000 bytes"),
        (True, lambda p: (p / PART).write_bytes(bytes((p / PART).stat().st_size)), "no longer"),
        (False, lambda p: (p / PART).unlink(), "1 of 2 optimizer parts"),
        (False, lambda p: os.truncate(p / PART, 3000), "cannot be read"),
        (False, lambda p: (p / PART).write_bytes(_flip_byte((p / PART).read_bytes())), "checksum"),
        (False, lambda p: [x.unlink() for x in p.glob("*model*")], "no model part"),
    ],
)
def test_damaged_checkpoint_is_passed_over(
    tmp_path: Path, recorded: bool, damage: Callable[[Path], object], message: str
) -> None:
    _checkpoint(tmp_path, 10, recorded=recorded)
    damage(_checkpoint(tmp_path, 20, recorded=recorded))
    choice = restart.choose(tmp_path, world_size=2)
    assert choice.tag == "global_step10"
    assert len(choice.skipped) == 1
    assert message in choice.skipped[0]


def test_checkpoint_of_other_ranks_is_left_to_the_host(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 10, recorded=True, ranks=4)
    assert restart.choose(tmp_path, world_size=2).step == 10  # DeepSpeed says itself what it lacks


def test_overwritten_checkpoint_has_no_record_meanwhile(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 10, recorded=True)
    restart.forget_record(path)
    (path / PART).unlink()
    assert "1 of 2 optimizer parts" in restart.choose(tmp_path, world_size=2).skipped[0]


def test_other_file_formats_are_complete_too(tmp_path: Path) -> None:
    path = tmp_path / "global_step3"
    path.mkdir()
    torch.save({"x": 1}, path / "mp_rank_00_model_states.pt", _use_new_zipfile_serialization=False)
    restart.write_record(path, step=3, world_size=1, config={}, client_keys=["epoch"])
    assert restart.choose(tmp_path, world_size=1).step == 3
    record = restart.read_record(path)
    assert record is not None
    assert record["client_keys"] == ["epoch"]


def test_half_written_record_is_no_record(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 10, recorded=True)
    whole = (path / restart.RECORD_FILE).read_text()
    for cut in range(0, len(whole) - 2, 7):
        (path / restart.RECORD_FILE).write_text(whole[:cut])
        assert restart.find_damage(path, world_size=2) is None  # read from end to end instead
        (path / PART).rename(path / "away")
        assert "1 of 2" in (restart.find_damage(path, world_size=2) or "")
        (path / "away").rename(path / PART)


def test_record_has_a_checksum_of_its_contents(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 10, recorded=True)
    written = json.loads((path / restart.RECORD_FILE).read_text())
    body = {name: value for name, value in written.items() if name != "checksum"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    assert written["checksum"] == zlib.crc32(text.encode())
    assert restart.read_record(path) == written
    for old, new in (('"step": 10', '"step": 11'), ('"world_size": 2', '"world_size": 3')):
        changed = json.dumps(written).replace(old, new)
        assert changed != json.dumps(written)
        (path / restart.RECORD_FILE).write_text(changed)
        assert restart.read_record(path) is None


def test_record_of_an_older_version_is_whole_without_a_checksum(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 10, recorded=True)
    record = json.loads((path / restart.RECORD_FILE).read_text())
    del record["checksum"]
    (path / restart.RECORD_FILE).write_text(json.dumps(record))
    assert restart.read_record(path) == record
    for lost in ("checksun", "attempt"):  # it had one, or is too new to have none
        (path / restart.RECORD_FILE).write_text(json.dumps({**record, lost: 1}))
        assert restart.read_record(path) is None


def test_checksum_is_that_of_what_is_read_back(tmp_path: Path) -> None:
    value = {"b": {10: "ten", 9: (1.5, "é")}, "a": None}  # JSON knows neither tuple nor integer key
    raw = restart.write_durable(tmp_path / "x.json", value, has_checksum=True)
    assert (tmp_path / "x.json").read_bytes() == raw
    read = json.loads(raw)
    assert restart.has_right_checksum(read)
    assert read["checksum"] == restart.json_checksum(value) == restart.json_checksum(read)
    for wrong in (None, True, float(read["checksum"]), read["checksum"] + 1):
        assert not restart.has_right_checksum({**read, "checksum": wrong})


def test_writer_that_knows_its_files_says_so(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 10, recorded=False)
    sizes = {name.name: name.stat().st_size for name in path.iterdir()}
    (path / "manifest-00000.json").write_text("{}")
    restart.write_record(
        path, step=10, world_size=2, config={}, files=sizes, attempt="0f" * 8, tag="global_step10",
        manifests={"manifest-00000.json": {"size_bytes": 2, "crc32": 1}},
    )  # fmt: skip
    record = restart.read_record(path)
    assert record is not None
    assert record["files"][PART] == {"size_bytes": sizes[PART], "is_zip": True}
    assert (record["attempt"], record["tag"]) == ("0f" * 8, "global_step10")
    assert restart.find_damage(path) is None
    (path / "manifest-00000.json").write_text("{} ")
    assert restart.find_damage(path) == "manifest-00000.json has 3 bytes, 2 were written"


def test_hidden_folder_counts_only_with_a_whole_record(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 10, recorded=True)
    hidden = tmp_path / ".global_step20.0123456789abcdef.part"
    _checkpoint(tmp_path, 20, recorded=True).rename(hidden)
    assert restart.choose(tmp_path).tag == hidden.name
    restart.forget_record(hidden)
    assert restart.choose(tmp_path).tag == "global_step10"
    hidden.rename(tmp_path / ".global_step20")  # looks like stock DeepSpeed's, but for the dot
    assert restart.choose(tmp_path) == restart.Choice(tag="global_step10", step=10)
    trash = tmp_path / ".global_step30.01234567.trash"
    _checkpoint(tmp_path, 30, recorded=True).rename(trash)
    assert restart.choose(tmp_path) == restart.Choice(tag="global_step10", step=10)


def test_choice_follows_the_check_it_is_given(tmp_path: Path) -> None:
    for step in (10, 20):
        _checkpoint(tmp_path, step, recorded=True)
    asked = []

    def refuse_20(checkpoint: Path, *, world_size: int | None = None) -> str | None:
        asked.append((checkpoint.name, world_size))
        return "it is cursed" if checkpoint.name.endswith("20") else None

    choice = restart.choose(tmp_path, world_size=3, find_damage=refuse_20)
    assert choice.skipped == ["checkpoint global_step20 is not used: it is cursed"]
    assert choice.tag == "global_step10"
    assert asked == [("global_step20", 3), ("global_step10", 3)]


def test_flipped_header_bits_of_an_unrecorded_part_are_damage_and_no_crash(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, 10, recorded=False)
    whole = (path / PART).read_bytes()
    place = whole.index(b"PK\x01\x02") + 8  # flags: "encrypted", which raises RuntimeError
    (path / PART).write_bytes(whole[:place] + bytes([whole[place] | 1]) + whole[place + 1 :])
    assert f"{PART} cannot be read" in (restart.find_damage(path) or "")


# ---- stop


def _control(tmp_path: Path, **settings: object) -> restart.StopControl:
    return restart.StopControl(StopConfig(run_dir=str(tmp_path), then="tell", **settings))


def _send(number: int, *stops: restart.StopControl) -> None:
    """Signal this process and wait until it has been heard."""
    os.kill(os.getpid(), number)
    deadline_s = time.monotonic() + 5
    while not all(stop._wish for stop in stops) and time.monotonic() < deadline_s:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "reason", "wants_restart"),
    [
        (signal.SIGUSR1, "time_limit", True),
        (signal.SIGTERM, "preempted", True),
        (signal.SIGINT, "interrupted", False),
    ],
)
def test_signal_becomes_a_stop_and_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str, wants_restart: bool
) -> None:
    monkeypatch.setenv(restart.ATTEMPT_VARIABLE, "7.2")
    before = signal.getsignal(number)
    stop = _control(tmp_path, signals=("USR1", "TERM", "INT"))
    stop.listen()
    assert not stop.poll(1)
    _send(number, stop)
    assert not stop.requested  # nothing happens before the step is over
    assert stop.poll(2)
    assert not stop.poll(3)  # said once
    assert restart.read_stop(tmp_path) is None
    stop.saved(2, "ckpt/step-2")
    record = restart.read_stop(tmp_path)
    assert record is not None
    assert (record.reason, record.step, record.checkpoint) == (reason, 2, "ckpt/step-2")
    assert (record.attempt, record.wants_restart) == ("7.2", wants_restart)
    assert abs(record.time_s - time.time()) < 60
    stop.finish(2)
    assert signal.getsignal(number) == before


def test_stop_without_a_save_names_the_last_one(tmp_path: Path) -> None:
    stop = _control(tmp_path)
    stop.saved(5, "ckpt/step-5")
    stop.request()
    assert stop.poll(9)
    stop.finish(9)
    record = restart.read_stop(tmp_path)
    assert record is not None
    assert (record.reason, record.step, record.checkpoint) == ("requested", 9, "ckpt/step-5")


def test_run_that_ends_by_itself_leaves_no_record(tmp_path: Path) -> None:
    (tmp_path / restart.STOP_FILE).write_text("{}")  # of an earlier start
    stop = _control(tmp_path)
    stop.listen()
    assert not (tmp_path / restart.STOP_FILE).exists()
    stop.saved(5, "ckpt/step-5")
    stop.finish(5)
    assert not (tmp_path / restart.STOP_FILE).exists()


def test_first_signal_gives_the_reason(tmp_path: Path) -> None:
    stop = _control(tmp_path, signals=("INT", "TERM"))
    stop.listen()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # what torchrun sends after Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)  # the second one means now
    assert stop.poll(1)
    assert stop.reason == "interrupted"
    stop.finish(1)
    again = _control(tmp_path, signals=("INT",))  # the next run of this process counts anew
    again.listen()
    _send(signal.SIGINT, again)
    assert again.poll(1)
    again.finish(1)


def test_ranks_agree_only_where_it_is_due(tmp_path: Path) -> None:
    stop = _control(tmp_path, every_n_steps=4)
    stop.request()
    assert [stop.poll(step) for step in range(1, 5)] == [False, False, False, True]


def test_forked_child_dies_of_sigterm_as_before(tmp_path: Path) -> None:
    stop = _control(tmp_path)
    stop.listen()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    os.kill(child, signal.SIGUSR1)  # no reason to die for a data loader
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert not stop.poll(1)
    stop.finish(1)


def test_children_that_replace_themselves_survive_the_warning(tmp_path: Path) -> None:
    threads, stop = threading.active_count(), _control(tmp_path)
    stop.listen()
    child = subprocess.Popen(["sleep", "30"])  # a spawned data loader, a compiler, a logger
    try:
        child.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        assert child.poll() is None
        _send(signal.SIGUSR1, stop)  # while this process hears it
        assert stop.poll(1)
    finally:
        child.kill()
        child.wait()
    stop.finish(1)
    assert threading.active_count() == threads
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_every_engine_of_a_process_hears_the_signal(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    first, second = _control(tmp_path / "a"), _control(tmp_path / "b")
    first.listen()
    second.listen()
    _send(signal.SIGTERM, first, second)
    assert first.poll(1)
    assert second.poll(1)
    first.finish(1)
    assert signal.getsignal(signal.SIGTERM) != before  # the second still listens
    second.finish(1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_launchers_folder_comes_before_the_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(restart.RUN_DIR_VARIABLE, str(tmp_path / "launcher"))
    assert _control(tmp_path).run_dir == tmp_path / "launcher"


def test_unreadable_stop_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    for text in ("{", "[]", json.dumps({"reason": "done"})):
        (tmp_path / restart.STOP_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=r"stop\.json: cannot be read"):
            restart.read_stop(tmp_path)
