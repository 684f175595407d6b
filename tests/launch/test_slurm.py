"""The launch scripts on a real Slurm: two nodes, warnings, preemption, dead nodes, crash loops."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lowtide.core.restart import read_stop
from lowtide.launch.attempts import read_attempts
from tests.helpers.slurm import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.dist, pytest.mark.timeout(180)]

WORKER = str(Path(__file__).with_name("tiny_worker.py"))
LIMIT_S = 90.0


def settings(run: Path, **more: str) -> dict[str, str]:
    """Return the environment in which a user submits; one task per rank starts fastest."""
    place = {"LOWTIDE_RUN_DIR": str(run), "LOWTIDE_PYTHON": sys.executable}
    return {**place, "LOWTIDE_MODE": "rank", **more}


def submit(slurm: Cluster, run: Path, *script: str, options: Any = (), **more: str) -> str:
    """Submit train.sbatch; its log is `run`.log."""
    env = settings(run, **more)
    given = ["--time=5", *options]
    return slurm.submit("train.sbatch", log_of(run), *script, options=given, **env)


def log_of(run: Path) -> Path:
    return run.with_suffix(".log")


def wait_for_step(slurm: Cluster, run: Path, step: int, *, rank: int = 0) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    path = run / f"rank{rank}.step"
    while time.monotonic() < deadline_s:
        if path.exists() and int(path.read_text() or 0) >= step:
            return
        time.sleep(0.1)
    pytest.fail(f"step {step} was not reached\n{slurm.evidence(log_of(run))}")


def begun(run: Path) -> list[int]:
    """Return at which steps rank 0 began, one per start."""
    return [int(s) for s in re.findall(r"rank 0 of .* begins at (\d+)", log_of(run).read_text())]


def test_two_node_job_has_its_ranks_on_both_nodes(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, WORKER, "plain", "2", "0.1", options=["--ntasks-per-node=2"],
                 LOWTIDE_NPROC="2")  # fmt: skip
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log_of(run))
    log = log_of(run).read_text()
    places = sorted(re.findall(r"(rank \d of 4 on n\d), pid \d+, (meets at [\d.]+)", log))
    nodes = ["n1", "n1", "n2", "n2"]
    assert places == [(f"rank {r} of 4 on {n}", "meets at 127.0.0.1") for r, n in enumerate(nodes)]
    assert "preflight: 2 node(s) ready" in log
    assert f"start {job}.0 on 2 node(s), 4 rank(s): starts at step 0" in log
    assert "finish: the job has reached its end" in log


def test_warning_before_the_limit_saves_requeues_and_goes_on(
    slurm: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # 30 s of work and a minute per start, of which Slurm's warning leaves less than half.
    limit = ["--time=1", "--signal=USR1@20"]
    job = submit(slurm, run, WORKER, "plain", "150", "0.2", options=limit)
    slurm.wait(job, "RUNNING", timeout_s=LIMIT_S, log=log_of(run))
    slurm.wait(job, "PENDING", timeout_s=LIMIT_S, log=log_of(run))
    stop = read_stop(run)
    assert stop is not None
    assert (stop.reason, stop.attempt) == ("time_limit", f"{job}.0")
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log_of(run))
    starts = begun(run)  # two, or three where Slurm's clock was early
    assert starts[:2] == [0, stop.step]
    assert slurm.job(job)["Restarts"] == str(len(starts) - 1)
    assert not (run / "stop.json").exists()
    log = log_of(run).read_text()
    assert f"requeue: time_limit at step {stop.step}" in log
    assert f"goes on from step-{stop.step:06d}, step {stop.step}" in log


def test_preempted_job_saves_makes_room_and_goes_on(slurm: Cluster, tmp_path: Path) -> None:
    run, urgent = tmp_path / "run", tmp_path / "urgent"
    whole = ["--exclusive"]
    job = submit(slurm, run, WORKER, "plain", "80", "0.2", options=whole)
    wait_for_step(slurm, run, 3)
    first = submit(slurm, urgent, WORKER, "plain", "2", "0.1", options=[*whole, "--partition=high"])
    slurm.wait(first, "COMPLETED", timeout_s=LIMIT_S, log=log_of(urgent))
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log_of(run))
    starts = begun(run)
    assert len(starts) == 2
    assert starts[1] >= 3
    assert "requeue: preempted at step" in log_of(run).read_text()
    assert slurm.job(job)["Restarts"] == "1"


def test_job_preempted_before_it_can_save_comes_back(slurm: Cluster, tmp_path: Path) -> None:
    run, urgent = tmp_path / "run", tmp_path / "urgent"
    whole = ["--exclusive"]
    job = submit(slurm, run, WORKER, "deaf", "3", "0.1", options=whole)
    wait_for_step(slurm, run, 0)
    submit(slurm, urgent, WORKER, "plain", "2", "0.1", options=[*whole, "--partition=high"])
    slurm.wait(job, "PENDING", timeout_s=LIMIT_S, log=log_of(run))
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log_of(run))
    assert "requeue: preempted before it could save" in log_of(run).read_text()


def test_job_of_a_node_that_goes_down_comes_back_by_itself(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, WORKER, "plain", "60", "0.2")
    wait_for_step(slurm, run, 3)
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    slurm.wait(job, "PENDING", timeout_s=LIMIT_S, log=log_of(run))
    wait_until(lambda: revive(slurm, "n2"), "n2 does not come back")
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log_of(run))
    starts = begun(run)
    assert len(starts) == 2
    assert starts[1] >= 3


def test_job_of_a_node_that_dies_comes_back(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, WORKER, "plain", "60", "0.2", TINY_PEERS="1")
    wait_for_step(slurm, run, 3, rank=1)
    found = re.search(r"rank 1 of 2 on n2, pid (\d+)", log_of(run).read_text())
    assert found is not None
    worker = psutil.Process(int(found[1]))
    step_daemon = worker.parent()
    assert step_daemon is not None
    assert step_daemon.name().startswith("slurmstepd")
    slurm.lose_node(2)
    step_daemon.kill()
    worker.kill()  # nothing of the node is left, and Slurm has not been told
    try:
        slurm.wait(job, "PENDING", timeout_s=LIMIT_S, log=log_of(run))
    finally:
        slurm.start_node(2)
    wait_until(lambda: revive(slurm, "n2"), "n2 does not come back")
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log_of(run))
    assert len(begun(run)) == 2


def revive(slurm: Cluster, node: str) -> bool:
    with contextlib.suppress(AssertionError):  # refused while the node is completing
        slurm.run("scontrol", "update", f"nodename={node}", "state=resume")
    state = slurm.run("sinfo", "-h", "-n", node, "-p", "low", "-o", "%t").strip()
    return state in ("idle", "alloc", "mix")


def wait_until(is_true: Any, problem: str) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not is_true():
        assert time.monotonic() < deadline_s, problem
        time.sleep(0.5)


def test_killed_worker_ends_the_job_on_all_nodes(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, WORKER, "plain", "600", "0.2")
    wait_for_step(slurm, run, 3, rank=1)
    pid = re.search(r"rank 1 of 2 on n2, pid (\d+)", log_of(run).read_text())
    assert pid is not None
    os.kill(int(pid[1]), signal.SIGKILL)
    slurm.wait(job, "FAILED", timeout_s=30, log=log_of(run))
    log = log_of(run).read_text()
    assert "fail: exit code" in log
    assert "n2: task 1: Killed" in log
    assert str(run / "logs" / f"{job}.0") in log
    assert len(read_attempts(run)) == 1


def test_cancelled_job_is_not_started_again(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, WORKER, "plain", "600", "0.2")
    wait_for_step(slurm, run, 3)
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED", timeout_s=LIMIT_S, log=log_of(run))
    wait_until(lambda: read_stop(run) is not None, "the workers did not save")
    time.sleep(7)  # longer than a requeued job has to wait
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert "fail: Slurm is ending this job already" in log_of(run).read_text()
    assert len(read_attempts(run)) == 1


@pytest.mark.parametrize(
    ("mode", "more"), [("stuck", {}), ("crash", {"LOWTIDE_ON_FAILURE": "requeue"})]
)
def test_job_that_does_not_get_on_stops_after_three_starts(
    slurm: Cluster, tmp_path: Path, mode: str, more: dict[str, str]
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, WORKER, mode, "50", "0.05", **more)
    slurm.wait(job, "FAILED", timeout_s=150, log=log_of(run))
    assert begun(run) == [0, 0, 0]
    assert slurm.job(job)["Restarts"] == "3"
    log = log_of(run).read_text()
    assert f"job {job} was started 3 times from step 0 and no later complete" in log
    assert "STARTS AT STEP 0 AGAIN" in log


def test_crash_is_not_started_again_unless_asked(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, WORKER, "crash", "50", "0.05")
    slurm.wait(job, "FAILED", timeout_s=LIMIT_S, log=log_of(run))
    assert slurm.job(job)["ExitCode"] != "0:0"  # srun's: the highest of all tasks
    assert "Exited with exit code 7" in log_of(run).read_text()
    assert len(read_attempts(run)) == 1


def test_sweep_runs_each_line_in_a_folder_of_its_own(slurm: Cluster, tmp_path: Path) -> None:
    run, sweep = tmp_path / "sweep", tmp_path / "sweep.txt"
    sweep.write_text("plain 2 0.1\nplain 3 0.1\nstuck 4 0.1\n")
    log = tmp_path / "task%a.log"
    job = slurm.submit("array.sbatch", log, WORKER, options=["--time=5", "--array=0-2"],
                       **settings(run, LOWTIDE_SWEEP=str(sweep)))  # fmt: skip
    for task in range(2):
        own = tmp_path / f"task{task}.log"
        slurm.wait(f"{job}_{task}", "COMPLETED", timeout_s=LIMIT_S, log=own)
        steps = [path.name for path in (run / str(task) / "checkpoints").iterdir()]
        assert steps == [f"step-{task + 2:06d}"]
    # The last task of an array bears the array's own number: it must requeue itself alone.
    wait_until(lambda: len(read_attempts(run / "2")) == 2, "task 2 is not started again")
    assert [len(read_attempts(run / str(task))) for task in range(2)] == [1, 1]
    slurm.run("scancel", job)


def test_evaluation_knows_the_run_and_leaves_its_records_alone(
    slurm: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    script = tmp_path / "evaluate.py"
    script.write_text("import os; print('evaluates', os.environ['LOWTIDE_EVALUATED'])\n")
    log = tmp_path / "eval.log"
    job = slurm.submit("eval.sbatch", log, str(script), **settings(run))
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log)
    assert f"evaluates {run}" in log.read_text()
    assert not (run / "launch").exists()
    assert len(read_attempts(run / "evaluation")) == 1


FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "head address": (
        {"LOWTIDE_HEAD_ADDRESS": "no.such.host"},
        "address no.such.host is not one of",
    ),
    "read-only folder": (
        {"LOWTIDE_RUN_DIR": "/proc/run"},
        "run folder /proc/run cannot be written",
    ),
    "read-only checkpoints": ({"LOWTIDE_CHECKPOINTS": "/proc/c"}, "n2: checkpoint folder /proc/c"),
    "no python": ({"LOWTIDE_PYTHON": "/nowhere/python"}, "no /nowhere/python on"),
    "wrong config": (
        {"LOWTIDE_CONFIG": "/nowhere/ds.json"},
        "config file /nowhere/ds.json does not",
    ),
    "no script": ({}, "script nothing.py does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_within_a_minute(slurm: Cluster, tmp_path: Path, fault: str) -> None:
    run = tmp_path / "run"
    more, expected = FAULTS[fault]
    script = "nothing.py" if fault == "no script" else WORKER
    begin_s = time.monotonic()
    job = submit(slurm, run, script, "plain", "2", "0.1", **more)
    slurm.wait(job, "FAILED", timeout_s=60, log=log_of(run))
    assert time.monotonic() - begin_s < 60
    log = log_of(run).read_text()
    assert expected in log
    assert "Traceback" not in log
    assert "begins at" not in log


def test_taken_port_is_named_once(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        job = submit(slurm, run, WORKER, "plain", "2", "0.1", LOWTIDE_PORT=port)
        slurm.wait(job, "FAILED", timeout_s=60, log=log_of(run))
    lines = [line for line in log_of(run).read_text().splitlines() if "preflight:" in line]
    assert len(lines) == 1
    assert f"n1: port {port} on 127.0.0.1 cannot be used" in lines[0]


def test_other_versions_on_one_node_are_named(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    other = tmp_path / "other" / "deepspeed-0.1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1.0\n")
    site = tmp_path / "site.sh"
    site.write_text(
        f'[ "${{SLURMD_NODENAME:-}}" != n2 ] || PYTHONPATH={other.parent}:${{PYTHONPATH:-}}\n'
    )
    job = submit(slurm, run, WORKER, "plain", "2", "0.1", LOWTIDE_SITE=str(site))
    slurm.wait(job, "FAILED", timeout_s=60, log=log_of(run))
    assert "n2: deepspeed is 0.1.0, on n1 it is 0.19" in log_of(run).read_text()


def test_node_without_the_run_folder_is_named(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    site = tmp_path / "site.sh"  # as if n2 had a file system of its own at that place
    site.write_text(
        'if [ "${SLURMD_NODENAME:-}" = n2 ] && [ -n "${LOWTIDE_PREFLIGHT_TOKEN:-}" ]; then\n'
        "  export LOWTIDE_PREFLIGHT_TOKEN=of-another-folder\nfi\n"
    )
    job = submit(slurm, run, WORKER, "plain", "2", "0.1", LOWTIDE_SITE=str(site))
    slurm.wait(job, "FAILED", timeout_s=60, log=log_of(run))
    assert f"n2: run folder {run} is not the same as on n1" in log_of(run).read_text()


def test_status_tells_how_a_run_stands(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, WORKER, "plain", "3", "0.1")
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log_of(run))
    text = slurm.run(sys.executable, "-m", "lowtide.launch", "status", str(run), "--json")
    found = json.loads(text)
    assert (found["job"], found["checkpoint"], found["checkpoint_step"]) == (job, "step-000003", 3)
    assert found["job_state"] == "COMPLETED"
    assert [each["resume_step"] for each in found["attempts"]] == [0]
