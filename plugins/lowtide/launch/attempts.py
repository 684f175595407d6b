"""Every start of a run is noted; after its end ``stop.json`` decides whether there is another."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.core.errors import LaunchError
from lowtide.core.restart import STOP_FILE, read_stop
from lowtide.launch import slurm
from lowtide.launch.plan import Plan

MAX_STARTS = 3
_FILE = "attempts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the batch script does next.

    Attributes:
        action: "requeue", "finish" or "fail".
        exit_code: Of the batch script, unless Slurm ends it first.
        reason: One line for the log.
    """

    action: str
    exit_code: int
    reason: str


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the noted starts of a run, oldest first; damaged lines are left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in (run_dir / "launch" / _FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def begin(plan: Plan, *, max_starts: int = MAX_STARTS) -> str:
    """Note this start; return one line that says where it goes on.

    Raises:
        LaunchError: this very job has been started `max_starts` times from the same step already,
            so it does not get on: a crash that repeats itself, or a lead time that is too short.
    """
    run_dir = Path(plan.run_dir)
    same = 0
    for earlier in reversed(read_attempts(run_dir)):
        # A job that the user submits anew has a new id, and counts from one.
        if (earlier["job"], earlier["resume_step"]) != (plan.job_id, plan.resume_step):
            break
        same += 1
    if plan.restart_count > 0 and same >= max_starts:
        raise LaunchError(
            f"job {plan.job_id} was started {same} times from step {plan.resume_step} and no later "
            f"complete checkpoint is in {plan.checkpoints} (LOWTIDE_CHECKPOINTS names another "
            f"folder); it is not started again. Look at the logs in {plan.log_dir.parent}, mend "
            f"the cause, submit anew. LOWTIDE_MAX_STARTS allows more than {max_starts}"
        )
    note = {
        "attempt": plan.attempt,
        "job": plan.job_id,
        "restart_count": plan.restart_count,
        "resume_step": plan.resume_step,
        "nodes": plan.nodes,
        "world_size": plan.world_size,
        "time_s": time.time(),
    }
    try:
        (run_dir / "launch").mkdir(parents=True, exist_ok=True)
        plan.log_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / "launch" / _FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
        # Read by make_plan; from now on one that is there was left by this start.
        (run_dir / STOP_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(
            f"run folder {run_dir} cannot be written ({error.strerror}); name another one with "
            "--run-dir or LOWTIDE_RUN_DIR"
        ) from error
    return describe_start(plan)


def describe_start(plan: Plan) -> str:
    """Return one line: which start this is and where it goes on."""
    start = f"start {plan.attempt} on {len(plan.nodes)} node(s), {plan.world_size} rank(s): "
    if plan.resume_tag is not None:
        return f"{start}goes on from {plan.resume_tag}, step {plan.resume_step}"
    if plan.restart_count > 0:
        return (
            f"{start}STARTS AT STEP 0 AGAIN: no complete checkpoint in {plan.checkpoints} "
            "(LOWTIDE_CHECKPOINTS names another folder)"
        )
    return f"{start}starts at step 0"


def decide(
    plan: Plan,
    exit_code: int,
    *,
    requeues_failures: bool = False,
    find_silent: Callable[[], Sequence[str]] = tuple,
) -> Decision:
    """Say what follows the end of a start.

    Args:
        plan: Of the start that has ended.
        exit_code: Of srun. It tells a failure from an end, never whether to start again.
        requeues_failures: Start again too where the job ended without a word (a crash).
        find_silent: Asks all nodes, after a failure, and returns those that do not answer.
    """
    stop = read_stop(Path(plan.run_dir))
    is_ours = stop is not None and stop.attempt == plan.attempt
    facts = slurm.job_facts(plan.job_id) if plan.job_id is not None else {}
    if facts.get("JobState", "RUNNING") != "RUNNING":
        # scancel, or a node that failed (then Slurm requeues by itself). In the grace time of a
        # preemption the job still counts as running.
        state = facts["JobState"]
        reason = f"Slurm is ending this job already ({state}); what follows is its decision"
        return Decision(action="fail", exit_code=exit_code or 1, reason=reason)
    if stop is not None and is_ours and stop.wants_restart:
        where = f"{stop.reason} at step {stop.step}, checkpoint {stop.checkpoint or 'none'}"
        if plan.job_id is None:
            return Decision(
                action="finish", exit_code=0, reason=f"{where}; start it again to go on"
            )
        return Decision(action="requeue", exit_code=0, reason=where)
    if stop is not None and is_ours:
        return Decision(
            action="fail", exit_code=exit_code or 1, reason=f"{stop.reason} at step {stop.step}"
        )
    if exit_code == 0:
        return Decision(action="finish", exit_code=0, reason="the job has reached its end")
    # Slurm requeues a preempted job only if it had to kill it, and one whose node died only if it
    # noticed before the other nodes gave up.
    if facts.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"):
        return Decision(action="requeue", exit_code=0, reason="preempted before it could save")
    silent = find_silent() if facts and len(plan.nodes) > 1 else []
    if silent:
        reason = f"{', '.join(silent)} no longer answer(s)"
        return Decision(action="requeue", exit_code=0, reason=reason)
    reason = f"exit code {exit_code} and no stop.json of this start: it failed"
    if requeues_failures and plan.job_id is not None:
        return Decision(action="requeue", exit_code=exit_code, reason=f"{reason}; tried again")
    return Decision(action="fail", exit_code=exit_code, reason=f"{reason}; logs: {plan.log_dir}")
