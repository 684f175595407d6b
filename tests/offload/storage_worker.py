"""Run by test_deepspeed_storage.py on 1 and 2 ranks: optimizer state in files, beside stock."""

from __future__ import annotations

import mmap
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from lowtide.core.errors import LowtideError
from lowtide.offload.one_update import OneUpdate
from lowtide.offload.storage.files import ScratchFile
from tests.helpers.memory import resident_bytes
from tests.helpers.ranks import leave_result
from tests.offload.deepspeed_worker import AUTO, RANDOM, Case, build, train

MEMORY_BYTES = 12 * 5300  # of the 9,000 parameters of a rank; three buffers of 1024 among them
MOMENTS = ("exp_avg", "exp_avg_sq")
STEPS = {3: (8, 6), 2: (4, 4), 1: (8, 4)}  # before and after a checkpoint
PAIRS = {  # who writes a checkpoint, and who goes on from it
    3: ("stock stock", "stock random", "random stock", "lazy stock", "lazy lazy"),
    2: ("stock stock", "stock random", "random stock", "lazy stock", "lazy lazy"),
    1: ("stock stock", "stock random", "random stock"),
}
WAYS = {3: ("stock", "host", "random", "auto", "lazy"), 2: ("stock", "random", "lazy")}
WAYS[1] = ("stock", "random")
SETTINGS = {
    3: Case(accumulation=2, groups=True, sometimes=True),
    2: Case(stage=2, accumulation=2, groups=True, sometimes=True),
    1: Case(stage=1, dtype="fp16", clip=0.1),
}


def block(folder: Path, base: dict[str, Any], **storage: Any) -> dict[str, Any]:
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
    rates = {"read_bytes_per_s": 1e9, "write_bytes_per_s": 1e9}  # measuring takes a second
    paths = [{"path": str(folder / name), **rates} for name in ("a", "b")]
    settings = {"paths": paths, "host_memory_bytes": MEMORY_BYTES, "buffers": 3}
    return {**base, "storage": {**settings, **storage}}


def ways(folder: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    return {
        "stock": (None, {}),
        "host": (block(folder, {"device": "cpu", "subgroup_params": 1024}), {}),
        "random": (block(folder, RANDOM), {}),
        "auto": (block(folder, AUTO, direct_io=False, paths=[str(folder / n) for n in "ab"]), {}),
        "lazy": (block(folder, RANDOM), {"checkpoint": {}}),
    }


def updater_of(engine: Any) -> Any:
    return engine.lowtide.offload._updater


def facts_of(engine: Any) -> dict[str, Any]:
    """Return what the tier holds, and what the tensors that it stands for take."""
    plugin = engine.lowtide.offload
    tier = updater_of(engine).tier
    trace = plugin.trace()
    leaves = engine.optimizer._lowtide_offload.leaves()
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
        "moves": plugin.summary()["storage_moves"]["pieces"],
    }


def change(engine: Any, begin: int, step: int) -> list[str] | None:
    """In two steps, read and change state through DeepSpeed's interface. Collective.

    Two, because every other update goes through the pieces the other way round, and what stays in
    buffers is at the other end.
    """
    if step not in (begin, begin + 1) or not engine.is_gradient_accumulation_boundary():
        return None
    # A large one, but under ZeRO 3 stock cannot set one with padding.
    is_divided = engine.zero_optimization_stage() == 3
    weight = engine.module.last.weight if is_divided else engine.module.second.weight
    value = safe_get_full_fp32_param(weight)
    moment = safe_get_full_optimizer_state(weight, "exp_avg")
    safe_set_full_fp32_param(weight, value * 0.75)
    safe_set_full_optimizer_state(weight, moment * 0.5, "exp_avg")
    return [each.double().sum().item() for each in (value, moment)]


