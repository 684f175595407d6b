"""Small copies as a level of storage: what they refer to is kept, and missed when it is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lowtide.checkpoint import list_checkpoints, verify
from lowtide.checkpoint.compact.copies import bases_of
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.store.finding import Finder
from lowtide.checkpoint.store.retention import finish_published
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
