"""From samples to a frozen stage 1 and trained heads."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.codec import codecs
from lowtide.core.errors import DataError
from lowtide.quality.surrogate import training
from lowtide.quality.surrogate.embedding import WIDTH, Embedding
from lowtide.quality.surrogate.features import embedded, inputs
from lowtide.quality.surrogate.intervals import Calibration, Familiarity, calibrated, familiar
from lowtide.quality.surrogate.networks import DENSE, Networks, Shape, target_scales, trained
from lowtide.quality.surrogate.outputs import METRICS, probed_at, scaled
from lowtide.quality.surrogate.probe import at_bound
from lowtide.quality.surrogate.samples import Sample, codec_of, head_of, relative_of
from lowtide.quality.surrogate.stage import Stage, scales_of

Floats = NDArray[np.float64]

_LONGEST_LAG = 10  # steps between a measurement and its use that memory is calibrated for


@dataclass(frozen=True)
class Settings:
    """How a surrogate learns.

    Attributes:
        metrics: What is predicted.
        heads: Size of heads.
        epochs: Passes over the training set for the embedding; 0 is none, which measured best.
        late_share: Of the steps of each series, the last ones: intervals are calibrated on them.
        seed: Of everything that is drawn.
    """

    metrics: tuple[str, ...] = METRICS
    heads: Shape = DENSE
    epochs: int = 0
    late_share: float = 0.25
    seed: int = 0


@dataclass(frozen=True)
class Head:
    """Stage 2 of one codec.

    Attributes:
        networks: Predict the distance to what the probe says.
        calibration: Of intervals.
        memory: By metric, how much of what was off at an earlier step is off later, 0 to 1.
        remembering: Calibration where an earlier measurement is known.
        decades: Least and greatest log10 of relative bounds that were learned.
        known: By metric, whether there were any labels.
        utilisation: Share of each expert on the training set, largest first.
        version: Of the package that the codec comes from.
    """

    networks: Networks
    calibration: Calibration
    memory: Floats
    remembering: Calibration
    decades: tuple[float, float]
    known: NDArray[np.bool_]
    utilisation: tuple[float, ...]
    version: str


@dataclass(frozen=True)
class Fitted:
    """All that a surrogate learned.

    Attributes:
        stage: Stage 1, frozen.
        familiarity: Which arrays are like those of the training set.
        heads: Stage 2 by name.
        training_set: Fingerprint of what it was all learned from.
    """

    stage: Stage
    familiarity: Familiarity
    heads: dict[str, Head]
    training_set: str


@dataclass
class Table:
    """Labels as rows.

    Attributes:
        raw: Inputs, the embedding last; shape (rows, inputs).
        targets: Distances to what the probe says, on the scales of metrics; (rows, metrics).
        heads: Name of the head of each row.
        owners: Number of the sample of each row.
        decades: log10 of relative bounds, (rows,).
    """

    raw: Floats
    targets: Floats
    heads: NDArray[np.str_]
    owners: NDArray[np.int64]
    decades: Floats
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = sorted(set(self.heads.tolist()))


def tabulated(samples: Sequence[Sample], metrics: Sequence[str], vectors: Floats) -> Table:
    """Return the labels of samples whose codecs have heads.

    Args:
        samples: Arrays and labels.
        metrics: Columns.
        vectors: Embedding of each sample, shape (samples, WIDTH).
    """
    raw, targets, decades = [], [], []
    heads: list[str] = []
    owners: list[int] = []
    for number, each in enumerate(samples):
        plain, _ = each.seen
        named = [(head_of(label.candidate), label) for label in each.labels]
        pairs = [(name, label) for name, label in named if name is not None]
        if not pairs:
            continue
        bounds = [relative_of(label.candidate, plain.value_range) for _, label in pairs]
        probed = np.stack([at_bound(plain.probe, bound) for bound in bounds])
        prior = np.stack([probed_at(name, probed, plain.item_bits) for name in metrics], axis=1)
        values = np.stack([scaled(metrics, label.values) for _, label in pairs])
        raw.append(inputs(plain, vectors[number], bounds))
        targets.append(values - prior)
        decades.append(np.log10(bounds))
        heads += [name for name, _ in pairs]
        owners += [number] * len(pairs)
    if not raw:
        raise DataError(
            f"{len(samples)} samples hold no label of a codec with an absolute or relative bound; "
            "measure some, see lowtide.quality.surrogate.samples.labelled"
        )
    return Table(
        np.concatenate(raw), np.concatenate(targets), np.array(heads), np.array(owners),
        np.concatenate(decades),
    )  # fmt: skip


def late_of(samples: Sequence[Sample], share: float) -> NDArray[np.bool_]:
    """Return which samples are the last steps of their series.

    Series of fewer than four samples are one series together, in the order they are given.
    """
    series: dict[str, list[int]] = defaultdict(list)
    for number, each in enumerate(samples):
        series[each.series].append(number)
    short = [numbers for numbers in series.values() if len(numbers) < 4]
    groups = [
        sorted(numbers, key=lambda n: (samples[n].step, n))
        for numbers in series.values()
        if len(numbers) >= 4
    ]
    groups.append(sorted(number for numbers in short for number in numbers))
    is_late = np.zeros(len(samples), bool)
    for numbers in groups:
        count = round(share * len(numbers))
        is_late[numbers[len(numbers) - count :]] = True
    return is_late


def fitted_stage(samples: Sequence[Sample], settings: Settings) -> tuple[Stage, Familiarity]:
    """Return stage 1, learned from the early steps, and which arrays are like the samples."""
    is_late = late_of(samples, settings.late_share)
    early = [each for each, late in zip(samples, is_late, strict=True) if not late]
    table = tabulated(early, settings.metrics, np.zeros((len(early), WIDTH)))
    centre, scale = scales_of(table.raw)
    network = None
    if settings.epochs:
        network = _fitted_embedding(early, table, (table.raw - centre) / scale, settings)
        vectors = embedded(network, [each.seen[1] for each in early])
        centre[-WIDTH:], scale[-WIDTH:] = scales_of(vectors)
    # As a file holds them: what is loaded is the same to the last bit.
    stage = Stage(network, _single(centre), _single(scale))
    described = np.stack([stage.description(each.seen[0]) for each in samples])
    return stage, familiar(described[~is_late], described[is_late])


def _fitted_embedding(
    samples: Sequence[Sample], table: Table, x: Floats, settings: Settings
) -> Embedding:
    lessons = []
    targets = np.empty_like(table.targets)
    for name in table.names:
        is_own = table.heads == name
        middle, spread = target_scales(table.targets[is_own])
        targets[is_own] = (table.targets[is_own] - middle) / spread
    places = np.searchsorted(table.names, table.heads)
    for number in np.unique(table.owners):
        rows = table.owners == number
        lessons.append(
            training.Lesson(
                samples[int(number)].seen[1],
                torch.from_numpy(x[rows, :-WIDTH].astype(np.float32)),
                torch.from_numpy(places[rows]),
                torch.from_numpy(targets[rows].astype(np.float32)),
            )
        )
    return training.learned(lessons, len(table.names), epochs=settings.epochs, seed=settings.seed)


def fitted_heads(
    stage: Stage, samples: Sequence[Sample], settings: Settings, *, only: str | None = None
) -> dict[str, Head]:
    """Return heads by name.

    Each is trained twice: on the early steps, so that its errors on the late ones calibrate the
    intervals; then on all, for use.

    Args:
        stage: Frozen.
        samples: Arrays and labels.
        settings: How to learn.
        only: Registered name of the codec whose heads are wanted; None is all.
    """
    vectors = embedded(stage.network, [each.seen[1] for each in samples])
    table = tabulated(samples, settings.metrics, vectors)
    x, gates = stage.standardised(table.raw)
    is_late = late_of(samples, settings.late_share)[table.owners]
    heads = {}
    for number, name in enumerate(table.names):
        codec = codec_of(name)
        if only is not None and codec != only:
            continue
        own = table.heads == name
        seed = settings.seed * 1000 + number
        early, late = own & ~is_late, own & is_late
        residuals = np.empty((0, len(settings.metrics)))
        if early.any() and late.any():
            rehearsal = trained(
                x[early], gates[early], table.targets[early], settings.heads, seed=seed
            )
            residuals = table.targets[late] - rehearsal.predict(x[late], gates[late])
        memory, remembered = _remembered(residuals, table, samples, late)
        networks = trained(x[own], gates[own], table.targets[own], settings.heads, seed=seed)
        heads[name] = Head(
            networks=networks,
            calibration=calibrated(residuals, table.decades[late]),
            memory=memory,
            remembering=remembered,
            decades=(float(table.decades[own].min()), float(table.decades[own].max())),
            known=np.isfinite(table.targets[own]).any(axis=0),
            utilisation=tuple(networks.utilisation(gates[own])),
            version=version_of(codec),
        )
    return heads


def _remembered(
    residuals: Floats, table: Table, samples: Sequence[Sample], late: NDArray[np.bool_]
) -> tuple[Floats, Calibration]:
    """Return how much of an error stays from step to step, and the calibration of what is left.

    Pairs are the same series, codec and bound at two late steps.
    """
    found: dict[tuple[str, float], list[tuple[int, int]]] = defaultdict(list)
    for row, place in enumerate(np.flatnonzero(late)):
        one = samples[int(table.owners[place])]
        found[one.series, round(float(table.decades[place]), 6)].append((one.step, row))
    pairs = [
        (now, before)
        for entries in found.values()
        for step, now in entries
        for earlier, before in entries
        if 0 < step - earlier <= _LONGEST_LAG
    ]
    if not pairs:
        return np.zeros(residuals.shape[1]), calibrated(residuals[:0], np.empty(0))
    now, before = residuals[[pair[0] for pair in pairs]], residuals[[pair[1] for pair in pairs]]
    is_known = np.isfinite(now) & np.isfinite(before)
    products = np.where(is_known, now * before, 0.0).sum(axis=0)
    squares = np.where(is_known, before * before, 0.0).sum(axis=0)
    memory = _single(np.clip(products / np.maximum(squares, 1e-300), 0.0, 1.0))
    decades = table.decades[late][[pair[0] for pair in pairs]]
    return memory, calibrated(now - memory * before, decades)


def _single(values: Floats) -> Floats:
    return values.astype(np.float32).astype(np.float64)


def version_of(codec: str) -> str:
    """Return name and version of the package that a codec comes from."""
    root = codecs.get(codec).__module__.partition(".")[0]
    return f"{root} {getattr(importlib.import_module(root), '__version__', 'unknown')}"
