"""Real training on a real two-node Slurm: the main example, DeepSpeed's launcher, plain srun."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from lowtide.core.restart import read_stop
from tests.helpers.pretrain import arguments, losses, write_text
from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.slurm import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 60
LIMIT_S = 150.0


def test_main_example_goes_on_as_if_nothing_had_happened(slurm: Cluster, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    run, log = tmp_path / "run", tmp_path / "job.log"
    # Through torchrun on both nodes, as the template does by default.
    settings = {"LOWTIDE_RUN_DIR": str(run), "LOWTIDE_PYTHON": sys.executable}
    settings |= {"LOWTIDE_CONFIG": str(tmp_path / "ds.json"), "LOWTIDE_NPROC": "1"}
    script = arguments(text, run, STEPS)
    job = slurm.submit("train.sbatch", log, *script, options=["--time=10"], **settings)
    wait_for_losses(slurm, run, 8, log)
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait(job, "PENDING", timeout_s=60, log=log)
    stop = read_stop(run)
    assert stop is not None
    assert stop.reason == "time_limit"
    assert 8 <= stop.step < STEPS
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log)
    shown = log.read_text()
    assert f"goes on from step-{stop.step:06d}" in shown
    assert f"resumed from step-{stop.step:06d}" in shown
    assert f"finished: {STEPS} steps" in shown
    assert (run / "report.html").exists()
    assert list((run / "logs" / f"{job}.1" / "node1").rglob("std*.log"))
    plan = slurm.run(
        sys.executable, "-m", "lowtide.launch", "plan", "--run-dir", str(run), "--json"
    )
    assert json.loads(plan)["is_lead_measured"] is True
    whole = tmp_path / "whole"
    run_ranks(arguments(text, whole, STEPS), timeout_s=LIMIT_S).check()
    assert losses(run) == losses(whole)  # exactly, at every step
    assert sorted(losses(run)) == list(range(1, STEPS + 1))


def wait_for_losses(slurm: Cluster, run: Path, count: int, log: Path) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        if (run / "telemetry" / "rank0.jsonl").exists() and len(losses(run)) >= count:
            return
        time.sleep(0.2)
    pytest.fail(f"{count} steps were not reached\n{slurm.evidence(log)}")


def test_hostfile_starts_deepspeeds_own_launcher(slurm: Cluster, tmp_path: Path) -> None:
    script, log = tmp_path / "where.py", tmp_path / "job.log"
    script.write_text("import os; print('here', os.environ['SLURMD_NODENAME'], flush=True)\n")
    batch = tmp_path / "batch.sh"
    deepspeed = Path(sys.executable).with_name("deepspeed")
    batch.write_text(
        f"#!/bin/bash\nset -e\n{REPOSITORY}/launch/make_hostfile.sh > {tmp_path}/hostfile\n"
        f"head=$(awk 'NR == 1 {{print $1}}' {tmp_path}/hostfile)\n"
        f"{deepspeed} --hostfile {tmp_path}/hostfile --launcher slurm --no_ssh_check "
        f'--master_addr "$head" {script}\n'
    )
    job = slurm.run("sbatch", "--parsable", "-N2", "--ntasks-per-node=1", f"--output={log}",
                    str(batch), LOWTIDE_PYTHON=sys.executable).strip()  # fmt: skip
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log)
    assert (tmp_path / "hostfile").read_text() == "127.0.0.1 slots=1\n127.0.0.2 slots=1\n"
    assert sorted(re.findall(r"here (n\d)", log.read_text())) == ["n1", "n2"]


def test_plain_srun_needs_no_launcher(slurm: Cluster, tmp_path: Path) -> None:
    script, log = tmp_path / "reduce.py", tmp_path / "job.log"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.tensor([dist.get_rank() + 1.0])\n"
        "dist.all_reduce(x)\n"
        "print('rank', dist.get_rank(), 'sum', x.item(), flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    batch = tmp_path / "batch.sh"
    batch.write_text(f"#!/bin/bash\nsrun -N2 -n2 {sys.executable} -m lowtide.run {script}\n")
    job = slurm.run("sbatch", "--parsable", "-N2", "--ntasks-per-node=1", f"--output={log}",
                    str(batch)).strip()  # fmt: skip
    slurm.wait(job, "COMPLETED", timeout_s=LIMIT_S, log=log)
    lines = sorted(line for line in log.read_text().splitlines() if line.startswith("rank"))
    assert lines == ["rank 0 sum 3.0", "rank 1 sum 3.0"]
