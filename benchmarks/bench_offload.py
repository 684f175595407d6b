"""Planned optimizer updates against stock DeepSpeed, against strides, and against the prediction.

1. Two DeepSpeed engines in one process, ZeRO-3 with CPU offload and bfloat16, one stock and one
   with ``"offload": {"device": "cpu"}``, step in turn on the same data: seconds of ``engine.step``
   and of whole iterations. Nothing is scheduled here; what differs is the passes over memory.
2. An emulated device with the proportions of an H100 (55.2 GB/s per direction, 2.8 and 25 billion
   parameters a second), slowed down 280 times so that two cores can keep up: update times of the
   planned schedule, of the host alone, and of integer strides, in turn. The strides run in our
   executor, whose device never blocks the host: better than the published one.
3. The same device at other proportions and sizes of subgroups: predicted update time against the
   measured one, for planned, strided and random schedules.

Medians over the rounds, after one round to warm up.

    python benchmarks/bench_offload.py [--params 60e6] [--rounds 9] [--only host|emulated|model]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lowtide.core.device import open_device
from lowtide.core.state import StateAuthority
from lowtide.offload.adam import adam_step
from lowtide.offload.executor import Executor
from lowtide.offload.one_update import Pace, Work
from lowtide.offload.plan import Plan, host_only_plan, make_plan, predict, random_plan, stride_plan
from lowtide.offload.rates import Rates
from lowtide.offload.subgroup import Subgroup, cuts

warnings.simplefilter("ignore")
SLOWDOWN = 280.0
H100 = Rates(
    host_to_device_bytes_per_s=55.2e9 / SLOWDOWN,
    device_to_host_bytes_per_s=55.2e9 / SLOWDOWN,
    host_params_per_s=2.8e9 / SLOWDOWN,
    device_params_per_s=25e9 / SLOWDOWN,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, default=60e6, help="of the DeepSpeed engines")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=list(SECTIONS), default=None)
    return parser.parse_args()


# -- 1: passes over memory ----------------------------------------------------------------------


def config_of(offload_optimizer: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 10_000_000,
            "offload_optimizer": offload_optimizer,
        },
        "steps_per_print": 1 << 30,
        **more,
    }


def _engine(params: float, block: dict[str, Any] | None) -> Any:
    import deepspeed

    import lowtide

    torch.manual_seed(0)
    width, layers = 1024, max(1, round(params / 1024**2))
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    config = config_of({"device": "cpu"})
    if block is None:
        start: Callable[..., Any] = deepspeed.initialize
    else:
        start, config["lowtide"] = lowtide.initialize, {"offload": block}
    return start(model=model, model_parameters=model.parameters(), config=config)[0]


def _iterate(engine: Any, x: torch.Tensor) -> tuple[float, float]:
    begin_s = time.perf_counter()
    engine.backward(engine(x).float().square().mean())
    step_s = time.perf_counter()
    engine.step()
    end_s = time.perf_counter()
    return end_s - step_s, end_s - begin_s


def host(arguments: argparse.Namespace, console: Console) -> None:
    """Print what planned updates cost on the host alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    blocks = {
        "stock": None,
        "offload, host only": {"device": "cpu"},
        "offload, fraction 0": {"device": "emulated", "fraction": 0.0, "residents": False},
    }
    engines = {name: _engine(arguments.params, block) for name, block in blocks.items()}
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for turn in range(arguments.rounds + 2):
        for name, engine in engines.items():
            found = _iterate(engine, x)
            if turn >= 2:
                times[name].append(found)
    masters = {
        name: [each.detach() for each in engine.optimizer.fp32_partitioned_groups_flat]
        for name, engine in engines.items()
    }
    title = f"ZeRO-3, {arguments.params / 1e6:.0f}M parameters, {torch.get_num_threads()} thread(s)"
    table = Table(title=title)
    for column in ("", "step s", "of stock", "iteration s", "of stock", "same bits as stock"):
        table.add_column(column, justify="right")
    base = [statistics.median(each) for each in zip(*times["stock"], strict=True)]
    for name, found in times.items():
        step_s, iteration_s = (statistics.median(each) for each in zip(*found, strict=True))
        is_same = all(map(torch.equal, masters[name], masters["stock"]))
        table.add_row(
            name, f"{step_s:.3f}", f"{step_s / base[0]:.2f}", f"{iteration_s:.3f}",
            f"{iteration_s / base[1]:.2f}", str(is_same),
        )  # fmt: skip
    console.print(table)
    for engine in engines.values():
        engine.destroy()
    torch.distributed.destroy_process_group()


# -- 2 and 3: schedules on an emulated device -----------------------------------------------------


