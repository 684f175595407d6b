"""Wrong configurations and dying ranks: one clear line, the culprit in view, no hang, no orphan."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.core.test_config import WRONG_BLOCKS
from tests.helpers.ranks import REPOSITORY, environment, kill_group, run_command, run_ranks

pytestmark = pytest.mark.dist

WORKER = str(Path(__file__).with_name("fault_worker.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_wrong_configs_are_refused_before_any_process_group() -> None:
    result = run_ranks([WORKER, "wrong_configs"], nproc=1, timeout_s=90).check()
    found = result.results[0]
    assert len(found) == len(WRONG_BLOCKS) + 2 >= 20
    for (name, _, expected), outcome in zip(WRONG_BLOCKS, found, strict=False):
        assert outcome != "accepted", name
        text, is_initialized = outcome
        assert not is_initialized, name
        assert "\n" not in text
        assert all(part in text for part in expected), (name, text)
    assert all("does not exist" in outcome[0] for outcome in found[-2:])


def test_zero_code_start_shows_one_line_for_a_wrong_config(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import deepspeed, torch\n"
        "deepspeed.initialize(model=torch.nn.Linear(2, 2), config={'lowtide': {'telemetri': {}}})\n"
    )
    result = run_command([sys.executable, "-m", "lowtide.run", str(script)], timeout_s=90)
    assert result.returncode == 2
    lines = [line for line in result.log.splitlines() if "lowtide: ConfigError" in line]
    assert len(lines) == 1
    assert 'Did you mean "telemetry"?' in lines[0]
    assert "Traceback" not in result.log
    missing = run_command([sys.executable, "-m", "lowtide.run", "nothing.py"], timeout_s=60)
    assert missing.returncode == 2
    assert "script nothing.py does not exist" in missing.log


def test_error_of_one_rank_ends_the_job_with_that_error_in_view() -> None:
    result = run_command([*TORCHRUN, "-m", "lowtide.run", WORKER, "raise"], timeout_s=120)
    assert not result.is_timed_out
    assert result.returncode != 0
    # torchrun's own summary at the end names the culprit, not just the rank that noticed first.
    summary = result.log[result.log.rindex("Root Cause") :]
    assert "the cosmic ray hit rank 1" in summary


def test_killed_rank_ends_the_job_and_is_named() -> None:
    result = run_command([*TORCHRUN, WORKER, "kill"], timeout_s=120)
    assert not result.is_timed_out
    assert result.returncode != 0
    assert re.search(r"local_rank: 1|rank\s*:\s*1", result.log)
    assert "SIGKILL" in result.log or "-9" in result.log


def test_ctrl_c_ends_every_rank(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*TORCHRUN, WORKER, "interrupt"], stdout=file, stderr=file, cwd=REPOSITORY,
            env=environment(), start_new_session=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        deadline_s = time.monotonic() + 90
        pids: list[int] = []
        while len(pids) < 2 and time.monotonic() < deadline_s and process.poll() is None:
            pids = [int(p) for p in re.findall(r"reached step 3, pid (\d+)", log.read_text())]
            time.sleep(0.2)
        assert len(pids) == 2, log.read_text()[-3000:]
        kill_group(process, signal.SIGINT)  # what a terminal sends on Ctrl-C
        code = process.wait(timeout=60)
        assert code != 0
        assert not any(is_alive(pid) for pid in pids)
    finally:
        kill_group(process)
        process.wait()


def is_alive(pid: int) -> bool:
    """Return whether `pid` exists and is not a zombie."""
    try:
        os.kill(pid, 0)
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
