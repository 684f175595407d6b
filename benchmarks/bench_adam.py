"""One Adam update of one piece of state: Lowtide's kernels and the fused ones that people use.

Every rival does the same work in turn, on the same numbers: a 16-bit gradient comes in, float32
masters and moments change, 16-bit weights go out. Who has no such operation is given the passes
that its users make: widening the gradient before, rounding the weights after.

On the CPU: DeepSpeed's CPUAdam and torch's fused AdamW. Where there is a GPU, there too, with
DeepSpeed's FusedAdam and, if it is installed, apex's (which makes other bits: they round in
another order than CPUAdam).

    python benchmarks/bench_adam.py [--params 32e6] [--rounds 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowtide.offload.adam import Powers, adam_step, update, update_cuda

LR, BETAS, EPSILON, DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1


class Piece:
    """State of one piece, and what is updated beside it."""

    def __init__(self, count: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.param = torch.randn(count, generator=generator).to(device)
        self.grad = torch.randn(count, generator=generator).to(device, torch.bfloat16)
        self.exp_avg = torch.zeros(count, device=device)
        self.exp_avg_sq = torch.zeros(count, device=device)
        self.weights = torch.zeros(count, device=device, dtype=torch.bfloat16)


def ours(count: int, device: str) -> Callable[[], None]:
    piece, powers = Piece(count, device), Powers(*BETAS)
    function = update if device == "cpu" else update_cuda
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        made = adam_step(
            powers.advance(number, *BETAS), lr=LR, betas=BETAS, eps=EPSILON, weight_decay=DECAY
        )
        function(
            piece.param, piece.grad, piece.exp_avg, piece.exp_avg_sq, made,
            low_precision=piece.weights,
        )  # fmt: skip

    return step


def cpu_adam(count: int, _device: str) -> Callable[[], None]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    piece = Piece(count, "cpu")
    parameter = torch.nn.Parameter(piece.param)
    optimizer = DeepSpeedCPUAdam(
        [parameter], lr=LR, betas=BETAS, eps=EPSILON, weight_decay=DECAY, adamw_mode=True
    )
    return _between(piece, parameter, optimizer)


def torch_fused(count: int, device: str) -> Callable[[], None]:
    piece = Piece(count, device)
    parameter = torch.nn.Parameter(piece.param)
    optimizer = torch.optim.AdamW(
        [parameter], lr=LR, betas=BETAS, eps=EPSILON, weight_decay=DECAY, fused=True
    )
    return _between(piece, parameter, optimizer)


def fused_adam(count: int, device: str) -> Callable[[], None]:
    from deepspeed.ops.adam import FusedAdam

    piece = Piece(count, device)
    parameter = torch.nn.Parameter(piece.param)
    optimizer = FusedAdam([parameter], lr=LR, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    return _between(piece, parameter, optimizer)


def apex(count: int, device: str) -> Callable[[], None]:
    from apex.optimizers import FusedAdam

    piece = Piece(count, device)
    parameter = torch.nn.Parameter(piece.param)
    optimizer = FusedAdam(
        [parameter], lr=LR, betas=BETAS, eps=EPSILON, weight_decay=DECAY, adam_w_mode=True
    )
    return _between(piece, parameter, optimizer)


def _between(piece: Piece, parameter: Tensor, optimizer: Any) -> Callable[[], None]:
    parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        parameter.grad.copy_(piece.grad)  # type: ignore[union-attr]
        optimizer.step()
        piece.weights.copy_(parameter.detach())

    return step


RIVALS: dict[str, dict[str, Callable[[int, str], Callable[[], None]]]] = {
    "cpu": {"Lowtide": ours, "DeepSpeed CPUAdam": cpu_adam, "torch AdamW, fused": torch_fused},
    "cuda": {
        "Lowtide": ours, "DeepSpeed FusedAdam": fused_adam, "torch AdamW, fused": torch_fused,
        "apex FusedAdam": apex,
    },
}  # fmt: skip


def compare(device: str, count: int, rounds: int, console: Console) -> None:
    """Time all that start on `device`, in turn, and print medians and ratios."""
    steps: dict[str, Callable[[], None]] = {}
    for name, make in RIVALS[device].items():
        try:
            steps[name] = make(count, device)
            steps[name]()
        except Exception as error:
            if make is ours:
                raise
            console.print(f"{name} does not start here: {str(error).splitlines()[0][:100]}")
            steps.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            _wait(device)
            begin_s = time.perf_counter()
            step()
            _wait(device)
            if number:  # the first warms up
                times[name].append(time.perf_counter() - begin_s)
    table = Table("update", "ms", "Gparam/s", "Lowtide takes", "least .. most", box=None)
    fastest = times["Lowtide"]
    for name, found in times.items():
        ratios = [mine / theirs for mine, theirs in zip(fastest, found, strict=True)]
        median = statistics.median(found)
        table.add_row(
            name, f"{median * 1e3:.1f}", f"{count / median / 1e9:.2f}",
            f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} .. {max(ratios):.2f}",
        )  # fmt: skip
    console.print(f"{count / 1e6:.0f} million parameters on {device}, {rounds} rounds in turn")
    console.print(table)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Compare on the CPU, and on the GPU where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, default=32e6)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    console = Console(width=100)
    console.print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}")
    compare("cpu", int(arguments.params), arguments.rounds, console)
    if torch.cuda.is_available():
        compare("cuda", int(arguments.params), arguments.rounds, console)


if __name__ == "__main__":
    main()
