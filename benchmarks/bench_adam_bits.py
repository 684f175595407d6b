"""Counts the bits in which Lowtide's Adam differs from DeepSpeed's CPUAdam: the answer should be 0.

Every tuple (parameter, gradient, two moments) goes through both in the same process. A third of
the batches holds numbers as in training, a third random bit patterns (every exponent, subnormal,
infinite, NaN), a third special values in all combinations. Settings and steps are drawn anew for
each batch, the gradient's type and scale too; DeepSpeed's side takes its own four passes. NaN
counts as equal to NaN. Results are compared for parameter, both moments and the 16-bit parameter.

    python benchmarks/bench_adam_bits.py --tuples 1e9
    python benchmarks/bench_adam_bits.py --tuples 0 --conversions   # all 2**32 float32 to 16 bit

Ends with status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowtide.core.native import native
from lowtide.offload.adam import AdamStep, Powers, adam_step, update
from lowtide.offload.adam_stock import StockTail, measure_tail

BATCH = 1 << 21
CONVERSION_BATCH = 1 << 24
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIALS = [
    0.0, 1e-45, 2e-45, 1e-40, 1.1754942e-38, 1.17549435e-38, 1e-30, 5.9e-8, 6.1e-5, 1e-8, 1e-4,
    0.1, 0.99999994, 1.0, 1.0000001, 2.0, 1e3, 65504.0, 65520.0, 1e10, 1.8446743e19, 1.8446746e19,
    1e30, 1.7014118e38, 3.4028235e38, float("inf"), float("nan"),
]  # fmt: skip
NAMES = ("param", "exp_avg", "exp_avg_sq", "low_precision")


class Contest:
    """One CPUAdam object and what stands in for it."""

    def __init__(self, op: Any, number: int, tail: StockTail, adamw: bool) -> None:
        self.op, self.number, self.tail, self.adamw = op, number, tail, adamw
        self.powers = Powers(0.9, 0.999)
        op.create_adam(number, 1e-3, 0.9, 0.999, 1e-8, 0.0, adamw, False)

    def mismatches(
        self, tuples: tuple[Tensor, ...], draw: np.random.Generator, step: int, threads: int
    ) -> Counter[str]:
        """Update copies of `tuples` with both; return the number of differences by name."""
        settings = drawn_settings(draw)
        scale = float(np.float32(draw.choice([1.0, 1 / 3, 2.0**-16, 1 / 65536.7])))
        grad_type, low_type = TYPES[draw.integers(3)], TYPES[1 + draw.integers(2)]
        param, grad, exp_avg, exp_avg_sq = (each.clone() for each in tuples)
        grad = grad.to(grad_type)
        low = torch.empty(BATCH, dtype=low_type)
        theirs, their_low = self.stock(tuples, grad, settings, step, scale, low_type)
        update(
            param, grad, exp_avg, exp_avg_sq, self.step(settings, step),
            grad_scale=scale, low_precision=low, tail=self.tail.of(BATCH), threads=threads,
        )  # fmt: skip
        pairs = zip((param, exp_avg, exp_avg_sq, low), (*theirs, their_low), strict=True)
        found = Counter[str]()
        for name, (ours, stock) in zip(NAMES, pairs, strict=True):
            found[name] = differing(ours, stock)
        found["of them NaN in the end"] = int(torch.isnan(param).sum())
        found["of them with a subnormal second moment"] = subnormal(exp_avg_sq)
        return found

    def stock(
        self,
        tuples: tuple[Tensor, ...],
        grad: Tensor,
        s: dict[str, Any],
        step: int,
        scale: float,
        low_type: torch.dtype,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return what DeepSpeed makes of the tuples, and its 16-bit copy."""
        param, _, exp_avg, exp_avg_sq = (each.clone() for each in tuples)
        wide = torch.empty(BATCH)
        wide.copy_(grad)
        wide.mul_(torch.tensor(scale))
        scalars = (s["lr"], *s["betas"], s["eps"], s["weight_decay"], s["bias_correction"])
        self.op.adam_update(self.number, step, *scalars, param, wide, exp_avg, exp_avg_sq)
        low = torch.empty(BATCH, dtype=low_type)
        low.copy_(param)
        return (param, exp_avg, exp_avg_sq), low

    def step(self, settings: dict[str, Any], step: int) -> AdamStep:
        """Return our scalars for the same step."""
        powers = self.powers.advance(step, *settings["betas"])
        return adam_step(powers, **settings, adamw=self.adamw)


def drawn_settings(draw: np.random.Generator) -> dict[str, Any]:
    return {
        "lr": float(draw.choice([0.0, 1e-5, 3e-4, 1e-3, 0.1, 1e3])),
        "betas": (float(draw.choice([0.9, 0.8, 0.95])), float(draw.choice([0.999, 0.95, 0.99]))),
        "eps": float(draw.choice([1e-8, 1e-6, 1e-15, 0.0])),
        "weight_decay": float(draw.choice([0.0, 0.01, 0.1, 1.5])),
        "bias_correction": bool(draw.random() < 0.8),
    }


