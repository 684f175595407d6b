"""One signal on one rank of a real 2-rank DeepSpeed run: all stop at one step and go on from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowtide.core.restart import choose, read_stop
from tests.helpers.ranks import RankResult, run_ranks

pytestmark = pytest.mark.dist

WORKER = str(Path(__file__).with_name("stop_worker.py"))


def _run(mode: str, folder: Path) -> RankResult:
    return run_ranks([WORKER, mode, str(folder)], timeout_s=90).check()  # exit code 0 on every rank


def test_unchanged_script_saves_stops_and_goes_on(tmp_path: Path) -> None:
    result = _run("exit", tmp_path)
    assert "reached the end" not in result.log
    first, second = result.results
    assert first["micro"] == second["micro"] == 0  # it left inside the call that ends the step
    stopped = first["step"] + 1
    assert second["step"] + 1 == stopped
    assert 6 <= stopped <= 7  # the step of the signal or the one after
    record = read_stop(tmp_path)
    assert record is not None
    assert (record.reason, record.step, record.wants_restart) == ("time_limit", stopped, True)
    tag = f"global_step{record.step}"
    assert record.checkpoint == str(tmp_path / "ckpt" / tag)
    _run("again", tmp_path)  # resumed, and stopped before the script has saved anything itself
    later = read_stop(tmp_path)
    assert later is not None
    assert later.step >= record.step + 6
    assert later.checkpoint == str(tmp_path / "ckpt" / f"global_step{later.step}")
    shutil.rmtree(later.checkpoint)
    # A newer one, cut short: `latest` names it, and the restart must not believe that.
    newer = tmp_path / "ckpt" / "global_step9"
    newer.mkdir()
    for part in (tmp_path / "ckpt" / tag).glob("*.pt"):
        if "zero_pp_rank_1" not in part.name:
            (newer / part.name).write_bytes(part.read_bytes())
    (tmp_path / "ckpt" / "latest").write_text("global_step9")
    resumed = _run("resume", tmp_path)
    assert all(found["step"] == record.step for found in resumed.results)
    assert tag in resumed.results[1]["path"]
    assert "checkpoint global_step9 is not used: 1 of 2 optimizer parts" in resumed.logs[0]
    for path in (tmp_path / "ckpt").glob("*/*optim_states.pt"):
        path.unlink()
    nothing = _run("damaged", tmp_path)
    assert [found["path"] for found in nothing.results] == [None, None]
    assert "training starts at step 0" in nothing.logs[0]


def test_script_that_asks_saves_and_leaves_by_itself(tmp_path: Path) -> None:
    result = _run("tell", tmp_path)
    step = result.results[0]["step"]
    assert result.results == [{"step": step, "reason": "time_limit"}] * 2
    record = read_stop(tmp_path)
    assert record is not None
    assert record.checkpoint == str(tmp_path / "mine" / f"global_step{step}")


def test_checkpoint_without_the_scripts_own_state_is_not_written(tmp_path: Path) -> None:
    result = _run("client_state", tmp_path)
    assert "set engine.lowtide.stop.client_state" in result.logs[0]
    record = read_stop(tmp_path)
    assert record is not None
    assert record.step > 0
    assert record.checkpoint == str(tmp_path / "ckpt" / "global_step0")
    assert choose(tmp_path / "ckpt", world_size=2).step == 0


def test_record_is_taken_back_before_a_checkpoint_is_overwritten(tmp_path: Path) -> None:
    result = _run("overwritten", tmp_path)
    expected = {"recorded": [True, False], "error": "no space left on device"}
    assert result.results == [expected] * 2


def test_run_without_a_signal_reaches_its_end(tmp_path: Path) -> None:
    result = _run("uninterrupted", tmp_path)
    assert "reached the end" in result.log
    assert not (tmp_path / "stop.json").exists()
