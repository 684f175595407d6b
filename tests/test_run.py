"""``python -m lowtide.run``: the script sees the arguments it would see without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import run_command

pytestmark = pytest.mark.dist

SCRIPT = """
import json, sys
import deepspeed, neighbour
print("FOUND", json.dumps([__name__, sys.argv, hasattr(deepspeed.initialize, "_lowtide_stock")]))
sys.exit(7)
"""


def test_script_runs_as_main_with_its_own_arguments(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("")
    # DeepSpeed's launcher puts --local_rank before the script.
    for target in (["train.py"], ["-m", "train"]):
        argv = [sys.executable, "-m", "lowtide.run", "--local_rank=1", *target, "--steps", "3"]
        result = run_command(argv, cwd=tmp_path, timeout_s=90)
        line = next(line for line in result.log.splitlines() if line.startswith("FOUND"))
        name, seen, is_enabled = json.loads(line.removeprefix("FOUND"))
        assert name == "__main__"
        assert Path(seen[0]).stem == "train"
        assert seen[1:] == ["--local_rank=1", "--steps", "3"]
        assert is_enabled
        assert result.returncode == 7


def test_usage_is_shown_without_a_script() -> None:
    result = run_command([sys.executable, "-m", "lowtide.run"], timeout_s=60)
    assert result.returncode == 2
    assert "usage: python -m lowtide.run" in result.log
