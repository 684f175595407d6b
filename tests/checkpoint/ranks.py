"""Several ranks' savers in one process: threads for the collectives, one store between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.config import MIB, CheckpointConfig
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Saving
from lowtide.checkpoint.store.claim import CLAIM_FILE

T = TypeVar("T")
DETAILS: dict[str, Any] = {"config": {"checkpoint": {}}, "client_keys": []}


def make_boards(world_size: int) -> list[Board]:
    """Return one board per rank of a new run."""
    store = dist.HashStore()
    return [Board(rank=rank, world_size=world_size, store=store) for rank in range(world_size)]


def on_all(calls: list[Callable[[], T]]) -> list[T]:
    """Make one call per rank at once, as ranks make a collective call."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def make_config(**settings: Any) -> CheckpointConfig:
    """Return settings with times that suit a test."""
    defaults = {"commit_timeout_s": 10.0, "stall_timeout_s": 10.0, "max_wait_s": 10.0}
    return CheckpointConfig.model_validate_json(_json({**defaults, **settings}))


def _json(value: Any) -> str:
    import json

    return json.dumps(value, default=str)


@contextlib.contextmanager
def savers(
    world_size: int = 2, *, buffer_bytes: int = 16 * MIB, **settings: Any
) -> Iterator[list[Saver]]:
    """Give one saver per rank; closed in the end."""
    config = make_config(**settings)
    made = [Saver(config, board, buffer_bytes=buffer_bytes) for board in make_boards(world_size)]
    try:
        yield made
    finally:
        on_all([lambda s=saver: s.close(5.0) for saver in made])  # type: ignore[misc]


def state_of(rank: int, step: int, elements: int = 50_000) -> dict[str, Any]:
    """Return a state that says which rank and step it is of."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {"weights": torch.randn(elements, generator=generator), "rank": rank, "step": step}


def file_name(rank: int) -> str:
    """Return the name of a rank's file, as DeepSpeed would call it."""
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def save(
    all_savers: list[Saver],
    folder: Path,
    step: int,
    *,
    tag: str | None = None,
    states: list[Any] | None = None,
) -> list[Saving]:
    """Save one checkpoint on all ranks, as far as `end`."""

    def save_one(saver: Saver) -> Saving:
        rank = saver.board.rank
        saver.begin(folder, tag or f"step{step}", step=step, details=DETAILS)
        state = states[rank] if states is not None else state_of(rank, step)
        saver.add(state, file_name(rank), is_stable=lambda _tensor: True)
        if rank == 0:
            saver.add({"step": step}, "mp_rank_00_model_states.pt", is_stable=lambda _: True)
        return saver.end()

    return on_all([lambda s=saver: save_one(s) for saver in all_savers])  # type: ignore[misc]


def hidden(folder: Path) -> set[str]:
    """Return what is hidden in `folder`, but for the claim of whoever saves there."""
    if not folder.is_dir():
        return set()
    names = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    return names - {CLAIM_FILE}
