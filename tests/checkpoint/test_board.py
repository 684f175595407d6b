"""Ranks that tell each other things beside the training's communication."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lowtide.checkpoint import verify
from lowtide.checkpoint.board import Board
from lowtide.core.errors import CheckpointError
from tests.checkpoint.ranks import make_boards, on_all
from tests.helpers.ranks import run_ranks


@pytest.mark.dist
def test_last_checkpoint_is_committed_after_the_script_left_its_group(tmp_path: Path) -> None:
    # The store's server lives in rank 0's process, and would end with the group.
    worker = ["-m", "tests.checkpoint.ending_worker", str(tmp_path)]
    for was_under_way, stage, error in run_ranks(worker, timeout_s=90).check().results:
        assert (was_under_way, stage) == (True, "drained"), error
    assert verify(tmp_path / "last").is_ok


def test_what_one_posts_the_others_see() -> None:
    first, second = make_boards(2)
    assert second.look("x") is None
    first.post("x", {"a": [1, None, "text"]})
    assert second.look("x") == {"a": [1, None, "text"]}
    second.forget("x")
    assert first.look("x") is None


def test_all_take_what_rank_0_makes() -> None:
    boards = make_boards(3)
    made = on_all([lambda b=board: b.share("n", lambda: [b.rank]) for board in boards])  # type: ignore[misc]
    assert made == [[0]] * 3


def test_silence_of_rank_0_ends_in_an_error_and_not_in_a_hang() -> None:
    _, second = make_boards(2)
    begin_s = time.monotonic()
    with pytest.raises(CheckpointError, match=r'rank 0 did not share "n" within 0 s'):
        second.share("n", lambda: 1, timeout_s=0.1)
    assert time.monotonic() - begin_s < 10


def test_waiting_ends_early_when_told_to() -> None:
    board = Board()
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    assert board.wait("never", timeout_s=30.0, until=stop.is_set) is None


def test_two_runs_on_one_store_do_not_share_attempts() -> None:
    store = dist.HashStore()
    boards = [Board(store=dist.PrefixStore(name, store)) for name in ("1", "2")]
    assert boards[0].token != boards[1].token
