"""One pass over all samples of all ranks: assign, add up, and check what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.core.errors import UncorrectedFaultError
from lowtide.kmeans.backend import Assignment, Backend, Floats, Prepared
from lowtide.kmeans.distributed import Group
from lowtide.kmeans.invariants import Totals, sums_by_label
from lowtide.kmeans.protection import FaultReport, Protection
from lowtide.kmeans.samples import Moments, Samples, to_numpy

Vector = NDArray[np.float64]
_TAIL = 4  # inertia, changed labels, uncorrected errors, failed ranks


@dataclass
class Problem:
    """What is clustered, how, and with whom.

    Attributes:
        samples: This rank's.
        prepared: The same, made ready by a backend.
        group: Ranks that share the clustering.
        protection: Checks to make.
        moments: Of all ranks' samples.
        totals: Of all ranks' samples, where checks are on.
        report: Counts of this rank; what all ranks see together is counted on rank 0.
        begin: Place of this rank's first sample among all: ranks come one after the other.
        uncorrected: Errors that remain, on all ranks.
    """

    samples: Samples
    prepared: Prepared
    group: Group
    protection: Protection
    moments: Moments
    totals: Totals | None = None
    begin: int = 0
    report: FaultReport = field(default_factory=FaultReport)
    uncorrected: int = 0

    @classmethod
    def of(
        cls,
        samples: Samples,
        backend: Backend,
        *,
        group: Group | None = None,
        protection: Protection | None = None,
    ) -> Problem:
        """Return a problem; all ranks of the group call this together."""
        group = group or Group()
        protection = protection or Protection()
        prepared, mine = group.together(
            lambda: (
                backend.prepare(samples.values, samples.weights),
                Moments.of(samples.tensor),
            )
        )
        rows = group.gather(np.array([[mine.count, mine.squares, *mine.mean]]))
        parts = [Moments(int(row[0, 0]), row[0, 2:], float(row[0, 1])) for row in rows]
        problem = cls(samples, prepared, group, protection, Moments.merged(parts))
        problem.begin = sum(part.count for part in parts[: group.rank])
        if protection.is_on:
            totals = Totals.of(samples.tensor, samples.weights)
            problem.totals = Totals.unpacked(group.sum(totals.packed()))
        return problem

    def count(self, **counts: int) -> None:
        """Count something that all ranks saw together."""
        if self.group.rank == 0:
            self.report.add(FaultReport(**counts))

    def end(self) -> FaultReport:
        """Return the counts of all ranks, once nothing more is computed.

        Raises:
            UncorrectedFaultError: more errors remain than may.
        """
        names = [each.name for each in fields(FaultReport)]
        mine = np.array([[float(getattr(self.report, name)) for name in names]])
        whole = FaultReport()
        for row in self.group.gather(mine):
            values = dict(zip(names, row[0], strict=True))
            residual = float(values.pop("max_residual"))
            whole.add(
                FaultReport(**{name: int(n) for name, n in values.items()}, max_residual=residual)
            )
        self.check_uncorrected(is_end=True)
        return whole

    def check_uncorrected(self, *, is_end: bool = False) -> None:
        """Raise where more errors remain than may; with mode "detect" only at the end."""
        if self.protection.mode == "detect" and not is_end:
            return
        if self.uncorrected > self.protection.max_uncorrected:
            advice = (
                'use "correct" to have them put right'
                if self.protection.mode == "detect"
                else "run it again on other hardware"
            )
            raise UncorrectedFaultError(
                f"fault_tolerance: {self.uncorrected} silent errors were found that are not put "
                f"right, allowed are {self.protection.max_uncorrected} (max_uncorrected); {advice}"
            )


@dataclass(frozen=True)
class Pass:
    """What came of a pass.

    Attributes:
        labels: int32, of this rank's samples; a tensor where the samples are.
        distances: float64, squared, likewise; None if not asked for.
        sums: float64 (K, D), of all ranks.
        counts: float64 (K,), of all ranks.
        inertia: Of all ranks.
        changed: Labels that differ from those before, on all ranks.
    """

    labels: Any
    distances: Any
    sums: Vector
    counts: Vector
    inertia: float
    changed: int


def one_pass(
    problem: Problem,
    centroids: Floats,
    before: Any = None,
    *,
    distances: bool = False,
    prepared: Prepared | None = None,
) -> Pass:
    """Assign all samples to (K, D) centroids and add up the clusters; on all ranks together.

    Args:
        problem: The samples.
        centroids: (K, D), the same on all ranks.
        before: Labels to compare with, or None.
        distances: Whether `Pass.distances` is wanted.
        prepared: The samples, made ready by another backend than the problem's.

    Raises:
        UncorrectedFaultError: more errors remain than may.
        LowtideError: it failed on another rank.
    """
    done: Assignment | None = None
    error: Exception | None = None
    try:
        done = (prepared or problem.prepared).assign(
            centroids, problem.protection, distances=distances
        )
        packed = _packed(done, before)
    except Exception as caught:  # noqa: BLE001  # raised below, on every rank
        error = caught
        packed = np.zeros(centroids.size + len(centroids) + _TAIL)
        packed[-1] = 1.0
    total = problem.group.sum(packed)
    if done is None or total[-1]:
        problem.group.failed(error)
        raise AssertionError  # not reached: failed() raises
    if problem.protection.is_on:
        problem.report.add(done.report)
        total = _verified(problem, done, packed, total)
    inertia, changed, uncorrected, _ = total[-_TAIL:]
    problem.uncorrected += int(uncorrected)
    problem.check_uncorrected()
    sums, counts = _unpacked(total, centroids.shape)
    return Pass(done.labels, done.distances, sums, counts, float(inertia), int(changed))


def _packed(done: Assignment, before: Any) -> Vector:
    changed = len(done.labels) if before is None else int((done.labels != before).sum())
    tail = [done.inertia, float(changed), float(done.report.uncorrected), 0.0]
    return np.concatenate([done.sums.ravel(), done.counts, tail])


def _unpacked(total: Vector, shape: tuple[int, ...]) -> tuple[Vector, Vector]:
    size = shape[0] * shape[1]
    return total[:size].reshape(shape).copy(), total[size : size + shape[0]].copy()


def _verified(problem: Problem, done: Assignment, packed: Vector, total: Vector) -> Vector:
    """Return the sum of all ranks' vectors, known to be right and the same on all.

    What does not agree is gathered and added again, at last with sums made from the labels.
    """
    shape = done.sums.shape
    group = problem.group

    def is_held(vector: Vector) -> bool:
        residual = _totals(problem).residual(*_unpacked(vector, shape))
        is_right = bool(residual <= 1)  # not a number is not
        if is_right:
            problem.report.max_residual = max(problem.report.max_residual, residual)
        problem.count(checks=1)
        return group.agree(vector, is_right=is_right)

    if is_held(total):
        return total
    problem.count(detected=1)
    if problem.protection.mode != "detect":
        problem.count(recomputed=1)
        again = _added(group, packed)
        if is_held(again):
            return again
        weights = problem.samples.weights
        labels = np.asarray(to_numpy(done.labels))
        sums, counts = sums_by_label(problem.samples.tensor, weights, labels, shape[0])
        tail = packed[-_TAIL:]
        again = _added(group, np.concatenate([sums.ravel(), counts, tail]))
        if is_held(again):
            return again
        total = again
    problem.count(uncorrected=1)
    total = group.gather(total[None])[0][0]  # whatever it is, all go on with the same
    total[-2] += 1
    return total


def _added(group: Group, packed: Vector) -> Vector:
    return np.asarray(np.sum([part[0] for part in group.gather(packed[None])], axis=0))


def _totals(problem: Problem) -> Totals:
    if problem.totals is None:
        raise AssertionError  # Problem.of made them: protection is on
    return problem.totals
