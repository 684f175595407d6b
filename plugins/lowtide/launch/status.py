"""How a run stands: its starts, its last stop, its newest complete checkpoint, its last step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lowtide.core.errors import LaunchError
from lowtide.core.restart import choose, read_stop
from lowtide.launch import slurm
from lowtide.launch.attempts import read_attempts
from lowtide.launch.plan import step_records, telemetry_files


def run_status(run_dir: Path, *, checkpoints: Path | None = None) -> dict[str, Any]:
    """Return the status of a run as JSON types.

    Raises:
        LaunchError: there is no such folder.
        CheckpointError: ``stop.json`` is damaged.
    """
    if not run_dir.is_dir():
        raise LaunchError(f"run folder {run_dir} does not exist (seen from {Path.cwd()})")
    attempts = read_attempts(run_dir)
    job = attempts[-1]["job"] if attempts else None
    stop = read_stop(run_dir)
    choice = choose(checkpoints or run_dir / "checkpoints")
    steps = [r for path in telemetry_files(run_dir) for r in step_records(path)[-1:]]
    last = max(steps, key=lambda record: record["time_s"], default=None)
    return {
        "run_dir": str(run_dir),
        "job": job,
        "job_state": slurm.job_facts(job).get("JobState") if job else None,
        "attempts": attempts,
        "stop": None if stop is None else {n: getattr(stop, n) for n in stop.__dataclass_fields__},
        "checkpoint": choice.tag,
        "checkpoint_step": choice.step,
        "skipped_checkpoints": choice.skipped,
        "last_step": None if last is None else last["step"],
        "last_step_age_s": None if last is None else round(time.time() - last["time_s"], 1),
    }
