"""Factors: against numpy's decomposition, by brute force, and from a seed alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.factors import (
    Factors,
    decompose,
    energy_rank,
    random_factors,
    seeded_generator,
    svd_factors,
)


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_product_is_the_best_approximation(shape: tuple[int, int], rank: int) -> None:
    weight = matrix(*shape)
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    expected = left[:, :rank] * values[:rank] @ right[:rank]
    factors = svd_factors(weight, rank)
    np.testing.assert_allclose((factors.up @ factors.down).numpy(), expected, atol=1e-12)
    # Both factors carry the square root of the singular values.
    for gram in (factors.down @ factors.down.T, factors.up.T @ factors.up):
        np.testing.assert_allclose(gram.numpy(), np.diag(values[:rank]), atol=1e-12)


def test_signs_are_decided() -> None:
    found = decompose(matrix(20, 15))
    pivots = found.left.abs().argmax(dim=0)
    assert bool((found.left[pivots, torch.arange(15)] > 0).all())
    # The same matrix with other signs of its singular vectors gives the same left factor.
    turned = decompose(-matrix(20, 15))
    torch.testing.assert_close(turned.left, found.left, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned.right, -found.right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factors_have_the_dtype_of_the_weight_and_its_precision(dtype: torch.dtype) -> None:
    weight = matrix(24, 16, dtype)
    factors = svd_factors(weight, 16)
    assert factors.down.dtype == factors.up.dtype == dtype
    product = factors.up.double() @ factors.down.double()
    error = float((product - weight.double()).norm() / weight.double().norm())
    # Rounding two factors costs about sqrt(2) roundings; the decomposition a few more.
    assert error < {torch.float64: 20, torch.float32: 20}.get(dtype, 2) * torch.finfo(dtype).eps
    # No better than the dtype allows: the decomposition did not keep a wider one.
    assert error > 1e-3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("weight", [matrix(4, 12), torch.zeros(4, 12, dtype=torch.float64)])
def test_surplus_rank_changes_nothing_and_can_be_trained(weight: torch.Tensor) -> None:
    factors = svd_factors(weight, 12, seed=3, name="k")
    torch.testing.assert_close(factors.up @ factors.down, weight, rtol=0, atol=1e-13)
    assert not factors.up[:, 4:].any()
    lengths = factors.down.norm(dim=1)
    expected = lengths[:4].mean() if weight.any() else torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(lengths[4:], expected.expand(8))
    rows = factors.down[4:] / lengths[4:, None]
    torch.testing.assert_close(rows @ rows.T, torch.eye(8).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        factors.down[:4] @ rows.T, torch.zeros(4, 8).double(), rtol=0, atol=1e-12
    )
    up = factors.up.requires_grad_()
    (up @ (factors.down @ torch.ones(12, dtype=torch.float64))).sum().backward()
    assert bool((up.grad[:, 4:] != 0).all())


def test_surplus_rows_depend_on_seed_and_name_only() -> None:
    weight = matrix(4, 12)
    first = svd_factors(weight, 9, seed=3, name="k").down[4:]
    torch.manual_seed(99)
    assert torch.equal(first, svd_factors(weight, 9, seed=3, name="k").down[4:])
    assert not torch.equal(first, svd_factors(weight, 9, seed=4, name="k").down[4:])
    assert not torch.equal(first, svd_factors(weight, 9, seed=3, name="v").down[4:])


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        ([3.0, 4.0 / 3, 1.0], 1.0, 3),
        ([2.0, 1.0, 1.0], 4 / 6, 1),
        ([2.0, 1.0, 1.0], 0.67, 2),
        ([2.0, 1.0, 1.0], 1e-9, 1),
        ([2.0, 0.0, 0.0], 1.0, 1),
        ([0.0, 0.0], 0.9, 1),
        ([5.0], 1.0, 1),
    ],
)
def test_energy_rank_by_hand(values: list[float], energy: float, rank: int) -> None:
    assert energy_rank(torch.tensor(values), energy) == rank


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    st.integers(1, 64),
)
def test_energy_rank_is_the_smallest_that_keeps_enough(values: list[int], share: int) -> None:
    values = sorted(values, reverse=True)
    # Whole numbers and a share of sixty-fourths: exact in float64 and here.
    total = sum(v * v for v in values)
    enough = [
        k for k in range(1, len(values) + 1) if 64 * sum(v * v for v in values[:k]) >= share * total
    ]
    assert energy_rank(torch.tensor(values, dtype=torch.float64), share / 64) == enough[0]


def test_random_factors_depend_on_seed_and_name_only() -> None:
    first = random_factors(30, 8, 50, seed=1, name="layers.0.q")
    torch.manual_seed(123)
    torch.randn(7)
    again = random_factors(30, 8, 50, seed=1, name="layers.0.q", dtype=torch.float64)
    assert torch.equal(first.down.double(), again.down)
    assert torch.equal(first.up.double(), again.up)
    for seed, name in ((2, "layers.0.q"), (1, "layers.0.k")):
        assert not torch.equal(first.down, random_factors(30, 8, 50, seed=seed, name=name).down)
    assert not torch.equal(first.down.flatten()[:50], first.up.flatten()[:50])


def test_the_seed_is_the_hash_of_seed_and_name() -> None:
    # printf '7:layers.0.q' | sha256sum | cut -c1-16, shifted right by one bit.
    assert seeded_generator(7, "layers.0.q").initial_seed() == 0x0C2BD634C65D5D07 >> 1


def test_random_factors_have_the_deviation_of_cola() -> None:
    factors = random_factors(300, 100, 700, seed=0, name="x")
    expected = 100**-0.25 * 1000**-0.25
    for factor in (factors.down, factors.up):
        assert float(factor.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * 30_000))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"layer: got shape \(3,\)"),
        (torch.ones(3, 3, dtype=torch.int64), "of torch.int64, allowed is a matrix"),
        (torch.ones(0, 3), r"shape \(0, 3\)"),
        (torch.ones(3, 3, device="meta"), "layer: is on the meta device"),
        (torch.tensor([[1.0, math.nan]]), "layer: holds NaN"),
        (torch.tensor([[1.0, math.inf]]), "layer: holds NaN or infinity"),
    ],
)
def test_weights_without_a_decomposition_are_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decompose(weight, "layer")


@pytest.mark.parametrize("rank", [0, 8])
def test_ranks_outside_the_input_are_refused(rank: int) -> None:
    with pytest.raises(ModelError, match=f"layer: rank {rank} of a matrix with 7 inputs.*1 to 7"):
        svd_factors(matrix(20, 7), rank, name="layer")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"up": torch.ones(5, 2)}, r"down has shape \(3, 4\) and up \(5, 2\)"),
        ({"down": torch.ones(3)}, r"down has shape \(3,\)"),
        ({"down_bias": torch.ones(4)}, r"down_bias has shape \(4,\), allowed is \(3,\)"),
        ({"up_bias": torch.ones(5, 1)}, r"up_bias has shape \(5, 1\), allowed is \(5,\)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Factors(**({"down": torch.ones(3, 4), "up": torch.ones(5, 3)} | parts))
