"""Training of an autoencoder for blocks, offline, with a sliced-Wasserstein loss.

After AE-SZ (Liu et al., CLUSTER 2021): mean square error, and a term that draws the latents
towards a prior (Kolouri et al., Sliced Wasserstein auto-encoders, ICLR 2019). The last part of each
array along its first axis is never trained on: it decides which epoch's weights are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowtide.compression.bounds import ordinary
from lowtide.compression.elements import Array
from lowtide.compression.learned.layers import Architecture
from lowtide.compression.learned.model import Model, pack_model, parse_model
from lowtide.compression.learned.networks import Autoencoder
from lowtide.core.errors import DataError

_VALIDATION_BLOCKS = 512
_BASIS_BLOCKS = 4096
_ROUNDS, _MORE = 3, 8  # of the search for principal directions, and directions beside the wanted


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: Passes of `batches` batches each; 0 leaves the linear ways alone.
        batches: Of each epoch.
        batch_blocks: Blocks of a batch.
        learning_rate: Of Adam at the start; it falls to 0 along a cosine.
        wasserstein_weight: Of the distance between latents and prior: lambda of the paper.
        directions: Random directions that latents are projected on, for each batch.
        validation: Part of each array, its end along the first axis, that chooses the epoch.
        aligned: Whether blocks are cut where the codec cuts arrays of the same shape, on all axes
            but the first; else anywhere. Fields on one grid repeat what lies where.
        seed: Of everything random.
        time_limit_s: Training ends early, with what it has, after so long; the learning rate then
            does not reach 0.
    """

    epochs: int = 60
    batches: int = 100
    batch_blocks: int = 128
    learning_rate: float = 1e-3
    wasserstein_weight: float = 1e-4
    directions: int = 32
    validation: float = 0.1
    aligned: bool = True
    seed: int = 0
    time_limit_s: float = math.inf

    def __post_init__(self) -> None:
        least = {"epochs": 0, "batches": 1, "batch_blocks": 2, "directions": 1, "seed": 0}
        for name, allowed in least.items():
            if getattr(self, name) < allowed:
                raise DataError(f"{name} {getattr(self, name)}: allowed are {allowed} and more")
        for name in ("learning_rate", "time_limit_s"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name} {getattr(self, name)}: allowed are numbers above 0")
        if not 0 <= self.wasserstein_weight < math.inf or not 0 < self.validation < 1:
            raise DataError(
                f"wasserstein_weight {self.wasserstein_weight}, validation {self.validation}: "
                "allowed are 0 and more, and numbers between 0 and 1"
            )


@dataclass(frozen=True)
class Progress:
    """Where training is: reported after each epoch.

    Attributes:
        epoch: How many are done.
        loss: Mean of this epoch, as it was minimised.
        psnr_db: Of the decoder's blocks on the validation part, relative to the range of the
            training data.
        elapsed_s: Since the start.
    """

    epoch: int
    loss: float
    psnr_db: float
    elapsed_s: float


@dataclass
class _Data:
    """Arrays cut in two along their first axis, and the range of the first parts."""

    train: list[Array] = field(default_factory=list)
    rest: list[Array] = field(default_factory=list)
    low: float = math.inf
    high: float = -math.inf


