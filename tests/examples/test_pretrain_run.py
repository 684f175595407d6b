"""The pretraining example as a user starts it: two ranks, killed, started again, finished."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowtide.checkpoint.store.catalog import read_latest
from tests.helpers.pretrain import EXAMPLE, arguments, losses, write_text
from tests.helpers.ranks import (
    environment,
    free_port,
    kill_group,
    run_command,
    run_ranks,
)

STEPS = 48
LIMIT_S = 150.0

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("source") / "text")


def _arguments(text: Path, run: Path, steps: int = STEPS) -> list[str]:
    return arguments(text, run, steps)


def _validation(run: Path) -> list[float]:
    lines = (run / "telemetry" / "rank0.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        r["value"] for r in map(json.loads, lines) if r.get("name") == "validation/bits_per_byte"
    ]


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    log = run_ranks(_arguments(text, run), timeout_s=LIMIT_S).check().logs[0]
    assert f"finished: {STEPS} steps" in log
    assert "xz -9" in log
    return run


@pytest.fixture
def started(text: Path, tmp_path: Path) -> Iterator[tuple[list[subprocess.Popen], Path]]:
    """Two ranks on their way, each in a process group of its own."""
    run = tmp_path / "run"
    shared = environment({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                          "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})  # fmt: skip
    ranks = []
    try:
        for rank in ("0", "1"):
            with (tmp_path / f"log{rank}").open("wb") as log:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *_arguments(text, run)],
                        env={**shared, "RANK": rank, "LOCAL_RANK": rank},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield ranks, run
    finally:
        for process in ranks:
            kill_group(process)
            process.wait()


def _committed(run: Path) -> list[str]:
    """Return the tags of checkpoints that were complete; others are passed over without a word."""
    return sorted(path.parent.name for path in (run / "checkpoints").glob("step-*/lowtide.json"))


def _wait_for_step(ranks: list[subprocess.Popen], run: Path, step: int) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        assert all(process.poll() is None for process in ranks), (run.parent / "log0").read_text()
        state = run / "run.json"
        if state.exists() and json.loads(state.read_text())["progress"]["step"] >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"step {step} was not reached\n{(run.parent / 'log0').read_text()}")


def test_run_goes_on_with_the_same_losses_after_kill(
    started: tuple[list[subprocess.Popen], Path], uninterrupted: Path, text: Path
) -> None:
    ranks, run = started
    _wait_for_step(ranks, run, 18)
    deadline_s = time.monotonic() + LIMIT_S
    folder = run / "checkpoints"
    # A checkpoint is written while training goes on, and "latest" names it a moment after it is
    # there: the kill may come between the two, and a start goes on from what "latest" names.
    while len([tag for tag in _committed(run) if tag <= (read_latest(folder) or "")]) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    for process in ranks:
        kill_group(process)
        process.wait()
    assert json.loads((run / "run.json").read_text())["progress"]["status"] == "running"
    # As if the kill had come while the newest checkpoint was being written.
    tags, latest = _committed(run), read_latest(folder)
    for tag in tags[tags.index(latest) :]:
        part = next((folder / tag).glob("*rank_1*optim_states.pt"))
        part.write_bytes(part.read_bytes()[:1000])
    log = run_ranks(_arguments(text, run), timeout_s=LIMIT_S).check().logs[0]
    assert f"{latest} is not used" in log
    assert f"resumed from {tags[tags.index(latest) - 1]}" in log
    assert losses(run) == losses(uninterrupted)  # exactly, at every step
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    assert _validation(run)[-1] == _validation(uninterrupted)[-1]


def test_stop_signal_saves_a_checkpoint(
    started: tuple[list[subprocess.Popen], Path],
) -> None:
    ranks, run = started
    _wait_for_step(ranks, run, 6)
    ranks[1].send_signal(signal.SIGINT)  # one rank hears it, all stop at the same step
    log = run.parent / "log0"
    assert [process.wait(timeout=60) for process in ranks] == [130, 130], log.read_text()
    state = json.loads((run / "run.json").read_text())["progress"]
    assert state["status"] == "stopped"
    assert 6 <= state["step"] < STEPS
    assert (run / "checkpoints" / f"step-{state['step']:06d}").is_dir()
    assert f"stopped at step {state['step']} (interrupted)" in log.read_text()
    record = json.loads((run / "stop.json").read_text())
    assert (record["step"], record["reason"]) == (state["step"], "interrupted")
    assert Path(record["checkpoint"]).name == f"step-{state['step']:06d}"
    assert "Traceback" not in log.read_text() + (run.parent / "log1").read_text()


def test_run_learns_and_leaves_report_and_two_checkpoints(uninterrupted: Path) -> None:
    bits = _validation(uninterrupted)
    assert bits[-1] < 0.8 * bits[0]
    assert "validation" in (uninterrupted / "report.html").read_text(encoding="utf-8")
    assert len(list((uninterrupted / "checkpoints").glob("step-*"))) == 2
    records = (uninterrupted / "telemetry" / "rank0.jsonl").read_text().splitlines()
    references = [r for r in map(json.loads, records) if r["kind"] == "reference"]
    assert [r["name"] for r in references] == ["xz -9"]
    assert json.loads(records[-1]) | {"time_s": 0} == {"kind": "end", "time_s": 0, "status": "done"}


def test_finished_run_says_so(uninterrupted: Path, text: Path) -> None:
    before = (uninterrupted / "run.json").read_bytes()
    result = run_ranks(_arguments(text, uninterrupted), timeout_s=LIMIT_S).check()
    assert "is finished: 48 steps" in result.logs[0]
    assert "--minutes" in result.logs[0]
    assert result.logs[1] == ""
    assert (uninterrupted / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data", "no/such/place"], "--data no/such/place: nothing there"),
        (["--config", "no/such.json"], "no/such.json does not exist"),
        (["--width", "33", "--data", "{text}"], "whole even number"),
        (["--vocabulary", "5"], "--vocabulary 5: at least 257"),
        (["--seed", "1", "--data", "{text}", "--run-dir", "{run}"], "was started with"),
    ],
)
def test_wrong_input_ends_every_rank_with_one_line(
    extra: list[str], message: str, text: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    places = {"text": text, "run": uninterrupted}
    argv = [str(EXAMPLE / "train.py"), "--run-dir", str(tmp_path / "run")]
    argv += [part.format(**places) for part in extra]
    result = run_ranks(argv, timeout_s=60)
    assert result.returncodes == [2, 2], result.log
    lines = result.logs[0].strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
    assert message in lines[-1]
    assert "Traceback" not in result.log
    assert "error" not in result.logs[1]


def test_launcher_names_the_cause(tmp_path: Path) -> None:
    script = [str(EXAMPLE / "train.py"), "--data", "no/such/place", "--run-dir", str(tmp_path)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = run_command([sys.executable, *launcher, *script], timeout_s=60)
    assert result.returncode != 0
    assert not result.is_timed_out
    assert "traceback : --data no/such/place: nothing there" in result.log


def test_planned_updates_of_the_main_job_give_the_losses_of_stock(
    text: Path, tmp_path: Path
) -> None:
    found = []
    for without in (None, "offload"):
        run = tmp_path / f"without {without}"
        argv = arguments(text, run, 12, torch_adam=False, without=without)
        run_ranks(argv, timeout_s=LIMIT_S).check()
        found.append((losses(run), _validation(run)))
    assert len(found[0][0]) == 12
    assert found[0] == found[1]
