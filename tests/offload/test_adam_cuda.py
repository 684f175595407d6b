"""Adam for the GPU: what the compiler made of it, and its bits where there is a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.offload.adam import update, update_cuda
from tests.offload.adam_cases import (
    NAMES,
    SAME,
    SCHEDULES,
    TYPES,
    Ours,
    State,
    bits,
    mismatches,
    used_state,
    wild,
)

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_only_rounded_and_explicitly_fused_operations_are_compiled(
    architecture: str, tmp_path: Path
) -> None:
    listing, binary = tmp_path / "adam.ptx", tmp_path / "adam.cubin"
    source = str(ROOT / "csrc/offload/cuda/adam.cu")
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{architecture}", f"-I{ROOT}/csrc"]
    for kind, target in (("--ptx", listing), ("--cubin", binary)):
        command = [str(NVCC), *flags, kind, source, "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
    text = listing.read_text()
    operations = set(re.findall(r"\b(?:fma|mul|add|sub|div|sqrt|mad|rcp|rsqrt)\.[a-z.]*f32", text))
    # ptxas fuses only what carries no rounding, so .rn everywhere is the proof.
    assert operations == {"fma.rn.f32", "mul.rn.f32", "add.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
    assert "ftz" not in text
    assert "approx" not in text
    assert re.search(r"ld\.global\.v4", text)
    assert re.search(r"st\.global\.v4", text)


def on_gpu(state: State) -> State:
    return State(**{name: tensor.cuda() for name, tensor in vars(state).items()})


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES, ids=NAMES.get)
def test_gpu_equals_cpu_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    size, schedule = 100_003, SCHEDULES[name]
    on_cpu = used_state(size)
    there = on_gpu(on_cpu)
    source = np.random.default_rng(2)
    ours = Ours(schedule[0][1])
    for number, (step, chosen) in enumerate(schedule):
        grad = wild(size, source).to(dtype)
        low_type = TYPES[number % 3]
        options: dict[str, Any] = {"grad_scale": 0.73, "tail": size % 16}
        low, kept = torch.zeros(size, dtype=low_type), torch.zeros(size)
        low_there, kept_there = low.cuda(), kept.cuda()
        made = ours.step(step, chosen)
        update(*on_cpu.arguments(grad), made, low_precision=low, keep_grad=kept, **options)
        update_cuda(
            *there.arguments(grad.cuda()),
            made,
            low_precision=low_there,
            keep_grad=kept_there,
            **options,
        )
        back = State(**{key: tensor.cpu() for key, tensor in vars(there).items()})
        assert mismatches(on_cpu, back) == SAME
        assert torch.equal(bits(low), bits(low_there.cpu()))
        assert torch.equal(bits(kept), bits(kept_there.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("skip", [0, 1, 2, 4])
def test_gpu_equals_cpu_at_every_size_and_place(skip: int) -> None:
    chosen = SCHEDULES["plain"][0][1]
    step = Ours(chosen).step(3, chosen)
    for size in (*range(40), 1023, 4099):
        on_cpu = used_state(size + skip)
        there = on_gpu(on_cpu).slice(skip, size + skip)
        here = on_cpu.slice(skip, size + skip)
        grad = wild(size + skip, np.random.default_rng(size)).bfloat16()
        low = torch.zeros(size + skip, dtype=torch.bfloat16)
        low_there = low.cuda()
        update(*here.arguments(grad[skip:]), step, low_precision=low[skip:])
        grad_there = grad.cuda()[skip:]
        update_cuda(*there.arguments(grad_there), step, low_precision=low_there[skip:])
        back = State(**{key: tensor.cpu() for key, tensor in vars(there).items()})
        assert mismatches(here, back) == SAME
        assert torch.equal(bits(low), bits(low_there.cpu()))


@pytest.mark.gpu
def test_gpu_update_waits_for_nothing_and_uses_the_current_stream() -> None:
    chosen = SCHEDULES["plain"][0][1]
    step = Ours(chosen).step(3, chosen)
    on_cpu = used_state(1000)
    there = on_gpu(on_cpu)
    grad = wild(1000, np.random.default_rng(0))
    grad_there = torch.zeros(1000, device="cuda")
    pinned = grad.pin_memory()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        grad_there.copy_(pinned, non_blocking=True)
        update_cuda(*there.arguments(grad_there), step)
        assert not stream.query()
    stream.synchronize()
    update(*on_cpu.arguments(grad), step)
    back = State(**{key: tensor.cpu() for key, tensor in vars(there).items()})
    assert mismatches(on_cpu, back) == SAME
