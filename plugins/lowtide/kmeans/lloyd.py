"""Lloyd's iterations: pass, empty clusters, means, until labels or centroids stay.

scikit-learn's rules throughout: a fit has converged when no label changes (strictly), or when the
squared shift of all centroids together is at most `tol`; an empty cluster gets the sample that is
furthest from its centroid.

With fault tolerance on there is one check from end to end: the inertia of a right iteration never
rises, beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.kmeans.backend import Floats
from lowtide.kmeans.passes import Pass, Problem, one_pass
from lowtide.kmeans.portable import TorchBackend
from lowtide.kmeans.samples import to_numpy

_REST = 1e-12  # of a cluster's weight: what rounding leaves when all of its samples are taken out


@dataclass(frozen=True)
class State:
    """Where a run stands: enough to go on, with the same bits as a run that was not stopped.

    The iteration is one that ended without convergence. It is done again: that is one pass, where
    keeping its labels would be as large as the samples.

    Attributes:
        centroids: (K, D), at the begin of the iteration, in the samples' type.
        iteration: Counted from 0.
    """

    centroids: Floats
    iteration: int = 0


@dataclass(frozen=True)
class Run:
    """What a run ends with.

    Attributes:
        centroids: (K, D), in the samples' type.
        labels: int32, of this rank's samples, for these centroids.
        inertia: Of all ranks, for these centroids.
        n_iter: Iterations.
        is_converged: Whether it ended before `max_iter`.
    """

    centroids: Floats
    labels: Any
    inertia: float
    n_iter: int
    is_converged: bool


def lloyd(
    problem: Problem,
    start: State,
    *,
    max_iter: int,
    tol: float,
    on_iteration: Callable[[State, Pass], None] | None = None,
) -> Run:
    """Iterate from `start`; all ranks together.

    Args:
        problem: The samples.
        start: Initial centroids, or where a run was stopped.
        max_iter: Iterations at most, those before `start` counted.
        tol: Absolute: squared shift of the centroids that ends the run.
        on_iteration: Called after each iteration that does not end the run.

    Raises:
        UncorrectedFaultError: more errors remain than may.
    """
    centroids = np.ascontiguousarray(start.centroids, dtype=problem.samples.dtype)
    last: tuple[Floats, Pass] | None = None
    is_converged = False
    iteration = start.iteration
    for iteration in range(start.iteration, max_iter):
        centroids, found = _checked_pass(problem, centroids, last)
        moved = means(problem, found, centroids)
        if problem.uncorrected and not np.isfinite(moved).all():
            problem.check_uncorrected(is_end=True)  # nothing can go on from here
        is_strict = last is not None and found.changed == 0
        shift = float(((moved.astype(np.float64) - centroids) ** 2).sum())
        is_converged = is_strict or shift <= tol
        last, centroids = (centroids, found), moved
        if is_converged:
            break
        if on_iteration is not None:
            on_iteration(State(last[0], iteration), found)
    if last is None or not np.array_equal(last[0], centroids):
        centroids, found = _checked_pass(problem, centroids, last)
    return Run(centroids, found.labels, found.inertia, iteration + 1, is_converged)


def _checked_pass(
    problem: Problem, centroids: Floats, last: tuple[Floats, Pass] | None
) -> tuple[Floats, Pass]:
    """Return a pass whose inertia has not risen, and the centroids it was made with."""
    before = last[1].labels if last else None
    # Where a cluster was empty it may be so again, and then the distances are needed.
    is_empty = bool(last and (last[1].counts <= 0).any())
    found = one_pass(problem, centroids, before, distances=is_empty)
    if not problem.protection.is_on or not _has_risen(problem, found, last):
        return centroids, found
    problem.count(detected=1)
    if problem.protection.mode != "detect":
        # Which of the two is wrong cannot be told: both are done again, otherwise.
        problem.count(recomputed=1)
        samples = problem.samples
        careful = TorchBackend(torch.float64).prepare(samples.values, samples.weights)
        if last is not None:
            last = last[0], one_pass(problem, last[0], prepared=careful)
            centroids, before = means(problem, last[1], last[0]), last[1].labels
        found = one_pass(problem, centroids, before, prepared=careful)
        if not _has_risen(problem, found, last):
            return centroids, found
    problem.count(uncorrected=1)
    problem.uncorrected += 1
    problem.check_uncorrected()
    return centroids, found


def _has_risen(problem: Problem, found: Pass, last: tuple[Floats, Pass] | None) -> bool:
    """Whether the inertia is higher than it can be.

    Means are the best centroids of their clusters, and the nearest centroid is the best label.
    Labels are right up to the rounding of two distances, ``2 (D + 4) u (|x| + |c|)^2`` a sample,
    and ``|c| <= |x| + distance`` for each centroid that is taken for the nearest.
    """
    if last is None:
        return not np.isfinite(found.inertia)
    before = last[1].inertia
    unit = float(np.finfo(problem.samples.dtype).eps) / 2
    terms = problem.samples.values.shape[1] + 4
    squares = problem.totals.squares if problem.totals else 0.0
    allowed = before + 4 * terms * unit * (4 * squares + before)
    return not found.inertia <= allowed


def means(problem: Problem, found: Pass, centroids: Floats) -> Floats:
    """Return the clusters' means, in the samples' type; empty clusters are moved first.

    A cluster that stays empty, for there are not enough different samples, lies on the largest.
    """
    sums, counts = found.sums, found.counts
    if (counts <= 0).any():
        if found.distances is None:
            again = one_pass(problem, centroids, distances=True)
            found = replace(found, distances=again.distances)
        sums, counts = _relocated(problem, found)
    moved = np.where(counts[:, None] > 0, sums / np.where(counts > 0, counts, 1.0)[:, None], np.nan)
    moved[counts <= 0] = moved[counts.argmax()]
    return moved.astype(centroids.dtype)


def _relocated(problem: Problem, found: Pass) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums and counts with the furthest samples moved into empty clusters.

    Each rank proposes its furthest, and all choose alike: by distance, then by place.
    """
    empty = np.flatnonzero(found.counts <= 0)
    parts = problem.group.gather(_furthest(problem, found, len(empty)))
    # The place among all samples: ranks one after the other.
    rows = np.concatenate(parts)
    sums, counts = found.sums.copy(), found.counts.copy()
    if not len(rows) or not rows[:, 0].max() > 0:
        return sums, counts
    order = np.argsort(-rows[:, 0], kind="stable")
    for cluster, row in zip(empty, rows[order], strict=False):
        weight, old, sample = row[1], int(row[2]), row[3:]
        sums[old] -= weight * sample
        counts[old] -= weight
        if counts[old] <= _REST * found.counts[old]:
            sums[old], counts[old] = 0.0, 0.0
        sums[cluster], counts[cluster] = weight * sample, weight
    return sums, counts


def _furthest(problem: Problem, found: Pass, count: int) -> NDArray[np.float64]:
    """Return this rank's furthest samples as rows of distance, weight, label and features."""
    distances = np.asarray(to_numpy(found.distances))
    weights = problem.samples.weights
    if weights is not None:
        distances = np.where(weights > 0, distances, -1.0)  # they belong to no cluster
    count = min(count, int((distances >= 0).sum()))
    if not count:
        return np.zeros((0, 3 + problem.samples.values.shape[1]))
    limit = np.partition(distances, -count)[-count]
    above = np.flatnonzero(distances > limit)
    chosen = np.sort(np.append(above, np.flatnonzero(distances == limit)[: count - len(above)]))
    samples = np.asarray(to_numpy(problem.samples.tensor[torch.from_numpy(chosen)]))
    return np.column_stack(
        [
            distances[chosen],
            np.ones(count) if weights is None else weights[chosen],
            np.asarray(to_numpy(found.labels))[chosen],
            samples,
        ]
    ).astype(np.float64)
