"""Small copies as a level of storage: what they refer to is kept, and missed when it is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lowtide.checkpoint import list_checkpoints
from lowtide.checkpoint.compact.copies import bases_of
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.store.finding import Finder
from tests.checkpoint.ranks import save, savers


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
