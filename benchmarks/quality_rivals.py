"""What a surrogate has to beat, each as a table of predictions for the labels of a test set."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowtide.quality.predictors import BlockSampling, ClosedForm
from lowtide.quality.surrogate.embedding import WIDTH
from lowtide.quality.surrogate.fitting import Table, tabulated
from lowtide.quality.surrogate.outputs import METRICS, probed_at, scaled
from lowtide.quality.surrogate.probe import at_bound
from lowtide.quality.surrogate.samples import Sample, head_of, relative_of

Floats = NDArray[np.float64]


def truths(samples: Sequence[Sample]) -> Floats:
    """Return what was measured, on the scales of metrics, shape (labels, metrics)."""
    return np.stack([scaled(METRICS, one.values) for each in samples for one in each.labels])


def probes(samples: Sequence[Sample]) -> Floats:
    """Return what the probe alone says, the same."""
    rows = []
    for each in samples:
        plain, _ = each.seen
        bounds = [relative_of(one.candidate, plain.value_range) for one in each.labels]
        probed = np.stack([at_bound(plain.probe, bound) for bound in bounds])
        rows.append(np.stack([probed_at(m, probed, plain.item_bits) for m in METRICS], axis=1))
    return np.concatenate(rows)


def means(train: Sequence[Sample], test: Sequence[Sample]) -> Floats:
    """Return the training set's mean for each codec and bound."""
    found: dict[tuple[str | None, float], list[Floats]] = defaultdict(list)
    for each in train:
        for one in each.labels:
            key = head_of(one.candidate), round(math.log10(one.candidate.bound or 1), 3)
            found[key].append(scaled(METRICS, one.values))
    nothing = [np.full(len(METRICS), np.nan)]
    rows = []
    for each in test:
        for one in each.labels:
            key = head_of(one.candidate), round(math.log10(one.candidate.bound or 1), 3)
            rows.append(np.nanmean(np.stack(found.get(key, nothing)), axis=0))
    return np.stack(rows)


def closed_form(test: Sequence[Sample]) -> Floats:
    """Return PSNR in closed form; NaN for everything else."""
    rows = []
    for each in test:
        estimates = ClosedForm().predict(each.tensor, [one.candidate for one in each.labels])
        for estimate in estimates:
            known = {name: interval.value for name, interval in estimate.metrics.items()}
            rows.append(scaled(METRICS, {"psnr_db": known.get("psnr_db")}))
    return np.stack(rows)


def sampled(test: Sequence[Sample], share: float) -> Floats:
    """Return what blocks say when they are measured."""
    predictor, rows = BlockSampling(share), []
    for each in test:
        estimates = predictor.predict(each.tensor, [one.candidate for one in each.labels])
        for estimate in estimates:
            values = {name: interval.value for name, interval in estimate.metrics.items()}
            rows.append(scaled(METRICS, values))
    return np.stack(rows)


def persisted(everything: Sequence[Sample], test: Sequence[Sample], lag: int) -> Floats:
    """Return what was measured some steps before, on the same series, codec and bound."""
    known = {
        (each.series, each.step, one.candidate.key): one.values
        for each in everything
        for one in each.labels
    }
    return np.stack([
        scaled(METRICS, known.get((each.series, each.step - lag, one.candidate.key), {}))
        for each in test
        for one in each.labels
    ])  # fmt: skip


def _table(samples: Sequence[Sample]) -> Table:
    return tabulated(samples, METRICS, np.zeros((len(samples), WIDTH)))


def boosted_trees(train: Sequence[Sample], test: Sequence[Sample], *, seed: int) -> Floats:
    """Return predictions of boosted trees on the surrogate's own inputs and targets."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    before, after = _table(train), _table(test)
    found = np.full(after.targets.shape, np.nan)
    for head in after.names:
        own, asked = before.heads == head, after.heads == head
        for metric in range(len(METRICS)):
            known = own & np.isfinite(before.targets[:, metric])
            if known.sum() < 10:
                continue
            trees = HistGradientBoostingRegressor(
                max_iter=200, learning_rate=0.06, max_leaf_nodes=15, min_samples_leaf=5,
                l2_regularization=1.0, random_state=seed,
            )  # fmt: skip
            trees.fit(before.raw[known][:, :-WIDTH], before.targets[known, metric])
            found[asked, metric] = trees.predict(after.raw[asked][:, :-WIDTH])
    return found + probes(test)
