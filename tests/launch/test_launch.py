"""Plan, judgement and shell of the launcher, without Slurm: a stub answers for scontrol."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lowtide.core.errors import LaunchError
from lowtide.core.restart import StopRecord, write_record, write_stop
from lowtide.launch import attempts, node, preflight, slurm
from lowtide.launch.plan import FIRST_PORT, PORTS, Plan, Request, is_port_free, make_plan
from tests.helpers.ranks import REPOSITORY, environment, kill_group, run_command

WORKER = str(Path(__file__).with_name("tiny_worker.py"))
IN_A_JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stub; each test may write `answers`: node name -> NodeAddr, job -> state."""
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({"n1": "10.0.0.1", "n2": "10.0.0.2", "41": "RUNNING"}))
    stub = tmp_path / "bin" / "scontrol"
    stub.parent.mkdir()
    stub.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        f"answers = json.load(open({str(answers)!r}))\n"
        "words = sys.argv[1:]\n"
        "if 'hostnames' in words: print('n1\\nn2')\n"
        "elif 'node' in words: print(f'NodeName={words[-1]} NodeAddr={answers[words[-1]]} X=1')\n"
        "elif words[0] == 'requeue': sys.exit('Requested operation is not allowed')\n"
        "else: print(f'JobId={words[-1]} JobState={answers[words[-1]]} Reason=None',\n"
        "            f\"PreemptTime={answers.get('preempted', 'None')}\")\n"
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    return answers


def plan_of(run: Path, **asked: Any) -> Plan:
    return make_plan(Request(run_dir=run, **asked), IN_A_JOB)


# ---- where


@pytest.mark.usefixtures("scontrol")
def test_plan_of_a_job_takes_slurms_addresses(tmp_path: Path) -> None:
    made = plan_of(tmp_path / "run", procs_per_node=4)
    assert made.nodes == ("n1", "n2")
    assert made.addresses == ("10.0.0.1", "10.0.0.2")
    assert (made.world_size, made.attempt) == (8, "41.0")
    assert made.port == FIRST_PORT + 41
    assert FIRST_PORT + PORTS < 32768  # below what systems hand out by themselves
    assert Plan.from_environment({"LOWTIDE_PLAN": made.to_json()}) == made
    again = make_plan(
        Request(run_dir=tmp_path),
        {**IN_A_JOB, "SLURM_RESTART_COUNT": "2", "SLURM_GPUS_ON_NODE": "8"},
    )
    assert (again.attempt, again.procs_per_node) == ("41.2", 8)


def test_several_nodes_never_meet_on_this_machine_itself(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scontrol.write_text(json.dumps({"n1": "n1", "n2": "10.0.0.2"}))

    def resolve(name: str, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(LaunchError, match=r"Tried n1 -> 127\.0\.1\.1 \(this machine itself\)"):
        plan_of(tmp_path)
    assert slurm.node_address("n1", is_only=True) == "127.0.1.1"  # alone it does no harm
    assert plan_of(tmp_path, head_address="10.9.9.9").addresses[0] == "10.9.9.9"


def test_address_that_leads_nowhere_lists_what_was_tried(scontrol: Path, tmp_path: Path) -> None:
    scontrol.write_text(json.dumps({"n1": "head.invalid", "n2": "10.0.0.2"}))
    with pytest.raises(LaunchError, match=r"node n1: no address.*head\.invalid \(.*LOWTIDE_HEAD"):
        plan_of(tmp_path)


@pytest.mark.usefixtures("scontrol")
def test_job_with_fewer_nodes_than_promised_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"promised 3 nodes and lists 2"):
        make_plan(Request(run_dir=tmp_path), {**IN_A_JOB, "SLURM_JOB_NUM_NODES": "3"})


def test_missing_scontrol_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"scontrol is not on PATH; load Slurm's module"):
        plan_of(tmp_path)


def test_taken_port_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert is_port_free("127.0.0.1", port) is False
    assert is_port_free("127.0.0.1", port) is True
    assert is_port_free("192.0.2.1", port) is None  # another machine's


def test_lead_time_follows_what_saves_have_cost(tmp_path: Path) -> None:
    made = make_plan(Request(run_dir=tmp_path), {})
    assert (made.lead_s, made.is_lead_measured) == (180, False)
    step = {"kind": "step", "step": 5, "steps": 5, "duration_s": 60.0}
    step["spans"] = {"save": {"count": 2, "total_s": 50.0}}
    (tmp_path / "telemetry").mkdir()
    (tmp_path / "telemetry" / "rank0.jsonl").write_text(json.dumps(step) + '\n{"kind": "step", ')
    made = make_plan(Request(run_dir=tmp_path), {})
    assert (made.lead_s, made.is_lead_measured) == (140, True)  # 60 + 2 * 12 + 25 + 30


# ---- what a task becomes