class Lanes:
    """An executor over made-up subgroups on an emulated device."""

    def __init__(self, device: Any, rates: Rates, sizes: list[int]) -> None:
        self.rates = rates
        subgroups = [
            Subgroup(
                key=f"subgroup/{i}", group=0, flat=i, begin=0, master=torch.randn(numel),
                exp_avg=torch.zeros(numel), exp_avg_sq=torch.zeros(numel),
                weights=torch.zeros(numel, dtype=torch.bfloat16),
            )
            for i, numel in enumerate(sizes)
        ]  # fmt: skip
        pace = Pace(device=rates.device_params_per_s, host=rates.host_params_per_s)
        self.executor = Executor(device, subgroups, StateAuthority(), pace)
        step = adam_step((0.9, 0.95), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.works = [Work(torch.randn(n).bfloat16(), 1.0, step) for n in sizes]
        self.pieces = self.executor.pieces()

    def time_s(self, plan: Plan) -> float:
        """Carry out a plan; return its seconds."""
        return self.executor.run(plan, self.works).makespan_s


@contextmanager
def lanes(rates: Rates, sizes: list[int], memory_bytes: int) -> Iterator[Lanes]:
    """Give an executor at these rates."""
    device = open_device(
        "emulated",
        memory_bytes=memory_bytes + 4 * max(sizes),
        host_to_device_bytes_per_s=rates.host_to_device_bytes_per_s,
        device_to_host_bytes_per_s=rates.device_to_host_bytes_per_s,
    )
    with device:
        made = Lanes(device, rates, sizes)
        yield made
        made.executor.close()


def emulated(arguments: argparse.Namespace, console: Console) -> None:
    """Print update times of schedules at the proportions of an H100."""
    sizes = [count for _, count in cuts(24 * 400_000, 400_000)]
    memory = 3 * 16 * max(sizes)
    more = memory + 12 * sum(sizes) // 4
    with lanes(H100, sizes, more) as found:
        options = {"memory_bytes": memory, "keep_residents": False}
        plans = {
            "host only": host_only_plan(found.pieces),
            **{f"stride {k}": stride_plan(found.pieces, k) for k in (2, 3, 4, 6)},
            "planned, 1 slot": make_plan(found.pieces, H100, max_slots=1, **options),
            "planned, 2 slots": make_plan(found.pieces, H100, max_slots=2, **options),
            "planned, more memory": make_plan(found.pieces, H100, max_slots=2, memory_bytes=more),
        }
        times: dict[str, list[float]] = {name: [] for name in plans}
        for turn in range(arguments.rounds + 1):
            for name, plan in plans.items():
                found.time_s(plan)  # settles who is resident
                passed_s = found.time_s(plan)
                if turn:
                    times[name].append(passed_s)
        medians = {name: statistics.median(each) for name, each in times.items()}
        best = min(value for name, value in medians.items() if name.startswith("stride"))
        predicted = {
            name: predict(found.pieces, plan, H100, memory_bytes=more).makespan_s or 0.0
            for name, plan in plans.items()
        }
        bound = plans["planned, 2 slots"].lower_bound_s or 0.0
        table = Table(title=f"24 subgroups of 400k, H100's proportions; lower bound {bound:.3f} s")
        columns = (
            "",
            "fraction",
            "predicted s",
            "s",
            "of host only",
            "best stride takes",
            "of bound",
        )
        for column in columns:
            table.add_column(column, justify="right")
        for name, value in medians.items():
            table.add_row(
                name, f"{plans[name].fraction:.3f}", f"{predicted[name]:.3f}", f"{value:.3f}",
                f"{value / medians['host only']:.2f}", f"{best / value:.2f}x",
                f"{value / bound:.2f}" if "more" not in name else "",
            )  # fmt: skip
        console.print(table)


def model(arguments: argparse.Namespace, console: Console) -> None:
    """Print how far predicted update times are from measured ones."""
    errors: dict[str, list[float]] = {"planned": [], "stride": [], "random": []}
    worst: list[tuple[float, str]] = []
    for link in (0.35, 1.0, 2.0):
        for device_rate in (0.3, 1.0):
            for numel in (100_000, 400_000):
                rates = H100.replace(
                    host_to_device_bytes_per_s=H100.host_to_device_bytes_per_s * link,
                    device_to_host_bytes_per_s=H100.device_to_host_bytes_per_s * link,
                    device_params_per_s=H100.device_params_per_s * device_rate,
                )
                sizes = [count for _, count in cuts(4_800_000, numel)]
                memory = 4 * 16 * max(sizes)
                with lanes(rates, sizes, memory) as found:
                    pieces = found.pieces
                    plans = [("planned", make_plan(pieces, rates, memory_bytes=memory))]
                    plans += [("stride", stride_plan(pieces, k)) for k in (2, 3)]
                    plans += [
                        ("random", random_plan(pieces, seed, memory_bytes=memory))
                        for seed in range(3)
                    ]
                    for name, plan in plans:
                        predicted = predict(pieces, plan, rates, memory_bytes=memory)
                        times = [found.time_s(plan) for _ in range(1 + min(arguments.rounds, 3))]
                        measured_s = statistics.median(times[1:])
                        predicted_s = predicted.makespan_s or 0.0
                        error = abs(predicted_s - measured_s) / measured_s
                        errors[name].append(error)
                        worst.append((error, f"{name}, link {link}, device {device_rate}, {plan}"))
    for error, what in sorted(worst)[-3:]:
        console.print(f"off by {error:.1%}: {what}", highlight=False)
    table = Table(title="|predicted - measured| / measured")
    for column in ("schedules", "count", "median %", "95th percentile %", "worst %"):
        table.add_column(column, justify="right")
    everything = [each for group in errors.values() for each in group]
    for name, group in [*errors.items(), ("all", everything)]:
        ordered = sorted(group)
        tail = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
        table.add_row(
            name, str(len(group)), f"{100 * statistics.median(group):.1f}", f"{100 * tail:.1f}",
            f"{100 * ordered[-1]:.1f}",
        )  # fmt: skip
    console.print(table)


SECTIONS = {"host": host, "emulated": emulated, "model": model}


def main() -> None:
    arguments = parse()
    console = Console(width=120)
    for name, section in SECTIONS.items():
        if arguments.only in (None, name):
            console.print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
            section(arguments, console)


if __name__ == "__main__":
    main()