def batches(count: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield `count` batches of (param, grad, exp_avg, exp_avg_sq), float32 of shape (BATCH,)."""
    source = torch.Generator().manual_seed(seed)
    special = torch.tensor([sign * value for value in SPECIALS for sign in (1.0, -1.0)])
    for number in range(count):
        if number % 3 == 0:
            draws = torch.randn((4, BATCH), generator=source)
            draws *= torch.tensor([0.05, 1.0, 1e-2, 1e-2])[:, None]
            draws[3] = draws[3] ** 2
        elif number % 3 == 1:
            whole = (-(2**31), 2**31)
            integers = torch.randint(*whole, (4, BATCH), generator=source, dtype=torch.int32)
            draws = integers.view(torch.float32)
            draws[3].abs_()
        else:
            draws = special[torch.randint(len(special), (4, BATCH), generator=source)]
            draws[3].abs_()
        yield tuple(draws)


def differing(a: Tensor, b: Tensor) -> int:
    """Return in how many elements the bits differ, NaN being equal to NaN."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    is_other = a.view(integer) != b.view(integer)
    count = int(is_other.sum())
    return count - int((is_other & torch.isnan(a) & torch.isnan(b)).sum()) if count else 0


def subnormal(values: Tensor) -> int:
    smallest = torch.finfo(torch.float32).smallest_normal
    return int(((values != 0) & (values.abs() < smallest)).sum())


def check_updates(tuples: int, seed: int, threads: int) -> Counter[str]:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    op = CPUAdamBuilder().load()
    tail = measure_tail(op)
    print(f"CPUAdam's tail here: {tail}; ours: {native().offload.adam_levels()[-1]}")
    contests = [Contest(op, 4700 + i, tail, adamw=i == 0) for i in range(2)]
    draw = np.random.default_rng(seed)
    found, step = Counter[str](), 0
    count = -(-tuples // BATCH)
    begin_s = shown_s = time.perf_counter()
    for number, batch in enumerate(batches(count, seed), start=1):
        step = step + 1 if draw.random() < 0.7 else int(draw.integers(1, 100_000))
        found += contests[draw.integers(2)].mismatches(batch, draw, step, threads)
        now_s = time.perf_counter()
        if now_s - shown_s > 30 or number == count:
            shown_s = now_s
            print(f"{number * BATCH:,} tuples, {now_s - begin_s:.0f} s", flush=True)
    print(f"tuples compared: {count * BATCH:,}")
    return found


def check_conversions() -> Counter[str]:
    """Round every float32 to both 16-bit types and compare with torch's rounding."""
    found = Counter[str]()
    offload = native().offload
    step = adam_step((0.9, 0.999), lr=0.0, betas=(0.9, 0.999), eps=1.0, weight_decay=0.0)
    zeros = [torch.zeros(CONVERSION_BATCH) for _ in range(3)]
    scalars = offload.AdamStep(**step.scalars(), mode=step.mode, grad_scale=1.0)
    for first in range(-(2**31), 2**31, CONVERSION_BATCH):
        integers = torch.arange(first, first + CONVERSION_BATCH).to(torch.int32)
        for low_type, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
            param = integers.clone().view(torch.float32)
            low = torch.empty(CONVERSION_BATCH, dtype=low_type)
            offload.adam_update(
                scalars, CONVERSION_BATCH, param=param.data_ptr(), exp_avg=zeros[0].data_ptr(),
                exp_avg_sq=zeros[1].data_ptr(), grad=zeros[2].data_ptr(), grad_type="float32",
                low_precision=low.data_ptr(), low_type=name,
            )  # fmt: skip
            found[name] += differing(low, param.to(low_type))
            found["input moved"] += differing(param, integers.view(torch.float32))
    print(f"conversions compared: {2 * 2**32:,}")
    return found


def show(found: Counter[str], names: list[str]) -> None:
    for name in names:
        print(f"  {name}: {found[name]:,}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tuples", type=float, default=1e8, help="at least so many (1e8)")
    parser.add_argument("--conversions", action="store_true", help="also all float32 to 16 bit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = check_updates(int(options.tuples), options.seed, options.threads)
    wrong = sum(found[name] for name in NAMES)
    show(found, [*NAMES, *sorted(set(found) - set(NAMES))])
    if options.conversions:
        conversions = check_conversions()
        wrong += sum(conversions.values())
        show(conversions, ["bfloat16", "float16", "input moved"])
    print("no difference" if wrong == 0 else f"{wrong:,} DIFFERENCES")
    return 0 if wrong == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
