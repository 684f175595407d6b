"""On a GPU: the codes of the CPU, and memory that is really given back."""

from __future__ import annotations

import pytest
import torch

from lowtide.compression.activations.quantiser import Quantiser
from tests.compression.activations import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_are_those_of_the_cpu_when_rounding_to_the_nearest(
    bits: int, dtype: torch.dtype
) -> None:
    values = torch.randn(10_007, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[5], values[3000:4000] = torch.nan, values[3000:4000].relu()
    codec = Quantiser(bits=bits, group_size=256, is_stochastic=False)
    wanted, found = codec.encode(values), codec.encode(values.cuda())
    # A last digit of the quotient may differ, and with it a code by one step.
    step = wanted.step.repeat_interleave(256)[: values.numel()]
    error = (found.decode().cpu().float() - wanted.decode().float()).abs()
    assert found.decode().cpu().isnan().tolist() == wanted.decode().isnan().tolist()
    assert (error.nan_to_num() <= 1.01 * step + 2.0**-7 * values.float().abs().nan_to_num()).all()
    assert (error.nan_to_num() > 0).float().mean() < 0.01


def test_a_step_holds_less_memory_than_stock_and_learns() -> None:
    held, losses = {}, {}
    for name, block in {"stock": {}, "8": models.block_of(), "4": models.block_of(bits=4)}.items():
        torch.manual_seed(0)
        model = models.Transformer(width=256).cuda()
        loop = models.attached(model, block, lr=1e-3)
        losses[name] = []
        for step in range(20):
            before = torch.cuda.memory_allocated()
            loss = model(*(each.cuda() for each in models.batch(step, rows=64)))
            held[name] = torch.cuda.memory_allocated() - before
            loop.backward(loss)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            losses[name].append(loss.item())
        loop.close()
    assert held["4"] < held["8"] < held["stock"] / 2
    for name in ("8", "4"):
        assert losses[name][-1] == pytest.approx(losses["stock"][-1], rel=0.1)
