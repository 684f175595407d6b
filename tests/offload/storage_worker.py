"""Run by test_deepspeed_storage.py on 2 ranks: optimizer state in files, beside stock."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from lowtide.core.errors import LowtideError
from lowtide.offload.storage.files import ScratchFile
from tests.helpers.memory import resident_bytes
from tests.helpers.ranks import leave_result
from tests.offload.deepspeed_worker import AUTO, RANDOM, Case, build, train

MEMORY_BYTES = 12 * 5300  # of the 9,000 parameters of a rank; three buffers of 1024 among them
MOMENTS = ("exp_avg", "exp_avg_sq")
CASE = Case(accumulation=2, groups=True, sometimes=True)


def block(folder: Path, base: dict[str, Any], **storage: Any) -> dict[str, Any]:
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
    paths = [str(folder / "a"), {"path": str(folder / "b")}]
    settings = {"paths": paths, "host_memory_bytes": MEMORY_BYTES, "buffers": 3}
    return {**base, "storage": {**settings, **storage}}


def ways(folder: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    return {
        "stock": (None, {}),
        "host": (block(folder, {"device": "cpu", "subgroup_params": 1024}), {}),
        "random": (block(folder, RANDOM), {}),
        "auto": (block(folder, AUTO, direct_io=False), {}),
        "lazy": (block(folder, RANDOM), {"checkpoint": {}}),
    }


def updater_of(engine: Any) -> Any:
    return engine.lowtide.offload._updater


def facts_of(engine: Any) -> dict[str, Any]:
    """Return what the tier holds, and what the tensors that it stands for take."""
    plugin = engine.lowtide.offload
    tier = updater_of(engine).tier
    trace = plugin.trace()
    leaves = engine.optimizer.fp32_partitioned_groups_flat
    tensors = [leaf.data for leaf in leaves]
    tensors += [engine.optimizer.optimizer.state[x][k] for x in leaves for k in MOMENTS]
    return {
        "memory": tier.in_memory_bytes(),
        "resident": sum(map(resident_bytes, tensors)),
        "pages": 2 * len(tensors) * mmap.PAGESIZE,  # of both ends, which others use too
        "buffers": sum(resident_bytes(e.memory) for e in [*tier.free, *tier.held.values()]),
        "stored": sum(tier.stored_bytes()),
        "state": sum(12 * leaf.numel() for leaf in leaves),
        "lanes": sorted({each["lane"] for each in trace}),
        "plan": [len(plugin.plan().stored_order), len(plugin.plan().host_order)],
        "chart": plugin.chart(),
        "summary": plugin.summary()["storage"],
    }


def training(folder: Path) -> dict[str, Any]:
    """Train, save half way, go on; then every reader goes on from what every writer saved."""
    facts: dict[str, Any] = {}
    for way, (chosen, others) in ways(folder).items():
        engine = build(CASE, chosen, **others)
        if chosen is not None:
            leaves, tier = engine.optimizer.fp32_partitioned_groups_flat, updater_of(engine).tier
            facts[f"{way} at the start"] = [
                leaves[i].data_ptr() == tier.tensors(i)[0].data_ptr() for i in tier.ranges
            ]
        found = train(engine, CASE, 8)
        engine.save_checkpoint(str(folder / way))
        facts[way] = [*found, *train(engine, CASE, 6, begin=8)]
        if chosen is not None:
            facts[f"{way} facts"] = facts_of(engine)
        engine.destroy()
    for writer, reader in [
        ("stock", "stock"), ("stock", "random"), ("random", "stock"), ("lazy", "stock"),
        ("lazy", "lazy"),
    ]:  # fmt: skip
        chosen, others = ways(folder)[reader]
        engine = build(CASE, chosen, **others)
        train(engine, CASE, 2)  # moments and buffers that loading must replace
        engine.load_checkpoint(str(folder / writer))
        facts[f"{writer} {reader}"] = train(engine, CASE, 8, begin=8)
        engine.destroy()
    facts["left over"] = [name for each in ("a", "b") for name in os.listdir(folder / each)]
    return facts


def taken_out(folder: Path) -> list[Any]:
    """Stock goes on with state that is in files."""
    engine = build(CASE, ways(folder)["host"][0])
    first = train(engine, CASE, 4)
    engine.lowtide.close()
    rest = train(engine, CASE, 4, begin=4)
    engine.destroy()
    return [*first, *rest]


def failing(folder: Path) -> dict[str, Any]:
    """The last rank's first path refuses a write; then its files return other bytes."""
    facts: dict[str, Any] = {}
    is_last = dist.get_rank() == dist.get_world_size() - 1
    write, read = ScratchFile.write, ScratchFile.read
    case = Case(steps=8)
    for way in ("stock", "host"):
        engine = build(case, ways(folder)[way][0])
        found = train(engine, case, 3)
        if is_last and way == "host":

            def refused(self: ScratchFile, *arguments: Any) -> int:
                if self.folder.name == "a":
                    raise OSError(5, "injected")
                return write(self, *arguments)

            ScratchFile.write = refused  # type: ignore[method-assign]
        facts[way] = [*found, *train(engine, case, 5, begin=3)]
        if way == "host":
            facts["stored after"] = updater_of(engine).tier.stored_bytes()

            def flipped(self: ScratchFile, target: torch.Tensor, *arguments: Any) -> int:
                return read(self, target, *arguments) ^ 1

            if is_last:
                ScratchFile.read = flipped  # type: ignore[method-assign]
            try:
                train(engine, case, 2, begin=8)  # the first of them is not checked: see `drain`
            except LowtideError as error:
                facts["error"] = f"{type(error).__name__}: {error}"
            ScratchFile.read, ScratchFile.write = read, write  # type: ignore[method-assign]
        engine.destroy()
    return facts


def main() -> None:
    deepspeed.init_distributed("gloo")
    folder = Path(sys.argv[1])
    facts = training(folder)
    facts["taken out"] = taken_out(folder)
    facts["failing"] = failing(folder)
    leave_result(facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
