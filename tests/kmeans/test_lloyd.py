"""The loop: scikit-learn's rules in a plain oracle, restarts, and the checks from end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lowtide.core.errors import UncorrectedFaultError
from lowtide.kmeans.backend import Assignment, Backend, Floats, Prepared
from lowtide.kmeans.backends import choose
from lowtide.kmeans.lloyd import Run, State, lloyd
from lowtide.kmeans.protection import FaultReport, Protection
from tests.kmeans.points import chosen, points, problem_of


def run_of(samples: Any, start: Any, weights: Any = None, **options: Any) -> Run:
    problem = problem_of(samples, weights, mode=options.pop("mode", "off"))
    options = {"max_iter": 100, "tol": 0.0} | options
    return lloyd(problem, State(start), **options)


def oracle(samples: Any, centroids: Any, iterations: int) -> Any:
    for _ in range(iterations):
        squares = ((samples[:, None] - centroids[None]) ** 2).sum(axis=2)
        labels = squares.argmin(axis=1)
        centroids = np.stack([samples[labels == k].mean(axis=0) for k in range(len(centroids))])
    return centroids


class Wrong(Backend):
    """The backend that runs by default, whose n-th result is changed."""

    name = "wrong"

    def __init__(self, change: Callable[[Assignment], Assignment], *numbers: int) -> None:
        self.change, self.numbers, self.calls = change, numbers, 0

    def prepare(self, samples: Any, weights: Any = None) -> Prepared:
        inner, outer = choose("auto").prepare(samples, weights), self

        class Faulty(Prepared):
            def assign(
                self,
                centroids: Floats,
                protection: Protection | None = None,
                *,
                distances: bool = True,
            ) -> Assignment:
                done = inner.assign(centroids, protection, distances=distances)
                outer.calls += 1
                return outer.change(done) if outer.calls - 1 in outer.numbers else done

        return Faulty()


def test_iterations_are_the_oracles() -> None:
    samples = points(500, 6, 1)
    start = chosen(samples, 7)
    for iterations in (1, 2, 5):
        run = run_of(samples, start, max_iter=iterations)
        np.testing.assert_allclose(run.centroids, oracle(samples, start, iterations), rtol=1e-12)
        assert (run.n_iter, run.is_converged) == (iterations, False)
        squares = ((samples - run.centroids[run.labels]) ** 2).sum(axis=1)
        assert run.inertia == pytest.approx(squares.sum(), rel=1e-12)


def test_a_run_ends_when_no_label_changes() -> None:
    samples = points(500, 6)
    run = run_of(samples, chosen(samples, 7))
    assert run.is_converged
    before = run_of(samples, chosen(samples, 7), max_iter=run.n_iter - 1)
    assert not before.is_converged
    np.testing.assert_array_equal(run.centroids, before.centroids)  # one pass to see it
    again = run_of(samples, run.centroids)
    assert again.n_iter == 1
    np.testing.assert_array_equal(again.labels, run.labels)


def test_a_run_ends_when_no_label_changes_though_sums_round_differently() -> None:
    calls: list[int] = []

    def unsteady(done: Assignment) -> Assignment:
        calls.append(1)
        return replace(done, sums=done.sums * (1 + 1e-15 * len(calls)))

    samples = points(500, 6)
    start = chosen(samples, 7)
    problem = problem_of(samples, backend=Wrong(unsteady, *range(100)))
    run = lloyd(problem, State(start), max_iter=100, tol=0.0)
    assert (run.n_iter, run.is_converged) == (run_of(samples, start).n_iter, True)


def test_a_run_ends_when_the_centroids_move_less_than_tol() -> None:
    samples = points(500, 6, 1)
    start = chosen(samples, 7)
    shifts, places = [], start
    for iterations in range(1, 8):
        moved = oracle(samples, start, iterations)
        shifts.append(((moved - places) ** 2).sum())
        places = moved
    assert shifts[4] < min(shifts[:4])
    run = run_of(samples, start, tol=shifts[4] * 1.0001)
    assert (run.n_iter, run.is_converged) == (5, True)
    assert run_of(samples, start, tol=shifts[4] * 0.9999).n_iter > 5


def test_an_empty_cluster_gets_the_furthest_sample() -> None:
    samples = np.array([[0.0], [1.0], [2.0], [10.0], [30.0]])
    start = np.array([[1.0], [900.0], [800.0]])
    run = run_of(samples, start, max_iter=1)
    # 30 goes to the first empty cluster, 10 to the second, both out of the only full one
    np.testing.assert_array_equal(run.centroids, [[1.0], [30.0], [10.0]])
    run = run_of(samples, start, np.array([1.0, 1.0, 2.0, 1.0, 0.0]), max_iter=1)
    # a sample without weight is none: 10, then the first of 0 and 2, equally far from 1
    np.testing.assert_array_equal(run.centroids, [[5 / 3], [10.0], [0.0]])


def test_a_cluster_lies_on_the_largest_when_samples_are_too_few() -> None:
    samples = np.array([[1.0, 1.0]] * 3 + [[3.0, 3.0]] * 4)
    run = run_of(samples, np.array([[1.0, 1.0], [3.0, 3.0], [7.0, 7.0]]), max_iter=5)
    np.testing.assert_array_equal(run.centroids, [[1.0, 1.0], [3.0, 3.0], [3.0, 3.0]])
    assert (run.inertia, run.n_iter) == (0.0, 2)


def test_rounding_leaves_nothing_in_a_cluster_that_gave_all_its_samples() -> None:
    # 0.1 + 0.2 - 0.1 - 0.2 is not 0, and a mean over that would be anywhere
    samples = np.array([[-3.0], [5.0], [7.0]])
    start = np.array([[-3.0], [6.0], [90.0], [91.0]])
    weights = np.array([1.0, 0.1, 0.2])
    assert 0.1 + 0.2 - 0.1 - 0.2 != 0
    run = run_of(samples, start, weights, max_iter=1)
    np.testing.assert_array_equal(run.centroids, [[-3.0], [-3.0], [5.0], [7.0]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_run_goes_on_with_the_same_bits_from_any_iteration(dtype: Any) -> None:
    samples = points(800, 5, dtype=dtype)
    start = np.vstack([chosen(samples, 10), [[500] * 5]]).astype(dtype)  # one is empty at first
    states: list[State] = []
    whole = run_of(samples, start, on_iteration=lambda state, found: states.append(state))
    assert whole.n_iter > 6
    assert [state.iteration for state in states] == list(range(whole.n_iter - 1))
    for state in states:
        again = lloyd(problem_of(samples), state, max_iter=100, tol=0.0)
        np.testing.assert_array_equal(again.centroids, whole.centroids)
        np.testing.assert_array_equal(again.labels, whole.labels)
        assert (again.inertia, again.n_iter) == (whole.inertia, whole.n_iter)


ended: list[int] = []  # passes of runs that came to their end


def faulty_run(change: Callable[[Assignment], Assignment], mode: str, *numbers: int) -> Any:
    ended.clear()
    samples = points(400, 6, dtype=np.float32)
    start = chosen(samples, 7)
    backend = Wrong(change, *numbers)
    problem = problem_of(samples, mode=mode, backend=backend)
    run = lloyd(problem, State(start), max_iter=8, tol=0.0)
    clean = run_of(samples, start, max_iter=8, mode=mode)
    ended.append(backend.calls)
    return problem.end(), run, clean


def wrong_labels(done: Assignment) -> Assignment:
    """A consistent result for other labels: the sums agree, but it is not the nearest."""
    labels = done.labels.copy()
    labels[:200] = (labels[:200] + 1) % 7
    samples = points(400, 6, dtype=np.float32).astype(float)
    sums = np.zeros((7, 6))
    np.add.at(sums, labels, samples)
    return replace(
        done,
        labels=labels,
        sums=sums,
        counts=np.bincount(labels, minlength=7).astype(float),
        inertia=done.inertia + 1e4,
    )


WRONGS: dict[str, tuple[Callable[[Assignment], Assignment], int]] = {
    "labels": (wrong_labels, 3),
    "labels, and nobody says so": (
        lambda done: replace(wrong_labels(done), inertia=done.inertia),
        1,
    ),
    "inertia too high": (lambda done: replace(done, inertia=done.inertia * 1.5), 3),
    "inertia too low": (lambda done: replace(done, inertia=done.inertia * 0.5), 3),
    "inertia not a number": (lambda done: replace(done, inertia=float("nan")), 3),
    "first inertia not a number": (lambda done: replace(done, inertia=float("nan")), 0),
    "a sum": (lambda done: replace(done, sums=done.sums + np.eye(7, 6) * 1e-6), 2),
    "a count": (lambda done: replace(done, counts=done.counts + np.eye(7)[2]), 2),
    "a sum is infinite": (lambda done: replace(done, sums=done.sums / (1 - np.eye(7, 6))), 2),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("kind", WRONGS)
def test_a_wrong_result_is_found_and_made_again(kind: str) -> None:
    change, number = WRONGS[kind]
    report, run, clean = faulty_run(change, "correct", number)
    assert report.detected == 1
    assert report.recomputed == 1
    assert report.uncorrected == 0
    np.testing.assert_array_equal(run.labels, clean.labels)
    np.testing.assert_allclose(run.centroids, clean.centroids, rtol=1e-6)
    assert run.inertia == pytest.approx(clean.inertia, rel=1e-6)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("kind", WRONGS)
def test_detect_raises_at_the_end(kind: str) -> None:
    change, number = WRONGS[kind]
    with pytest.raises(UncorrectedFaultError, match=r'[12] silent errors.*use "correct"'):
        faulty_run(change, "detect", number)
    # The run itself goes on, unless there is nothing to go on with.
    assert len(ended) == (kind != "a sum is infinite")
    assert all(passes >= 8 for passes in ended)


def test_a_run_raises_when_an_error_stays() -> None:
    def uncorrected(done: Assignment) -> Assignment:
        return replace(done, report=FaultReport(detected=2, uncorrected=2))

    with pytest.raises(UncorrectedFaultError, match=r"2 silent errors.*allowed are 0"):
        faulty_run(uncorrected, "correct", 1)
    samples = points(400, 6)
    problem = problem_of(samples, backend=Wrong(uncorrected, 1))
    problem.protection = Protection("correct", max_uncorrected=2)
    problem.totals = problem_of(samples, mode="correct").totals
    run = lloyd(problem, State(chosen(samples, 7)), max_iter=8, tol=0.0)
    assert run.n_iter == 8
    assert problem.end().uncorrected == 2


@pytest.mark.parametrize("kind", ["mean", "heavy", "tiny", "huge", "equal", "grid"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inertia_and_sums_alarm_nobody_when_nothing_is_wrong(kind: str, dtype: Any) -> None:
    g = np.random.default_rng(5)
    for features, n_clusters in ((1, 3), (2, 40), (40, 7)):
        normal = g.standard_normal((900, features))
        samples = {
            "mean": normal + 1e4, "heavy": g.standard_t(1.2, normal.shape), "tiny": normal * 1e-15,
            "huge": normal * 1e15, "equal": normal[g.integers(0, 5, 900)], "grid": normal.round(),
        }[kind].astype(dtype)  # fmt: skip
        weights = g.random(900) if kind == "heavy" else None
        problem = problem_of(samples, weights, mode="correct")
        lloyd(problem, State(chosen(samples, n_clusters)), max_iter=60, tol=0.0)
        report = problem.end()
        assert report.detected == 0
        assert report.checks > 900