def training(folder: Path, stage: int) -> dict[str, Any]:
    """Train, save half way, go on; then every reader goes on from what every writer saved."""
    facts: dict[str, Any] = {}
    case, (first, second) = SETTINGS[stage], STEPS[stage]
    for way in WAYS[stage]:
        chosen, others = ways(folder)[way]
        engine = build(case, chosen, **others)
        if chosen is not None:
            leaves, tier = engine.optimizer._lowtide_offload.leaves(), updater_of(engine).tier
            facts[f"{way} at the start"] = [
                leaves[i].data_ptr() == tier.tensors(i)[0].data_ptr() for i in tier.ranges
            ]
        found = train(engine, case, first)
        engine.save_checkpoint(str(folder / f"{stage} {way}"))
        found += train(engine, case, second, begin=first, look=partial(change, engine, first + 1))
        facts[way] = found
        if chosen is not None:
            facts[f"{way} facts"] = facts_of(engine)
        engine.destroy()
    for pair in PAIRS[stage]:
        writer, reader = pair.split()
        chosen, others = ways(folder)[reader]
        engine = build(case, chosen, **others)
        # Moments and buffers that loading must replace; first updates in fp16 are skipped.
        train(engine, case, first if case.dtype == "fp16" else 2)
        engine.load_checkpoint(str(folder / f"{stage} {writer}"))
        facts[pair] = train(engine, case, first, begin=first)
        if stage < 3 and reader != "stock":
            facts["fragments"] = fragments_are_parts_of_state(engine)
        engine.destroy()
    facts["left over"] = [name for each in ("a", "b") for name in os.listdir(folder / each)]
    return facts


def fragments_are_parts_of_state(engine: Any) -> bool:
    """Whether what DeepSpeed names for each parameter of ZeRO 1 or 2 is where its state is."""
    optimizer, found = engine.optimizer, []
    leaves = optimizer.single_partition_of_fp32_groups
    for group, leaf in zip(optimizer.bit16_groups, leaves, strict=True):
        for mapping in filter(None, (parameter._hp_mapping for parameter in group)):
            for name in (None, *MOMENTS):
                whole = leaf if name is None else optimizer.state[leaf][name]
                begin = whole.data_ptr() + 4 * mapping.get_hp_fragment_address().start
                found.append(mapping.get_hp_fragment(name).data_ptr() == begin)
    return len(found) > 3 and all(found)


def taken_out(folder: Path, stage: int) -> list[list[Any]]:
    """Stock goes on with state that is in files; return what stock does, and what it did."""
    found, case, first = [], SETTINGS[stage], STEPS[stage][0]
    for way in ("stock", "host"):
        engine = build(case, ways(folder)[way][0])
        steps = train(engine, case, first)
        if way == "host":
            engine.lowtide.close()
        steps += train(engine, case, 2, begin=first, look=partial(change, engine, first))
        found.append(steps)
        engine.destroy()
    return found


def failing_alone(folder: Path) -> list[str]:
    """The last rank has no memory left, at the start and in an update: what all ranks say."""
    said = []
    for owner, name in ((ScratchFile, "_check"), (OneUpdate, "on_host")):
        real = getattr(owner, name)

        def failing(*_arguments: Any) -> None:
            raise RuntimeError("not enough memory")

        try:
            if owner is ScratchFile and is_last():
                setattr(owner, name, failing)
            engine = build(Case(), ways(folder)["host"][0])
            train(engine, Case(), 1)
            if is_last():
                setattr(owner, name, failing)
            train(engine, Case(), 1, begin=1)
        except (LowtideError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        setattr(owner, name, real)
    return said


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def failing(folder: Path) -> dict[str, Any]:
    """The last rank's first path refuses a write; then its files return other bytes."""
    facts: dict[str, Any] = {}
    write, read = ScratchFile.write, ScratchFile.read
    case = Case(steps=8)
    for way in ("stock", "host"):
        engine = build(case, ways(folder)[way][0])
        found = train(engine, case, 3)
        if is_last() and way == "host":

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

            if is_last():
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
    folder, *stages = sys.argv[1:]
    facts: dict[str, Any] = {each: training(Path(folder), int(each)) for each in stages}
    facts["taken out"] = {each: taken_out(Path(folder), int(each)) for each in stages}
    if dist.get_world_size() > 1:
        facts["failing"] = failing(Path(folder))
        facts["failing alone"] = failing_alone(Path(folder))
    leave_result(facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
