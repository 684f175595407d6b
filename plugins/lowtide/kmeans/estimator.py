"""`KMeans`: scikit-learn's estimator, for arrays, tensors and ranks, with fault tolerance."""

from __future__ import annotations

import logging
import numbers
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowtide.core.errors import ConfigError, DataError, UncorrectedFaultError
from lowtide.kmeans.backends import NAMES, choose
from lowtide.kmeans.distributed import Group, group_of
from lowtide.kmeans.initial import initial
from lowtide.kmeans.lloyd import State
from lowtide.kmeans.minibatch import MiniBatches
from lowtide.kmeans.passes import Pass, Problem
from lowtide.kmeans.protection import Protection
from lowtide.kmeans.runs import Plan, best_run
from lowtide.kmeans.samples import Samples, as_samples, blocks_of, check_not_empty, to_numpy
from lowtide.kmeans.scikit import ConvergenceWarning, Estimator, NotFittedError

_log = logging.getLogger("lowtide")


class KMeans(Estimator):
    """K-Means clustering with scikit-learn's interface and results.

    Samples are (M, D) numpy arrays (mapped files too), torch tensors on any device, or whatever
    numpy makes an array of. Results are of the same kind: tensors for tensors. float32 and float64
    in C order are not copied; float16 and bfloat16 are converted to float32, in one copy. The
    samples are never changed.

    Args:
        n_clusters: K.
        init: "k-means++" (greedy, as scikit-learn's), "k-means||" (a few passes instead of K),
            "random", a (K, D) array, or a function of samples, K and `random_state`.
        n_init: Runs from different starts, the best of which is kept; "auto" is 10 for "random"
            and a function, else 1.
        max_iter: Iterations of a run at most.
        tol: Squared shift of the centroids that ends a run, times the mean variance of the
            features.
        random_state: Seed, RandomState, or None.
        backend: "auto", "native", "torch" or "reference"; see `lowtide.kmeans.backends.choose`.
        fault_tolerance: "off", "detect", "correct", "recompute", True ("correct"), a `Protection`
            or its options; see there.
        process_group: None, "world", or a torch.distributed group whose ranks each call with their
            own samples, and end with the same centroids. A shard may be empty.
        checkpoint: A file that `fit` writes every few seconds and removes at its end, and goes on
            from, with the same result, where it finds it. In a group rank 0 reads and writes it.
        verbose: Whether iterations are logged (``logging``, level INFO).

    Attributes:
        cluster_centers_: (K, D) centroids, in the samples' type.
        labels_: int32 (M,), of this rank's samples.
        inertia_: Weighted sum of squared distances to the centroids, of all ranks.
        n_iter_: Iterations of the best run.
        n_features_in_: D.
        feature_names_in_: Names of columns, where samples had them and scikit-learn is installed.
        fault_report_: What the checks found: a `FaultReport` of all runs and ranks.
        n_steps_: Batches seen, after `partial_fit`.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: Any = None,
        backend: str = "auto",
        fault_tolerance: Any = "off",
        process_group: Any = None,
        checkpoint: str | Path | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.backend = backend
        self.fault_tolerance = fault_tolerance
        self.process_group = process_group
        self.checkpoint = checkpoint
        self.verbose = verbose

    @classmethod
    def from_centroids(cls, centroids: Any, **parameters: Any) -> KMeans:
        """Return a fitted model with (K, D) centroids, for `predict`, `transform` and `score`.

        Args:
            centroids: A matrix, as samples may be; copied.
            parameters: As of the class, but for `n_clusters`.

        Raises:
            DataError: they are no (K, D) matrix of finite numbers.
        """
        samples = as_samples(centroids)
        check_not_empty(samples.values.shape)
        model = cls(len(samples.values), **parameters)
        model.look_at(centroids, samples.values.shape[1], is_first=True)
        model._keep(samples, np.array(to_numpy(samples.tensor)))
        return model

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:  # noqa: ARG002
        """Cluster samples.

        Args:
            X: (M, D) samples.
            y: Not used.
            sample_weight: (M,) weights, or None for all ones.

        Raises:
            ConfigError: a parameter that is not allowed.
            DataError: samples or weights that cannot be clustered.
            UncorrectedFaultError: more errors were found than may remain.
        """
        group = group_of(self.process_group)
        samples = group.together(lambda: self._first_samples(X, sample_weight))
        problem, generator = self._problem(samples, group)
        plan = Plan(
            init=self.init,
            n_clusters=self.n_clusters,
            runs=self._runs(),
            max_iter=self.max_iter,
            tol=self.tol * problem.moments.mean_variance,
            checkpoint=None if self.checkpoint is None else Path(self.checkpoint),
        )
        best = best_run(problem, plan, generator, _logged if self.verbose else None)
        self.fault_report_ = problem.end()
        self._keep(samples, best.centroids)
        self.labels_ = samples.like_given(best.labels)
        self.inertia_ = best.inertia
        self.n_iter_ = best.n_iter
        self._warn_of_few(group)
        return self

    def partial_fit(
        self,
        X: Any,
        y: Any = None,  # noqa: ARG002
        sample_weight: Any = None,
    ) -> KMeans:
        """Move the centroids by one batch of samples, as scikit-learn's MiniBatchKMeans does.

        The first batch, unless `fit` came before, also gives the initial centroids, so it has K
        samples or more. `labels_` and `inertia_` are of this batch.

        Raises:
            ConfigError, DataError, UncorrectedFaultError: as `fit`.
        """
        group = group_of(self.process_group)
        is_first = not hasattr(self, "cluster_centers_")
        if is_first:
            samples = group.together(lambda: self._first_samples(X, sample_weight))
        else:
            samples = group.together(lambda: self._more_samples(X, sample_weight, is_shard=True))
        problem, generator = self._problem(samples, group, is_first=is_first)
        if is_first:
            centroids = initial(problem, self.init, self.n_clusters, generator)
            self._batches = MiniBatches.fresh(self.n_clusters, generator)
            self.n_steps_ = 0
        else:
            centroids = np.asarray(to_numpy(self.cluster_centers_), dtype=samples.dtype)
            if not hasattr(self, "_batches"):  # after fit
                self._batches = MiniBatches.fresh(self.n_clusters, generator)
                self.n_steps_ = 0
        centroids, labels, inertia = self._batches.step(problem, centroids)
        self.fault_report_ = problem.end()
        self._keep(samples, centroids)
        self.labels_ = samples.like_given(labels)
        self.inertia_ = inertia
        self.n_steps_ += 1
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Return `labels_` after `fit`."""
        return self.fit(X, y, sample_weight).labels_

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Return `transform` after `fit`."""
        return self.fit(X, y, sample_weight).transform(X)

    def predict(self, X: Any) -> Any:
        """Return int32 (M,): the nearest centroid of each sample. On this rank alone.

        Raises:
            NotFittedError: there are no centroids yet.
            DataError, UncorrectedFaultError: as `fit`.
        """
        samples = self._more_samples(X, None)
        return samples.like_given(self._assigned(samples).labels)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:  # noqa: ARG002
        """Return the negative inertia of samples. On this rank alone; raises as `predict`."""
        return -self._assigned(self._more_samples(X, sample_weight)).inertia

    def transform(self, X: Any) -> Any:
        """Return (M, K) distances to all centroids, in the samples' type; without checks.

        Raises:
            NotFittedError: there are no centroids yet.
            DataError: samples that do not fit.
        """
        samples = self._more_samples(X, None)
        values = samples.tensor
        places = torch.as_tensor(self.cluster_centers_, device=values.device).double()
        shift = places.mean(0)  # distances stay, and lose fewer digits
        places = places - shift
        found = torch.empty(len(values), len(places), dtype=values.dtype, device=values.device)
        squares = places.square().sum(1)
        for place, block in blocks_of(values):
            wide = block.double() - shift
            part = torch.addmm(squares, wide, places.T, alpha=-2)
            part += wide.square().sum(1, keepdim=True)
            found[place] = part.clamp_(min=0).sqrt_()
        return samples.like_given(found)

    def _assigned(self, samples: Samples) -> Any:
        protection = Protection.of(self.fault_tolerance)
        prepared = choose(self.backend, samples.values).prepare(samples.values, samples.weights)
        centroids = np.asarray(to_numpy(self.cluster_centers_), dtype=samples.dtype)
        done = prepared.assign(np.ascontiguousarray(centroids), protection)
        if done.report.uncorrected > protection.max_uncorrected:
            raise UncorrectedFaultError(
                f"fault_tolerance: {done.report.uncorrected} silent errors were found in the "
                f"assignment that are not put right, allowed are {protection.max_uncorrected} "
                f"(max_uncorrected)"
            )
        return done

    def _first_samples(self, given: Any, weights: Any) -> Samples:
        self._check_parameters()
        samples = as_samples(given, weights)
        self.look_at(given, samples.values.shape[1], is_first=True)
        return samples

    def _more_samples(self, given: Any, weights: Any, *, is_shard: bool = False) -> Samples:
        if not hasattr(self, "cluster_centers_"):
            raise NotFittedError(
                f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with "
                f"appropriate arguments before using this estimator."
            )
        samples = as_samples(given, weights)
        if not is_shard:
            check_not_empty(samples.values.shape)
        self.look_at(given, samples.values.shape[1], is_first=False)
        return samples

    def _check_parameters(self) -> None:
        for name, least in (("n_clusters", 1), ("max_iter", 1), ("n_init", 1)):
            value = getattr(self, name)
            is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if not (is_whole and value >= least) and (name, value) != ("n_init", "auto"):
                auto = ' or "auto"' if name == "n_init" else ""
                raise ConfigError(f"{name}: got {value!r}, allowed are whole numbers from 1{auto}")
        if not isinstance(self.tol, numbers.Real) or not 0 <= self.tol < float("inf"):
            raise ConfigError(f"tol: got {self.tol!r}, allowed are numbers from 0")
        if self.backend not in NAMES:
            choose(self.backend)
        Protection.of(self.fault_tolerance)

    def _problem(
        self, samples: Samples, group: Group, *, is_first: bool = True
    ) -> tuple[Problem, np.random.RandomState]:
        """Return what is clustered, and the generator, the same on all ranks."""
        mine = float(len(samples.values))
        weight = mine if samples.weights is None else float(samples.weights.sum())
        count, weight = group.sum(np.array([mine, weight]))
        if not count:
            check_not_empty(samples.values.shape)
        if not weight > 0:
            raise DataError("sample_weight: all weights are zero; one of them has to be above 0")
        if is_first and count < self.n_clusters:
            raise DataError(f"n_samples={int(count)} should be >= n_clusters={self.n_clusters}.")
        generator, seed = _generator(self.random_state, group)
        self._check_alike(samples, group, seed)
        backend = group.together(lambda: choose(self.backend, samples.values))
        protection = Protection.of(self.fault_tolerance)
        problem = Problem.of(samples, backend, group=group, protection=protection)
        return problem, generator

    def _check_alike(self, samples: Samples, group: Group, seed: int) -> None:
        """Raise on all ranks where their calls do not fit together."""
        mine = {
            "number of features": samples.values.shape[1],
            "bytes of a number": samples.dtype.itemsize,
            "n_clusters": self.n_clusters,
            "max_iter": self.max_iter,
            "runs": self._runs(),
            "tol": self.tol,
            "random_state": seed,
            "fault tolerance": float(Protection.of(self.fault_tolerance).is_on),
        }
        rows = np.concatenate(group.gather(np.array([list(mine.values())], np.float64)))
        for name, column in zip(mine, rows.T, strict=True):
            if (column != column[0]).any():
                raise DataError(
                    f"process_group: ranks have different {name}: "
                    f"{', '.join(f'{value:g}' for value in column)}; call alike on all of them"
                )

    def _runs(self) -> int:
        if isinstance(self.init, str) or callable(self.init):
            if self.n_init != "auto":
                return int(self.n_init)
            return 10 if callable(self.init) or self.init == "random" else 1
        return 1  # from the same start each would be the same

    def _keep(self, samples: Samples, centroids: Any) -> None:
        self.cluster_centers_ = samples.like_given(centroids)
        self._n_features_out = len(centroids)

    def _warn_of_few(self, group: Group) -> None:
        seen = np.bincount(np.asarray(to_numpy(self.labels_)), minlength=self.n_clusters)
        found = int((group.sum(seen.astype(np.float64)) > 0).sum())
        if found < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({found}) found smaller than n_clusters "
                f"({self.n_clusters}). Possibly due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=3,
            )


def _generator(random_state: Any, group: Group) -> tuple[np.random.RandomState, int]:
    """Return a generator with the same numbers on all ranks, and the seed where it is given."""
    if isinstance(random_state, numbers.Integral):
        return np.random.RandomState(int(random_state)), int(random_state)
    if isinstance(random_state, np.random.RandomState):
        generator = random_state
    elif random_state is None:
        generator = np.random.mtrand._rand  # numpy's own, which np.random.seed sets
    else:
        raise ConfigError(
            f"random_state: got {random_state!r}, allowed are a whole number, a RandomState or None"
        )
    if group.size > 1:
        generator = np.random.RandomState(group.same(int(generator.randint(2**31 - 1))))
    return generator, -1


def _logged(run: int, state: State, found: Pass) -> None:
    _log.info("run %d, iteration %d: inertia %g", run, state.iteration, found.inertia)
