"""What is known of an array before anybody asks: blocks, statistics, probe, pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowtide.core.errors import DataError
from lowtide.quality.surrogate import blocks, embedding, probe, statistics
from lowtide.quality.surrogate.blocks import cut_shape, sample
from tests.quality.arrays import smooth


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5000,), (5000,)), ((1, 64, 1, 64), (64, 64)), ((16, 3, 32, 32), (48, 32, 32)),
        ((100, 100, 3), (100, 300)), ((3, 100, 100), (300, 100)), ((2, 3, 4), (24,)), ((1,), (1,)),
    ],
)  # fmt: skip
def test_shapes_become_one_to_three_long_axes(
    shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert cut_shape(shape) == expected


def test_blocks_cover_an_array_when_few_are_enough() -> None:
    x = np.arange(128 * 100, dtype=np.float32).reshape(128, 100)
    found = sample(x)
    assert found.values.shape == (4, 64, 64)
    seen = np.unique(np.rint(found.values.astype(np.float64) * found.value_range))
    assert len(seen) == x.size


def test_blocks_are_no_more_when_the_array_is_larger() -> None:
    for shape in ((1000, 1000), (60, 70, 80), (1 << 20,)):
        found = sample(smooth(*shape) if len(shape) > 1 else np.random.rand(*shape))
        assert len(found.values) == blocks.MOST
        assert found.values[0].size == 4096
    corners = {float(block[0, 0]) for block in sample(np.random.rand(1000, 1000)).values}
    assert len(corners) == blocks.MOST  # no block twice


def test_features_do_not_depend_on_units_or_layout() -> None:
    x = smooth(96, 80).astype(np.float32)
    first = sample(x)
    for other in (x * 1024, np.asfortranarray(x), torch.from_numpy(x.T.copy()).T):
        found = sample(other)
        np.testing.assert_array_equal(found.values, first.values)
    assert sample(x * 1024).value_range == first.value_range * 1024


def test_types_are_taken_when_torch_or_numpy_knows_them() -> None:
    x = torch.from_numpy(smooth(64, 64)).to(torch.bfloat16)
    assert sample(x).item_bits == 16
    assert sample(x.double()).item_bits == 64
    huge = np.array([-1.7e308, 1.7e308, 0.0] * 30)
    assert sample(huge).values.max() == 1.0


@pytest.mark.parametrize(
    "x",
    [
        np.ones((64, 64)), np.zeros(0), np.arange(100), np.array([1.0, np.nan] * 50),
        np.array([1.0, np.inf] * 50),
    ],
)  # fmt: skip
def test_arrays_without_features_are_refused(x: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"allowed are .*; measure this"):
        sample(x)


@pytest.mark.parametrize("shape", [(9000,), (100, 80), (20, 24, 30)])
def test_probe_keeps_every_bound(shape: tuple[int, ...]) -> None:
    x = sample(smooth(*shape) if len(shape) > 1 else np.sin(np.arange(9000) / 50)).values
    for errors, codes in (probe._interpolated(x), probe._differences(x)):
        largest = np.abs(errors.reshape(len(probe.NODES), -1)).max(axis=1)
        assert (largest <= probe.NODES * (1 + 1e-3) + 2e-7).all()  # float32 has its own error
        assert not (codes == 0).all(axis=tuple(range(1, codes.ndim))).any()


def test_entropy_of_steps_is_shannons_when_steps_are_small() -> None:
    rng = np.random.default_rng(0)
    steps = rng.integers(-3, 4, (1, 20000)).astype(np.float32)
    bits, zeros, runs = probe._code_statistics(steps.copy())[0]
    shares = np.unique(steps, return_counts=True)[1] / steps.size
    assert 2**bits == pytest.approx(-(shares * np.log2(shares)).sum(), abs=2e-3)
    assert zeros == pytest.approx((steps == 0).mean())
    assert 2**runs == pytest.approx(2**bits, abs=5e-3)  # zeros that do not hang together
    blocks_of_zeros = np.repeat(rng.integers(0, 2, (1, 200)), 100, axis=1).astype(np.float32)
    bits, _, runs = probe._code_statistics(blocks_of_zeros)[0]
    assert 2**bits == pytest.approx(1.0, abs=0.01)
    assert 2**runs < 0.1


def test_entropy_of_wide_steps_counts_what_bins_hide() -> None:
    steps = np.random.default_rng(0).integers(-8000, 8000, (1, 60000)).astype(np.float32)
    assert 2 ** probe._code_statistics(steps)[0, 0] == pytest.approx(np.log2(16000), abs=0.05)


def test_probe_finds_the_closed_form_when_bounds_are_tight() -> None:
    x = sample(np.random.default_rng(0).random((128, 128))).values
    found = probe.at_bound(probe.probed(x), 1e-4)
    for way in ("interpolation", "lorenzo"):
        mse = found[probe.NAMES.index(f"{way}_mse")]
        assert mse == pytest.approx(np.log10(1e-8 / 3), abs=0.02)
        assert found[probe.NAMES.index(f"{way}_autocorrelation")] == pytest.approx(0, abs=0.03)


def test_probe_is_read_between_nodes_and_held_beyond() -> None:
    table = np.arange(12.0)[:, None] * np.ones(3)
    assert probe.at_bound(table, 10**-0.75) == pytest.approx([0.5] * 3)
    assert probe.at_bound(table, probe.NODES[7]) == pytest.approx([7.0] * 3)
    assert probe.at_bound(table, 0.9) == pytest.approx([0.0] * 3)
    assert probe.at_bound(table, 1e-9) == pytest.approx([11.0] * 3)


def test_statistics_say_what_they_are_named() -> None:
    ramp = np.add.outer(np.arange(64.0), np.zeros(64))
    found = dict(zip(statistics.NAMES, statistics.statistics(sample(ramp)), strict=True))
    assert found["log10_elements"] == pytest.approx(np.log10(4096))
    assert found["mean"] == pytest.approx(0.5)
    assert found["is_2d"] == 1
    assert found["is_1d"] == 0
    assert found["neighbour_difference"] == pytest.approx(np.log10(0.5 / 63), abs=1e-3)
    assert found["lorenzo_difference"] < -6  # a plane has none
    assert found["repeats"] == 1.0  # along the last axis
    assert found["zeros"] == pytest.approx(1 / 64)
    assert found["singular_0.999"] == pytest.approx(0.0)  # one singular value holds all
    rough = np.random.default_rng(0).normal(size=(64, 64))
    other = dict(zip(statistics.NAMES, statistics.statistics(sample(rough)), strict=True))
    assert abs(other["autocorrelation_1"]) < 0.05 < found["autocorrelation_first_1"]
    assert other["singular_0.9"] > 0.3
    assert other["kurtosis"] == pytest.approx(np.log10(3), abs=0.05)


@pytest.mark.parametrize("shape", [(9000,), (100, 80), (20, 24, 30)])
def test_pictures_are_made_of_every_rank(shape: tuple[int, ...]) -> None:
    values = sample(np.random.default_rng(0).random(shape)).values
    pictures = embedding.pictures(values)
    assert pictures.shape[1] == 2
    assert pictures.shape[2] == pictures.shape[3]
    vectors = embedding.Embedding()(torch.cat([pictures, pictures]), [len(pictures)] * 2)
    assert vectors.shape == (2, embedding.WIDTH)
    torch.testing.assert_close(vectors[0], vectors[1])


def test_embedding_sees_how_rough_a_picture_is() -> None:
    network = embedding.Embedding()
    calm, rough = (
        embedding.pictures(sample(x).values)
        for x in (smooth(64, 64), smooth(64, 64) + np.random.default_rng(0).random((64, 64)))
    )
    vectors = network(torch.cat([calm, rough]), [len(calm), len(rough)])
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3
    assert sum(each.numel() for each in network.parameters()) < 150_000