@pytest.mark.usefixtures("scontrol")
def test_each_node_starts_its_own_torchrun(tmp_path: Path) -> None:
    made = plan_of(tmp_path, procs_per_node=4)
    start = node.make_start(made, [WORKER, "--x", "1"], {"SLURMD_NODENAME": "n2"})
    words = start.command
    assert words[words.index("--node-rank") + 1] == "1"
    assert words[words.index("--local-addr") + 1] == "10.0.0.2"
    assert words[words.index("--rdzv-endpoint") + 1] == f"10.0.0.1:{made.port}"
    assert words[-3:] == [WORKER, "--x", "1"]
    assert start.environment["LOWTIDE_ATTEMPT"] == "41.0"
    kept = node.make_start(made, [WORKER], {"SLURMD_NODENAME": "n2", "OMP_NUM_THREADS": "3"})
    assert "OMP_NUM_THREADS" not in kept.environment  # the user's own stays
    with pytest.raises(LaunchError, match="this node is n7, the plan is for n1, n2"):
        node.make_start(made, [WORKER], {"SLURMD_NODENAME": "n7"})
    with pytest.raises(LaunchError, match="no script given"):
        node.make_start(made, [], {"SLURMD_NODENAME": "n1"})


@pytest.mark.usefixtures("scontrol")
def test_task_per_rank_needs_as_many_tasks_as_ranks(tmp_path: Path) -> None:
    made = plan_of(tmp_path, procs_per_node=4, mode="rank")
    place = {"SLURMD_NODENAME": "n2", "SLURM_LOCALID": "3", "SLURM_NTASKS": "8"}
    found = node.make_start(made, [WORKER], place).environment
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("7", "3", "8")
    with pytest.raises(LaunchError, match="srun started 2 tasks, the plan has 8 ranks"):
        node.make_start(made, [WORKER], {**place, "SLURM_NTASKS": "2"})
    assert "--ntasks=8" in node.step_command(made, [WORKER])


def test_missing_plan_says_how_to_start() -> None:
    with pytest.raises(LaunchError, match=r"LOWTIDE_PLAN is not set.*lowtide_run\.sh"):
        Plan.from_environment({})
    with pytest.raises(LaunchError, match="cannot be read"):
        Plan.from_environment({"LOWTIDE_PLAN": "{"})


# ---- again or not


def _stop(run: Path, *, attempt: str = "41.0", wants_restart: bool = True) -> None:
    record = StopRecord(attempt=attempt, reason="time_limit", step=7, checkpoint="c",
                        wants_restart=wants_restart, time_s=0.0)  # fmt: skip
    write_stop(run, record)


@pytest.mark.parametrize(
    ("stop", "state", "exit_code", "expected"),
    [
        ({}, "RUNNING", 0, ("requeue", 0)),
        ({}, "RUNNING", 143, ("requeue", 0)),  # torchrun's own code after SIGTERM says nothing
        ({}, "COMPLETING", 143, ("fail", 143)),  # scancel
        ({"attempt": "41.9"}, "RUNNING", 1, ("fail", 1)),  # left by another start
        ({"wants_restart": False}, "RUNNING", 0, ("fail", 1)),
        (None, "RUNNING", 0, ("finish", 0)),
        (None, "RUNNING", 9, ("fail", 9)),
    ],
)
def test_stop_file_decides_what_follows(
    scontrol: Path, tmp_path: Path, stop: Any, state: str, exit_code: int, expected: Any
) -> None:
    scontrol.write_text(json.dumps({"n1": "10.0.0.1", "n2": "10.0.0.2", "41": state}))
    made = plan_of(tmp_path / "run")
    if stop is not None:
        _stop(tmp_path / "run", **stop)
    decision = attempts.decide(made, exit_code)
    assert (decision.action, decision.exit_code) == expected


def test_job_that_could_not_save_is_started_again_if_it_was_not_its_fault(
    scontrol: Path, tmp_path: Path
) -> None:
    made = plan_of(tmp_path / "run")
    decision = attempts.decide(made, 1, find_silent=lambda: ["n2"])
    assert (decision.action, decision.reason) == ("requeue", "n2 no longer answer(s)")
    facts = {**json.loads(scontrol.read_text()), "preempted": "2026-11-25T22:00:00"}
    scontrol.write_text(json.dumps(facts))
    assert attempts.decide(made, 1).reason == "preempted before it could save"


