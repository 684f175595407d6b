"""Small copies as a level of storage: what they refer to is kept, and missed when it is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from typer.testing import CliRunner

from lowtide.checkpoint import list_checkpoints, verify
from lowtide.checkpoint.compact.copies import bases_of
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.store.finding import Finder
from lowtide.checkpoint.store.retention import finish_published
from lowtide.cli import app
from lowtide.core import restart
from tests.checkpoint.ranks import save, savers
from tests.helpers.checkpoints import ATTEMPT


def test_finder_leaves_out_what_refers_to_a_lost_base(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    tiers = [{"path": str(fast)}, {"path": str(slow), "compact": {"delta": True}}]
    frozen = torch.randn(1 << 20)
    with savers(1, tiers=tiers) as (saver,):
        for step in (1, 2):
            state = {"weights": frozen, "step": step}
            save([saver], slow, step, states=[state])
            assert saver.wait(Stage.DRAINED, 30)
        finder = Finder(saver.board, "full")
        assert finder.find([slow], None, parts=None).name == "step2"
        assert bases_of(slow / "step2")
        shutil.rmtree(slow / "step1")
        found = finder.find([slow], None, parts=None)
    assert found.name is None
    assert "it refers to step1, which is not there any more" in found.skipped[0]


def test_a_base_is_not_replaced_by_an_unfinished_checkpoint_of_its_name(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    tiers = [{"path": str(fast)}, {"path": str(slow), "compact": {"delta": True}}]
    frozen = torch.randn(1 << 20)
    with savers(1, tiers=tiers) as (saver,):
        for step in (1, 2):
            save([saver], slow, step, states=[{"weights": frozen, "step": step}])
            assert saver.wait(Stage.DRAINED, 30)
    hidden = slow / f".step1.{ATTEMPT}.part"
    shutil.copytree(slow / "step1", hidden)
    record = restart.read_record(hidden)
    assert record is not None
    record |= {"step": 9, "time_s": record["time_s"] + 10, "attempt": ATTEMPT}
    restart.write_durable(hidden / restart.RECORD_FILE, record, has_checksum=True)
    assert finish_published(slow) == []
    assert hidden.is_dir()
    assert verify(slow / "step2").is_ok
    shutil.rmtree(slow / "step2")
    assert finish_published(slow) == ["step1"]


def test_retention_keeps_what_is_referred_to(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    tiers = [{"path": str(fast)}, {"path": str(slow), "compact": {"delta": True}}]
    frozen = torch.randn(1 << 20)
    with savers(1, tiers=tiers, keep=1) as (saver,):
        for step in (1, 2, 3):
            state = {"weights": frozen, "step": step}
            save([saver], slow, step, states=[state])
            assert saver.wait(Stage.DRAINED, 30)
    assert [e.tag for e in list_checkpoints(fast)] == ["step3"]
    needed = {tag for tag, _ in bases_of(slow / "step3")}
    assert needed
    assert needed < {e.tag for e in list_checkpoints(slow)}


def test_small_copies_are_told_and_refer_to_what_lies_beside_them(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    tiers = [{"path": str(fast)}, {"path": str(slow), "compact": {"delta": True}}]
    frozen = torch.randn(1 << 20)
    with savers(1, tiers=tiers, keep=1) as (saver,):
        for step, tag in enumerate(("step0", "run/step1", "run/step2", "run/step3")):
            save([saver], slow, step, states=[{"weights": frozen, "step": step}], tag=tag)
            assert saver.wait(Stage.DRAINED, 30)
    # step0 is not beside them, so it is none of their bases.
    needed = {tag for tag, _ in bases_of(slow / "run" / "step3")}
    assert needed
    assert needed <= {"step1", "step2"}
    by_tag = {entry.tag: entry for entry in list_checkpoints(tmp_path, below=True)}
    assert set(by_tag) >= {"fast/step0", "fast/run/step3", "slow/step0", "slow/run/step3"}
    assert "fast/run/step2" not in by_tag
    assert {tag for tag, entry in by_tag.items() if not entry.is_compact} == {
        "fast/step0",
        "fast/run/step3",
    }
    shown = CliRunner().invoke(app, ["checkpoint", "ls", str(slow)], env={"COLUMNS": "200"})
    rows = shown.stdout.splitlines()[1:]
    assert all("complete, compact" in row for row in rows)
    assert rows[0].startswith("run/step3  <- latest")
    shown = CliRunner().invoke(app, ["checkpoint", "ls", str(tmp_path), "--json"])
    found = {each["tag"]: each["is_compact"] for each in json.loads(shown.stdout)["checkpoints"]}
    assert found == {tag: entry.is_compact for tag, entry in by_tag.items()}
    assert "compact" not in CliRunner().invoke(app, ["checkpoint", "ls", str(fast)]).stdout
