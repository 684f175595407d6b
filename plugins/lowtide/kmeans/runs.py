"""Runs from several starts, the best of which is kept; a fit that was killed goes on from a file.

The file holds centroids, the iteration, the state of the random generator and the best run so far:
one float64 vector in a .npy file, some kilobytes. A fit that goes on ends with the bits of one that
was never stopped.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.core.errors import ConfigError, DataError
from lowtide.kmeans.backend import Floats
from lowtide.kmeans.initial import initial
from lowtide.kmeans.lloyd import Run, State, lloyd
from lowtide.kmeans.passes import Pass, Problem, one_pass

EVERY_S = 5.0  # between two writes of the file
_SAME = 1e-10  # relative: inertias nearer than this are of the same clustering
_KEYS = 624  # words of the Mersenne Twister's state
_NONE = -1.0
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """What runs are made.

    Attributes:
        init: As `initial` takes it.
        n_clusters: K.
        runs: How many.
        max_iter: Iterations of each at most.
        tol: Absolute.
        checkpoint: File to go on from, or None.
    """

    init: Any
    n_clusters: int
    runs: int
    max_iter: int
    tol: float
    checkpoint: Path | None = None


def best_run(
    problem: Problem,
    plan: Plan,
    generator: np.random.RandomState,
    on_iteration: Callable[[int, State, Pass], None] | None = None,
) -> Run:
    """Return the run with the least inertia; all ranks together.

    Args:
        problem: The samples.
        plan: What is to be run.
        generator: The same on all ranks.
        on_iteration: Called with the number of the run after each iteration that does not end it.

    Raises:
        DataError: the file is of another fit, or none.
        ConfigError: with a file, a generator other than the Mersenne Twister.
        UncorrectedFaultError: more errors remain than may.
    """
    file = None if plan.checkpoint is None else _File(plan.checkpoint, problem, plan)
    found = None if file is None else file.read()
    best = None if found is None else found.best
    for number in range(0 if found is None else found.run, plan.runs):
        if found is not None and number == found.run:
            generator, start = found.generator, found.start
        else:
            start = State(initial(problem, plan.init, plan.n_clusters, generator))

        after = _After(on_iteration, file, number, generator, best)
        run = lloyd(problem, start, max_iter=plan.max_iter, tol=plan.tol, on_iteration=after)
        if best is None or run.inertia < best.inertia * (1 - _SAME):
            best = run
    if best is None:
        raise AssertionError  # there is at least one run
    if best.labels is None:  # it was made before the fit was stopped
        labels = one_pass(problem, best.centroids).labels
        best = Run(best.centroids, labels, best.inertia, best.n_iter, best.is_converged)
    if file is not None:
        file.remove()
    return best


@dataclass(frozen=True)
class _Position:
    run: int
    start: State
    generator: np.random.RandomState
    best: Run | None


@dataclass(frozen=True)
class _After:
    """What happens after an iteration of a run."""

    on_iteration: Callable[[int, State, Pass], None] | None
    file: _File | None
    run: int
    generator: np.random.RandomState
    best: Run | None

    def __call__(self, state: State, found: Pass) -> None:
        if self.on_iteration is not None:
            self.on_iteration(self.run, state, found)
        if self.file is not None:
            self.file.write(_Position(self.run, state, self.generator, self.best))


@dataclass
class _File:
    """Where a fit stands, on disk; rank 0 reads and writes."""

    path: Path
    problem: Problem
    plan: Plan
    _written_s: float = field(default_factory=time.monotonic)

    def read(self) -> _Position | None:
        """Return the position that all ranks go on from, or None where there is no file."""
        group = self.problem.group
        vector = group.together(self._load if group.rank == 0 else lambda: self._empty(0))
        rows = group.gather(vector)[0]
        return self._unpacked(rows[0]) if len(rows) else None

    def write(self, position: _Position) -> None:
        """Write a position, not too often. A fit does not end because a disk is full."""
        if self.problem.group.rank or time.monotonic() - self._written_s < EVERY_S:
            return
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                np.lib.format.write_array(file, self._packed(position), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            warnings.warn(
                f"checkpoint: {self.path} cannot be written ({error}); the fit goes on without",
                RuntimeWarning,
                stacklevel=2,
            )
        self._written_s = time.monotonic()

    def remove(self) -> None:
        """Remove the file of a fit that ended."""
        if self.problem.group.rank == 0:
            self.path.unlink(missing_ok=True)

    def _empty(self, count: int) -> Vector:
        shape = self.plan.n_clusters * self.problem.samples.values.shape[1]
        return np.zeros((count, 9 + _KEYS + 2 * shape))

    def _load(self) -> Vector:
        if not self.path.exists():
            return self._empty(0)
        try:
            vector = np.load(self.path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"checkpoint: {self.path} cannot be read ({error}); remove it, or name another file"
            ) from error
        wanted = self._empty(1)
        if (
            vector.dtype != np.float64
            or vector.shape != wanted[0].shape
            or vector[0] != self._key()
        ):
            raise DataError(
                f"checkpoint: {self.path} is of other samples or of a fit with other parameters; "
                f"remove it, or name another file"
            )
        return vector[None]

    def _key(self) -> float:
        """What makes a fit the same: its samples, by their moments, and its parameters."""
        moments, plan = self.problem.moments, self.plan
        init = plan.init if isinstance(plan.init, str) else type(plan.init).__name__
        numbers = [moments.count, moments.squares, plan.n_clusters, plan.runs, plan.max_iter]
        said = repr((init, [*map(float, numbers), plan.tol], self.problem.samples.dtype.name))
        digest = hashlib.blake2b(said.encode() + moments.mean.tobytes(), digest_size=6).digest()
        return float(int.from_bytes(digest, "little"))  # 48 bits: exact in float64

    def _packed(self, position: _Position) -> Vector:
        state: Any = position.generator.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            raise ConfigError(
                f"random_state: a RandomState over {state['bit_generator']} cannot be kept in a "
                f"checkpoint; allowed are numpy.random.RandomState(seed) and a whole number"
            )
        vector = self._empty(1)[0]
        best = position.best
        vector[:9] = [
            self._key(), position.run, position.start.iteration, state["state"]["pos"],
            state["has_gauss"], state["gauss"],
            _NONE if best is None else best.n_iter, 0.0 if best is None else best.inertia,
            0.0 if best is None else best.is_converged,
        ]  # fmt: skip
        vector[9 : 9 + _KEYS] = state["state"]["key"]
        places = vector[9 + _KEYS :].reshape(2, -1)
        places[0] = position.start.centroids.ravel()
        if best is not None:
            places[1] = best.centroids.ravel()
        return vector

    def _unpacked(self, vector: Vector) -> _Position:
        _, run, iteration, pos, has_gauss, gauss, n_iter, inertia, is_converged = vector[:9]
        generator = np.random.RandomState()
        key = vector[9 : 9 + _KEYS].astype(np.uint32)
        generator.set_state(("MT19937", key, int(pos), int(has_gauss), float(gauss)))
        dtype = self.problem.samples.dtype
        shape = (2, self.plan.n_clusters, self.problem.samples.values.shape[1])
        places: Floats = vector[9 + _KEYS :].reshape(shape).astype(dtype)
        best = None
        if n_iter != _NONE:
            best = Run(places[1], None, float(inertia), int(n_iter), bool(is_converged))
        return _Position(int(run), State(places[0], int(iteration)), generator, best)
