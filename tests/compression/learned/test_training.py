"""Training: reproducible, better than its start, and never on what judges it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.compression.learned.layers import Architecture
from lowtide.compression.learned.model import pack_model
from lowtide.compression.learned.networks import Autoencoder
from lowtide.compression.learned.training import (
    Progress,
    TrainingOptions,
    principal_directions,
    sliced_wasserstein,
    train_model,
)
from lowtide.core.errors import DataError
from tests.compression.learned.tiny import field

SMALL = Architecture((4, 4), 2, (3,))
QUICK = TrainingOptions(epochs=2, batches=8, batch_blocks=16, directions=4)


def bent(steps: int, *, seed: int = 0) -> np.ndarray:
    """Return (steps, 8, 8) whose blocks lie on a curve: no two directions hold them."""
    amount = np.random.default_rng(seed).uniform(-2, 2, (steps, 2, 2))
    place = np.arange(16).reshape(4, 4)
    blocks = np.sin(amount[..., None, None] * (1 + place / 4))
    return blocks.transpose(0, 1, 3, 2, 4).reshape(steps, 8, 8).astype(np.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_same_seed_gives_the_same_file() -> None:
    torch.manual_seed(1)
    first = train_model([bent(20)], SMALL, QUICK)
    torch.manual_seed(2)  # is not asked
    assert train_model([bent(20)], SMALL, QUICK).sha256 == first.sha256
    assert train_model([bent(20)], SMALL, replace(QUICK, seed=1)).sha256 != first.sha256
    assert first.facts["epochs_done"] == 2
    assert first.facts["seed"] == 0
    assert len(pack_model(first)) == first.stored_bytes


def test_the_network_learns_what_directions_cannot() -> None:
    seen: list[Progress] = []
    options = replace(QUICK, epochs=4, batches=80, batch_blocks=64, learning_rate=5e-3)
    start = train_model([bent(200)], SMALL, replace(options, epochs=0))
    model = train_model([bent(200)], SMALL, options, report=seen.append)
    assert [each.epoch for each in seen] == [1, 2, 3, 4]
    gain_db = model.facts["validation_psnr_db"] - start.facts["validation_psnr_db"]
    assert gain_db > 1.0
    # As seen by the codec, on data of other seeds.
    test = bent(50, seed=1).reshape(50, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 16)
    errors = [
        float(np.square(each.values(each.outputs(each.latents(test))) - test).mean())
        for each in (start, model)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_torch_and_the_codec_run_the_same_network() -> None:
    architecture = Architecture((4, 8, 4), 3, (4, 5))
    generator = torch.Generator().manual_seed(3)
    network = Autoencoder(architecture, generator)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    model = train_model(
        [np.random.default_rng(0).uniform(-1, 1, (9, 8, 16, 8)).astype(np.float32)],
        architecture, replace(QUICK, epochs=0),
    )  # fmt: skip
    model = replace(model, weights=network.exported(), low=-1.0, high=1.0)
    blocks = torch.randn(7, 1, 4, 8, 4, generator=generator).clamp(-1, 1)
    with torch.no_grad():
        latents = network.encode(blocks)
        outputs = network.decode(latents)
    np.testing.assert_allclose(model.latents(blocks.flatten(1).numpy()), latents, atol=2e-2)
    np.testing.assert_allclose(model.outputs(latents.numpy()), outputs.flatten(1), atol=2e-2)


def test_the_end_of_each_array_only_judges() -> None:
    x = bent(40)
    spoiled = x.copy()
    spoiled[36:] = 1000.0  # the last tenth
    options = replace(QUICK, epochs=0)
    one, other = (train_model([each], SMALL, options) for each in (x, spoiled))
    assert (one.low, one.high) == (other.low, other.high)
    assert all((one.weights[name] == other.weights[name]).all() for name in one.weights)
    assert one.facts["validation_psnr_db"] > 0 > other.facts["validation_psnr_db"]


def test_blocks_lie_where_the_codec_cuts_or_anywhere() -> None:
    x = np.zeros((30, 6, 10), np.float32)  # borders: blocks of 4 stick out on both axes
    x[:, 4:] = np.arange(30)[:, None, None]
    x[:, :, 8:] += 1
    aligned = train_model([x], SMALL, replace(QUICK, epochs=0))
    anywhere = train_model([x], SMALL, replace(QUICK, epochs=0, aligned=False))
    # Where blocks are aligned, each is constant but for its last columns: two directions do.
    assert aligned.facts["validation_psnr_db"] > 60 > anywhere.facts["validation_psnr_db"] + 10
    assert aligned.facts["shapes"] == [[30, 6, 10]]


def test_values_that_are_none_do_not_count() -> None:
    x = bent(40)
    holes = x.copy()
    holes[::3, 0, 0] = np.nan
    holes[1::3, 5, 5] = -1e34
    model = train_model([holes], SMALL, QUICK, fill_value=-1e34)
    assert (model.low, model.high) == (float(x[:36].min()), float(x[:36].max()))


def test_time_is_limited() -> None:
    model = train_model([bent(20)], SMALL, replace(QUICK, epochs=50, time_limit_s=1e-9))
    assert model.facts["epochs_done"] == 1


def test_blocks_of_one_and_three_axes_train_too() -> None:
    for block in ((4,), (4, 4, 4)):
        x = np.random.default_rng(0).normal(size=(16, 8, 8)).astype(np.float64)
        model = train_model([x], Architecture(block, 1, (2,)), replace(QUICK, epochs=1))
        assert model.architecture.block == block


def test_data_that_cannot_be_learned_from_are_refused() -> None:
    for array, text in (
        (np.zeros((20, 8, 8)), "nothing to learn"),
        (np.full((20, 8, 8), np.nan), "no finite value"),
        (np.zeros((20, 8, 8), np.int32), "int32"),
        (np.zeros(8), "shape \\(8,\\)"),
        (np.zeros((5, 4)), "too small"),
        (np.zeros((0, 8, 8)), "too small"),
    ):
        with pytest.raises(DataError, match=text):
            train_model([array], SMALL, QUICK)
    for wrong in (
        {"epochs": -1}, {"batches": 0}, {"batch_blocks": 1}, {"learning_rate": 0.0},
        {"learning_rate": math.nan}, {"validation": 0.0}, {"validation": 1.0},
        {"wasserstein_weight": -1.0}, {"time_limit_s": 0.0}, {"seed": -1}, {"directions": 0},
    ):  # fmt: skip
        with pytest.raises(DataError, match="allowed are"):
            TrainingOptions(**wrong)


def test_directions_are_those_of_the_largest_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.from_numpy(field((40, 40))).reshape(40, 4, 40, 4).transpose(1, 2).reshape(-1, 16)
    basis = principal_directions(blocks, 3, generator)
    exact = torch.linalg.svd(blocks, full_matrices=False).Vh[:3]
    unit = basis / basis[0].norm()
    torch.testing.assert_close(unit @ unit.T, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        (unit @ exact.T).abs().det().abs(), torch.tensor(1.0), atol=1e-3, rtol=0
    )
    assert float((blocks @ basis.T / basis[0].square().sum()).abs().max()) == pytest.approx(
        1, abs=1e-4
    )
    few = principal_directions(torch.ones(2, 16), 5, generator)
    assert few.shape == (5, 16)


def test_the_distance_is_that_of_sorted_projections() -> None:
    def distance(latents: torch.Tensor) -> float:
        return float(sliced_wasserstein(latents, 64, torch.Generator().manual_seed(0)))

    prior = torch.rand(500, 2, generator=torch.Generator().manual_seed(9)) * 2 - 1
    # Moved by v, half of the squared length of v in two dimensions.
    assert distance(prior) < 0.01
    assert distance(prior + torch.tensor([3.0, 0.0])) == pytest.approx(4.5, rel=0.2)
    assert distance(prior[torch.randperm(500)]) == pytest.approx(distance(prior), rel=1e-5)