@pytest.mark.usefixtures("scontrol")
def test_task_of_an_array_is_named_as_one(tmp_path: Path) -> None:
    # The task whose number is the array's own: Slurm would take that number for the whole array.
    place = {**IN_A_JOB, "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "2"}
    assert make_plan(Request(run_dir=tmp_path), place).job_id == "41_2"


@pytest.mark.usefixtures("scontrol")
def test_checkpoints_elsewhere_are_found_through_the_last_stop(tmp_path: Path) -> None:
    checkpoint = tmp_path / "output" / "global_step7"
    checkpoint.mkdir(parents=True)
    write_record(checkpoint, step=7, world_size=2, config={})
    record = StopRecord(attempt="41.0", reason="time_limit", step=7, checkpoint=str(checkpoint),
                        wants_restart=True, time_s=0.0)  # fmt: skip
    write_stop(tmp_path / "run", record)
    made = plan_of(tmp_path / "run")
    assert made.resume_step == 7
    attempts.begin(made)
    assert not (tmp_path / "run" / "stop.json").exists()  # it was about the start before


@pytest.mark.usefixtures("scontrol")
def test_start_that_does_not_get_on_is_refused_the_fourth_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for count in ("0", "1", "2"):
        attempts.begin(make_plan(Request(run_dir=run), {**IN_A_JOB, "SLURM_RESTART_COUNT": count}))
    fourth = {**IN_A_JOB, "SLURM_RESTART_COUNT": "3"}
    with pytest.raises(LaunchError, match="job 41 was started 3 times from step 0"):
        attempts.begin(make_plan(Request(run_dir=run), fourth))
    checkpoint = run / "checkpoints" / "global_step8"
    checkpoint.mkdir(parents=True)
    write_record(checkpoint, step=8, world_size=2, config={})
    line = attempts.begin(make_plan(Request(run_dir=run), fourth))  # it has got on
    assert "goes on from global_step8, step 8" in line


def test_differences_between_nodes_are_named() -> None:
    first = {"node": "n1", "python": "3.11.7 (x)", "packages": {"torch": "2.13.0"}, "problems": []}
    other = {**first, "node": "n2", "python": "3.12.1 (y)", "packages": {"torch": "2.12.0"}}
    lines = preflight._differences([first, other])
    assert "n2: Python is 3.12.1, on n1 it is 3.11.7" in lines[0]
    assert "n2: torch is 2.12.0, on n1 it is 2.13.0" in lines[1]
    assert preflight._differences([first, {**other, **first, "node": "n2"}]) == []


# ---- the shell


def _shell_env(run: Path) -> dict[str, str]:
    return {"LOWTIDE_RUN_DIR": str(run), "LOWTIDE_MODE": "rank", "LOWTIDE_PYTHON": sys.executable}


def test_one_machine_stops_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [str(REPOSITORY / "launch" / "lowtide_run.sh"), WORKER, "plain"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, "600", "0.1"], env=environment(_shell_env(run)), cwd=REPOSITORY,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        deadline_s = time.monotonic() + 30
        while not (run / "rank0.step").exists() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        kill_group(process, signal.SIGUSR1)  # also to the shell, which must not die of it
        assert process.wait(timeout=30) == 0
    finally:
        kill_group(process)
        process.wait()
    text = (tmp_path / "log").read_text()
    assert "finish: time_limit at step" in text
    assert "start it again to go on" in text
    done = run_command([*command, "12", "0.01"], env=_shell_env(run), timeout_s=60).check()
    assert "begins at 0" not in done.log
    assert "reached the end at 12" in done.log
    assert len(attempts.read_attempts(run)) == 2


def test_dry_run_prints_the_command_and_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_command(
        [str(REPOSITORY / "launch" / "lowtide_run.sh"), "--dry-run", WORKER, "--lr", "0.1"],
        env={"LOWTIDE_RUN_DIR": str(run), "LOWTIDE_PYTHON": sys.executable, "LOWTIDE_NPROC": "2"},
        timeout_s=60,
    ).check()
    assert "-m torch.distributed.run" in done.log
    assert f"{WORKER} --lr 0.1" in done.log
    assert not run.exists()


@pytest.mark.parametrize(
    ("env", "words", "expected"),
    [
        ({}, [], "no script given"),
        ({}, ["train.py"], "LOWTIDE_RUN_DIR is not set"),
        ({"LOWTIDE_SITE": "/nowhere.sh"}, ["train.py"], "LOWTIDE_SITE: /nowhere.sh does not"),
        (
            {"LOWTIDE_RUN_DIR": "/tmp/x", "LOWTIDE_MODE": "ssh"},
            ["train.py"],
            "allowed are torchrun",
        ),
        ({"LOWTIDE_RUN_DIR": "/proc/x"}, ["train.py"], "/proc/x cannot be written"),
    ],
)
def test_wrong_settings_end_with_one_line(
    env: dict[str, str], words: list[str], expected: str
) -> None:
    script = str(REPOSITORY / "launch" / "lowtide_run.sh")
    done = run_command(
        [script, *words], env={"LOWTIDE_PYTHON": sys.executable, **env}, timeout_s=60
    )
    assert done.returncode == 2
    assert expected in done.log
    assert "Traceback" not in done.log


def test_site_file_may_end_with_a_false_test(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text('export LOWTIDE_NPROC=3\n[ "$NO_SUCH_VARIABLE" = n2 ]\n')
    done = run_command(
        [str(REPOSITORY / "launch" / "lowtide_run.sh"), "--dry-run", WORKER],
        env={"LOWTIDE_RUN_DIR": str(tmp_path / "run"), "LOWTIDE_SITE": str(site),
             "LOWTIDE_PYTHON": sys.executable},
        timeout_s=60,
    ).check()  # fmt: skip
    assert "--nproc-per-node 3" in done.log


def test_shell_scripts_are_clean() -> None:
    scripts = [str(p) for p in sorted((REPOSITORY / "launch").rglob("*")) if p.is_file()]
    assert len(scripts) >= 8
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run(
        [shellcheck, "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
