"""The differentiable pieces by themselves, on one rank: derivatives, and where they round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowtide.tensor_parallel.decoder import rotate
from lowtide.tensor_parallel.functions import partial_down, up
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.norms import NormSetting, rms_norm
from lowtide.tensor_parallel.reduction import recover

ALONE = TensorGroup()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False),
                                     (False, False, True), (False, True, True)])  # fmt: skip
def test_derivatives_of_the_norm_and_a(trained: tuple[bool, ...]) -> None:
    inputs = [drawn(2, 3, 6), drawn(4, 6, seed=1), drawn(6, seed=2)]
    for each, is_trained in zip(inputs, trained, strict=True):
        each.requires_grad_(is_trained)

    def whole(x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
        norm = NormSetting(6, 0.3)
        total, *statistics = partial_down(x, weight, ALONE, norm, gain)
        return recover(total, tuple(statistics), norm, x.dtype)

    assert torch.autograd.gradcheck(whole, inputs)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("sizes", [(5,), (3, 3), (4, 3, 3), (3, 3, 4), (2, 3, 2)])
def test_derivatives_of_b(sizes: tuple[int, ...], trained: tuple[bool, bool]) -> None:
    latent, weight = drawn(2, 3, 4 * len(sizes)), drawn(sum(sizes), 4, seed=1)
    outputs = up(latent, weight, sizes, ALONE)
    blocks = zip(latent.split(4, -1), weight.split(sizes), strict=True)
    for output, (z, block) in zip(outputs, blocks, strict=True):
        torch.testing.assert_close(output, z @ block.T)
    latent.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    assert torch.autograd.gradcheck(lambda z, b: up(z, b, sizes, ALONE), (latent, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_division_by_the_norm_rounds_once(dtype: torch.dtype) -> None:
    """Forward and backward: a norm in 16 bits, or a division there, would be another rounding."""
    total = drawn(64, 32, dtype=dtype).requires_grad_()
    squares = (drawn(64, seed=1).abs() * 100 + 1).float().requires_grad_()
    gradient = drawn(64, 32, seed=2, dtype=dtype)
    latent = recover(total, (squares,), NormSetting(48, 1e-5), dtype)
    latent.backward(gradient)
    assert total.grad is not None
    assert squares.grad is not None
    rms = (squares.detach().double() / 48 + 1e-5).sqrt().unsqueeze(-1)
    half_unit = torch.finfo(dtype).eps / 2

    def relative(got: Tensor, want: Tensor) -> float:
        return ((got.double() - want) / want).abs().max().item()

    assert relative(latent.detach(), total.detach().double() / rms) <= half_unit * 1.001
    assert relative(total.grad, gradient.double() / rms) <= half_unit * 1.001
    wanted = -(gradient.double() * latent.detach().double()).sum(-1) / (2 * 48) / rms[:, 0] ** 2
    assert ((squares.grad.double() - wanted).norm() / wanted.norm()).item() <= 1e-6


def test_norm_of_one_rank_takes_gains_of_another_dtype() -> None:
    x, gain = drawn(5, 8), drawn(8, seed=1)
    want = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * gain
    cases: list[tuple[Any, Any, float]] = [
        (torch.float64, torch.float64, 1e-14), (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-2), (torch.float32, torch.bfloat16, 1e-2),
    ]  # fmt: skip
    for dtype, gain_dtype, bound in cases:
        got = rms_norm(x.to(dtype), gain.to(gain_dtype), 0.1)
        assert got.dtype == dtype
        assert ((got.double() - want).norm() / want.norm()).item() < bound


def test_rotation_turns_pairs_and_keeps_lengths() -> None:
    x = drawn(2, 3, 5, 8)
    angles = drawn(5, 4, seed=1)
    both = torch.cat((angles, angles), -1)
    turned = rotate(x, both.cos(), both.sin())
    number = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)
    torch.testing.assert_close(turned, torch.cat((number.real, number.imag), -1))
    by_row = both.expand(2, 5, 8)
    torch.testing.assert_close(rotate(x, by_row.cos(), by_row.sin()), turned)
