"""One rank of test_nodes.py, with the number of its node as torchrun sets it.

python -m tests.checkpoint.nodes_worker plain FOLDER save|load
python -m tests.checkpoint.nodes_worker deepspeed FOLDER
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lowtide.checkpoint.board import open_board
from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.store.finding import Finder
from tests.checkpoint.ranks import file_name, make_config, save, state_of
from tests.helpers.ranks import leave_result


def tiers(folder: Path, every: int) -> list[dict[str, Any]]:
    own = {"path": str(folder / "node{node}"), "scope": "node", "copies": 1}
    return [own, {"path": str(folder / "shared"), "every": every}]


def plain(folder: Path, what: str) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    os.environ["GROUP_RANK"] = str(rank // 2)
    dist.init_process_group("gloo")
    saver = Saver(make_config(tiers=tiers(folder, 100)), open_board(), buffer_bytes=16 * MIB)
    assert saver.peers is not None
    facts: dict[str, Any] = {"node": saver.peers.nodes.number}
    if what == "save":
        for step in (1, 2):
            (saving,) = save([saver], folder / "shared", step)
            assert saver.wait(Stage.DRAINED, 30.0)
            facts["is_replicated"] = saving.is_replicated
    else:
        finder = Finder(saver.board, "full", saver.peers)
        found = finder.find(saver.router.places(folder / "shared"), None, parts=4)
        assert found.folder is not None
        assert found.name is not None
        facts["found"] = str(found.folder / found.name)
        loaded = torch.load(found.folder / found.name / file_name(rank), weights_only=False)
        facts["is_right"] = torch.equal(loaded["weights"], state_of(rank, 2)["weights"])
    saver.close(10.0)
    dist.barrier()
    dist.destroy_process_group()
    return facts


def behind_deepspeed(folder: Path) -> dict[str, Any]:
    """Save on two nodes, lose one, and go on as stock does from the shared level."""
    import deepspeed

    import lowtide
    from lowtide.core.errors import CheckpointError
    from tests.checkpoint.deepspeed_worker import build, ds_config, resumed, steps

    rank = int(os.environ["RANK"])
    os.environ["GROUP_RANK"] = str(rank)
    deepspeed.init_distributed("gloo")
    facts: dict[str, Any] = {}
    for stage in (2, 3):
        place = folder / str(stage)
        block = {"checkpoint": {"tiers": tiers(place, 1)}}
        engine = build(lowtide.initialize, ds_config(stage, block))
        steps(engine, 1)
        engine.save_checkpoint(str(place / "shared"))
        assert engine.lowtide.checkpoint.wait("drained", 60)
        is_replicated = engine.lowtide.checkpoint.status()[0]["is_replicated"]
        engine.destroy()
        dist.barrier()
        if rank == 0:
            shutil.rmtree(place / f"node{stage % 2}")  # once the node that has the model's file
        dist.barrier()
        facts[str(stage)] = {
            "is_replicated": is_replicated,
            "resumed": resumed(lowtide.initialize, ds_config(stage, block), place / "shared"),
            "stock": resumed(deepspeed.initialize, ds_config(stage), place / "shared"),
        }
    # Another stage reads parts of what is on other nodes: told, not half loaded.
    block = {"checkpoint": {"tiers": tiers(folder / "2", 1)}}
    engine = build(lowtide.initialize, ds_config(1, block))
    try:
        engine.load_checkpoint(str(folder / "2" / "shared"))
        facts["other stage"] = "loaded"
    except CheckpointError as error:
        facts["other stage"] = str(error)
    engine.destroy()
    return facts


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        leave_result(plain(Path(sys.argv[2]), sys.argv[3]))
    else:
        leave_result(behind_deepspeed(Path(sys.argv[2])))