def train_model(
    arrays: Sequence[Array],
    architecture: Architecture,
    options: TrainingOptions,
    *,
    fill_value: float | None = None,
    report: Callable[[Progress], None] = lambda _progress: None,
) -> Model:
    """Train an autoencoder and return it as it comes back from its file.

    The same arguments give the same bytes on the same machine with the same number of threads.

    Args:
        arrays: Floating-point, of at least as many axes as a block, which lies along the last ones.
            Values that are not finite, and `fill_value`, become the mean of the others.
        architecture: Of the network.
        options: How.
        fill_value: Stands for "no value".
        report: Called after each epoch.

    Raises:
        DataError: an array is too small, or all values are the same.
    """
    data = _split(arrays, architecture, options.validation, fill_value)
    chance = np.random.default_rng(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    network = Autoencoder(architecture, generator)
    cutter = _Cutter(data, architecture, options.aligned)
    count = max(_BASIS_BLOCKS, 2 * architecture.latent)
    network.set_linear(
        principal_directions(
            cutter.blocks(data.train, count, chance).flatten(1), architecture.latent, generator
        )
    )
    trained = [each for each in network.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=options.learning_rate, foreach=False)
    steps = options.epochs * options.batches
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    rest = cutter.blocks(data.rest, _VALIDATION_BLOCKS, np.random.default_rng(options.seed + 1))
    begin_s = time.monotonic()
    best_psnr_db, best, done = _psnr_db(network, rest), network.exported(), 0
    for epoch in range(1, options.epochs + 1):
        total = 0.0
        for _ in range(options.batches):
            blocks = cutter.blocks(data.train, options.batch_blocks, chance)
            loss = _loss(network, blocks, options, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0, foreach=False)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        psnr_db = _psnr_db(network, rest)
        if psnr_db > best_psnr_db:
            best_psnr_db, best = psnr_db, network.exported()
        done, elapsed_s = epoch, time.monotonic() - begin_s
        report(Progress(epoch, total / options.batches, psnr_db, elapsed_s))
        if elapsed_s >= options.time_limit_s:
            break
    facts: dict[str, Any] = {
        key: value for key, value in asdict(options).items() if key != "time_limit_s"
    }
    facts |= {
        "epochs_done": done,
        "validation_psnr_db": round(best_psnr_db, 3),
        "train_elements": sum(part.size for part in data.train),
        "shapes": [list(np.shape(array)) for array in arrays],
    }
    model = Model(architecture, data.low, data.high, best, facts)
    return parse_model(pack_model(model), "the trained model")


def _loss(
    network: Autoencoder, blocks: Tensor, options: TrainingOptions, generator: torch.Generator
) -> Tensor:
    latents = network.encode(blocks)
    loss = nn.functional.mse_loss(network.decode(latents), blocks)
    return loss + options.wasserstein_weight * sliced_wasserstein(
        latents, options.directions, generator
    )


def principal_directions(samples: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the directions in which samples are largest, by a random subspace.

    Args:
        samples: (n, elements), n at least `count`. Their mean stays in them.
        count: How many directions; those that are not there are 0.
        generator: Of the subspace.

    Returns:
        (count, elements), orthogonal, all of the length that lets the largest coordinate be 1.

    Source: Halko, Martinsson and Tropp, Finding structure with randomness (2011), algorithm 4.4.
    """
    rank = min(count + _MORE, *samples.shape)
    found = samples @ torch.randn(samples.shape[1], rank, generator=generator)
    for _ in range(_ROUNDS):
        found = samples @ (samples.T @ torch.linalg.qr(found).Q)
    subspace = torch.linalg.qr(found).Q
    rows = torch.linalg.svd(subspace.T @ samples, full_matrices=False).Vh[:count]
    basis = torch.zeros(count, samples.shape[1])
    basis[: len(rows)] = rows
    largest = float((samples @ basis.T).abs().max())
    return basis * (largest if largest > 0 else 1.0)


def sliced_wasserstein(latents: Tensor, directions: int, generator: torch.Generator) -> Tensor:
    """Return the mean squared distance of sorted projections of latents and of a prior's samples.

    Args:
        latents: (n, latent).
        directions: How many random unit directions.
        generator: Of these, and of the prior: uniform from -1 to 1 in each number.
    """
    prior = torch.rand(latents.shape, generator=generator) * 2 - 1
    axes = torch.randn(directions, latents.shape[1], generator=generator)
    axes = axes / axes.norm(dim=1, keepdim=True)
    found, wanted = ((each @ axes.T).sort(dim=0).values for each in (latents, prior))
    return (found - wanted).square().mean()


def _psnr_db(network: Autoencoder, blocks: Tensor) -> float:
    with torch.no_grad():
        error = float((network.decode(network.encode(blocks)) - blocks).square().mean())
    # The range is 2 for the network.
    return 10 * math.log10(4 / error) if 0 < error < math.inf else -math.inf


def _split(
    arrays: Sequence[Array], architecture: Architecture, validation: float, fill: float | None
) -> _Data:
    rank, data = len(architecture.block), _Data()
    for number, array in enumerate(arrays):
        array = np.asarray(array)
        if array.dtype.kind != "f" or array.ndim < rank:
            raise DataError(
                f"array {number}: {array.dtype} of shape {array.shape}, allowed are "
                f"floating-point numbers with {rank} axes or more, as the block has"
            )
        cut = len(array) - max(1, round(len(array) * validation))
        if array.ndim == rank:  # the first axis is also the block's
            cut = min(cut, len(array) - architecture.block[0])
        cut = max(cut, 0)
        for parts, part in ((data.train, array[:cut]), (data.rest, array[cut:])):
            # Axes that are shorter than a block are made longer, but for the first.
            if not part.size or (array.ndim == rank and len(part) < architecture.block[0]):
                raise DataError(
                    f"array {number}: shape {array.shape} in two parts of {cut} and "
                    f"{len(array) - cut} is too small for blocks of {architecture.block}"
                )
            parts.append(_padded(_filled(part, fill), architecture))
        data.low = min(data.low, float(data.train[-1].min()))
        data.high = max(data.high, float(data.train[-1].max()))
    if not 0 < data.high - data.low < math.inf:
        raise DataError(
            f"values from {data.low} to {data.high}: there is nothing to learn; give arrays whose "
            "values differ"
        )
    return data


def _padded(part: Array, architecture: Architecture) -> Array:
    """Return the array with its border blocks whole, as the codec makes them."""
    edges = (1,) * (part.ndim - len(architecture.block)) + architecture.block
    widths = [(0, -length % edge) for length, edge in zip(part.shape, edges, strict=True)]
    widths[0] = (0, 0)
    return np.pad(part, widths, mode="edge")


def _filled(part: Array, fill: float | None) -> Array:
    part = np.ascontiguousarray(part, np.float64 if part.dtype.itemsize > 4 else np.float32)
    mask = ordinary(part, None if fill is None else part.dtype.type(fill))
    if mask is None:
        return part
    if not mask.any():
        raise DataError("an array holds no finite value besides the fill value")
    return np.where(mask, part, part[mask].mean(dtype=np.float64).astype(part.dtype))


class _Cutter:
    """Cuts blocks from random places."""

    def __init__(self, data: _Data, architecture: Architecture, aligned: bool) -> None:
        self._scale, self._offset = (data.high - data.low) / 2, (data.high + data.low) / 2
        self._block = architecture.block
        self._aligned = aligned

    def blocks(self, parts: list[Array], count: int, chance: np.random.Generator) -> Tensor:
        """Return normalised blocks: float32, (count, 1, *block)."""
        found = np.empty((count, *self._block), np.float32)
        sizes = np.array([part.size for part in parts], np.float64)
        for number, which in enumerate(chance.choice(len(parts), count, p=sizes / sizes.sum())):
            block = parts[which][self._place(parts[which].shape, chance)]
            found[number] = (block.astype(np.float64) - self._offset) / self._scale
        return torch.from_numpy(found).unsqueeze(1)

    def _place(self, shape: tuple[int, ...], chance: np.random.Generator) -> tuple[Any, ...]:
        leading = len(shape) - len(self._block)
        place: list[Any] = [int(chance.integers(extent)) for extent in shape[:leading]]
        for axis, edge in enumerate(self._block, leading):
            stride = edge if self._aligned and axis else 1
            begin = stride * int(chance.integers((shape[axis] - edge) // stride + 1))
            place.append(slice(begin, begin + edge))
        return tuple(place)
