"""Where the centroids start: greedy k-means++, k-means||, random samples, or what the caller has.

On one rank k-means++ and random draw the same random numbers in the same order as scikit-learn, so
that float64 samples start at the same places for the same `random_state`. With several ranks all
hold the same generator and draw from all samples, so that shards of the same samples start at the
same places too.

Fault tolerance does not reach the k-means++ draws: an error there is another start, never a wrong
result. The passes of k-means|| are checked like any other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import ConfigError, DataError, listed, near
from lowtide.kmeans.backend import Floats
from lowtide.kmeans.passes import Problem, one_pass
from lowtide.kmeans.portable import TorchBackend, full_precision
from lowtide.kmeans.samples import Samples, blocks_of, to_numpy

Masses = NDArray[np.float64]
METHODS = ("k-means++", "k-means||", "random")
_ROUNDS = 5  # of k-means||: Bahmani et al., section 5, find more of no use
_OVERSAMPLING = 2  # candidates drawn in a round, times K


def initial(
    problem: Problem, init: Any, n_clusters: int, generator: np.random.RandomState
) -> Floats:
    """Return (K, D) initial centroids in the samples' type, the same on all ranks.

    Args:
        problem: The samples.
        init: One of `METHODS`, (K, D) centroids, or a function of samples, K and generator.
        n_clusters: K.
        generator: The same on all ranks.

    Raises:
        ConfigError: no such method.
        DataError: given centroids do not fit the samples, or ranks were given different ones.
    """
    if isinstance(init, str):
        methods = {"k-means++": plus_plus, "k-means||": parallel, "random": random}
        if init not in methods:
            raise ConfigError(
                f'init: "{init}" is unknown.{near(init, METHODS)} Allowed: {listed(METHODS)}, an '
                f"array of shape (n_clusters, n_features), or a function"
            )
        return methods[init](problem, n_clusters, generator)
    group, samples = problem.group, problem.samples
    if callable(init):
        given = samples.like_given(samples.values)
        function = init
        centroids = group.together(
            lambda: as_centroids(
                function(given, n_clusters, random_state=generator), n_clusters, samples
            )
        )
        # Each rank's function saw that rank's samples only.
        return group.gather(centroids.astype(np.float64))[0].astype(samples.dtype)
    centroids = group.together(lambda: as_centroids(init, n_clusters, samples))
    if not group.agree(centroids.astype(np.float64), is_right=True):
        raise DataError("init: ranks were given different arrays; give all of them the same")
    return centroids


def as_centroids(given: Any, n_clusters: int, samples: Samples) -> Floats:
    """Return the caller's centroids, checked, in the samples' type.

    Raises:
        DataError: a shape that does not fit, or values that are not finite.
    """
    try:
        centroids = np.array(to_numpy(given), dtype=samples.dtype, order="C")
    except (TypeError, ValueError) as error:
        raise DataError(f"init: cannot be made an array of numbers: {error}") from error
    if centroids.ndim != 2 or len(centroids) != n_clusters:
        raise DataError(
            f"The shape of the initial centers {centroids.shape} does not match the number of "
            f"clusters {n_clusters}."
        )
    features = samples.values.shape[1]
    if centroids.shape[1] != features:
        raise DataError(
            f"The shape of the initial centers {centroids.shape} does not match the number of "
            f"features of the data {features}."
        )
    if not np.isfinite(centroids).all():
        raise DataError("init: contains NaN or infinity; allowed are finite numbers")
    return centroids


def random(problem: Problem, n_clusters: int, generator: np.random.RandomState) -> Floats:
    """Return different samples, drawn by weight."""
    masses = _weights(problem)
    heavy = int(problem.group.sum(np.array([float((masses > 0).sum())]))[0])
    if heavy < n_clusters:
        raise DataError(
            f"{heavy} samples have a weight above 0, n_clusters={n_clusters} are to be drawn of "
            f'them; lower n_clusters, or pass init="k-means++"'
        )
    places: list[int] = []
    rows: list[Masses] = []
    while len(places) < n_clusters:
        fractions = generator.random_sample(n_clusters - len(places))
        found, samples = _drawn(problem, masses, fractions)
        for place, sample in zip(found, samples, strict=True):
            if place not in places:
                places.append(int(place))
                rows.append(sample)
        masses = _without(problem, masses, places)
    return np.stack(rows).astype(problem.samples.dtype)


def plus_plus(problem: Problem, n_clusters: int, generator: np.random.RandomState) -> Floats:
    """Return seeds drawn by their squared distance to those before, the best of some trials each.

    Source: Arthur and Vassilvitskii, k-means++, 2007; 2 + log(K) trials as in scikit-learn.
    """
    trials = 2 + int(math.log(n_clusters))
    group = problem.group
    weights = _weights(problem)
    distances = _Distances(problem)
    _, rows = _drawn(problem, weights, generator.random_sample(1))
    seeds = [rows[0]]
    nearest = distances.to(rows)[0]
    for _ in range(1, n_clusters):
        _, rows = _drawn(problem, weights * nearest, generator.random_sample(trials))
        tried = distances.to(rows)
        np.minimum(tried, nearest, out=tried)
        best = int(group.sum(tried @ weights).argmin())
        nearest = tried[best]
        seeds.append(rows[best])
    return np.stack(seeds).astype(problem.samples.dtype)


def parallel(problem: Problem, n_clusters: int, generator: np.random.RandomState) -> Floats:
    """Return seeds of k-means||: a few rounds that each draw many candidates at once.

    The candidates, weighted with the samples nearest to each, are reduced to K with k-means++.
    Each sample has a random number of its own in each round, whatever rank it is on.

    Source: Bahmani et al., Scalable K-Means++, 2012, algorithm 2.
    """
    group, values = problem.group, problem.samples.tensor
    weights = _weights(problem)
    _, first = _drawn(problem, weights, generator.random_sample(1))
    candidates = fresh = first
    nearest = np.full(len(values), np.inf)
    for _ in range(_ROUNDS):
        found = one_pass(problem, fresh.astype(problem.samples.dtype), distances=True)
        nearest = np.minimum(nearest, np.asarray(to_numpy(found.distances)))
        masses = weights * nearest
        potential = float(group.sum(np.array([masses.sum()]))[0])
        seed = int(generator.randint(2**31 - 1))
        if potential <= 0:
            break
        chance = _OVERSAMPLING * n_clusters * masses / potential
        is_drawn = _uniform(seed, problem.begin, len(values)) < chance
        drawn = values[torch.from_numpy(np.flatnonzero(is_drawn)).to(values.device)]
        fresh = np.concatenate(group.gather(to_numpy(drawn).astype(np.float64)))
        if not len(fresh):
            fresh = candidates[:1]
            continue
        candidates = np.concatenate([candidates, fresh])
    if len(candidates) <= n_clusters:  # hardly more different samples than clusters
        return plus_plus(problem, n_clusters, generator)
    fitting = candidates.astype(problem.samples.dtype)
    small = Samples(fitting, one_pass(problem, fitting).counts, None)
    return plus_plus(Problem.of(small, TorchBackend()), n_clusters, generator)


class _Distances:
    """Squared distances of this rank's samples to a few others, as a product."""

    def __init__(self, problem: Problem) -> None:
        self._values = problem.samples.tensor
        moments = problem.moments
        device, dtype = self._values.device, self._values.dtype
        mean = torch.from_numpy(moments.mean).to(device, dtype)
        self._shift = mean if moments.is_off_centre else None
        self._squares = torch.empty(len(self._values), dtype=dtype, device=device)
        for place, block in blocks_of(self._values):
            self._squares[place] = self._shifted(block).square().sum(1)

    def to(self, rows: Masses) -> Masses:
        """Return float64 (T, M) squared distances to (T, D) rows."""
        values = self._values
        few = self._shifted(torch.from_numpy(rows).to(values.device, values.dtype))
        found = torch.empty(len(few), len(values), dtype=values.dtype, device=values.device)
        squares = few.square().sum(1)[:, None]
        with full_precision(values.device):
            for place, block in blocks_of(values):
                starts = squares + self._squares[place]
                part = torch.addmm(starts, few, self._shifted(block).T, alpha=-2)
                found[:, place] = part.clamp_(min=0)
        return np.asarray(to_numpy(found.double()))

    def _shifted(self, block: torch.Tensor) -> torch.Tensor:
        return block if self._shift is None else block - self._shift


def _drawn(problem: Problem, masses: Masses, fractions: Masses) -> tuple[NDArray[np.int64], Masses]:
    """Draw samples of all ranks by their mass.

    Args:
        problem: The samples.
        masses: (M,), of this rank's.
        fractions: (T,), from 0 to below 1: where in the sum of all masses.

    Returns:
        Their places among all samples (T,), and the samples, float64 (T, D).
    """
    group, values = problem.group, problem.samples.tensor
    sums = masses.cumsum()
    parts = np.concatenate(group.gather(np.array([[sums[-1] if len(sums) else 0.0]])))[:, 0]
    ends = parts.cumsum()
    if not ends[-1] > 0:  # all samples lie on seeds
        return _drawn(problem, np.ones(len(masses)), fractions)
    targets = fractions * ends[-1]
    # The last rank with any mass takes what rounding puts behind the end.
    owners = np.minimum(ends.searchsorted(targets, side="right"), np.flatnonzero(parts)[-1])
    buffer = np.zeros((len(fractions), 1 + values.shape[1]))
    local = np.flatnonzero(owners == group.rank)
    if len(local):
        inside = targets[local] - (ends[group.rank] - parts[group.rank])
        last = int(np.flatnonzero(masses)[-1])
        places = np.minimum(sums.searchsorted(inside, side="right"), last)
        buffer[local, 0] = problem.begin + places
        buffer[local, 1:] = to_numpy(values[torch.from_numpy(places).to(values.device)])
    buffer = group.sum(buffer)
    return buffer[:, 0].astype(np.int64), buffer[:, 1:]


def _without(problem: Problem, masses: Masses, places: list[int]) -> Masses:
    rest = masses.copy()
    local = np.array(places) - problem.begin
    rest[local[(local >= 0) & (local < len(masses))]] = 0.0
    return rest


def _weights(problem: Problem) -> Masses:
    weights = problem.samples.weights
    return np.ones(len(problem.samples.values)) if weights is None else weights


def _uniform(seed: int, begin: int, count: int) -> Masses:
    """Return numbers `begin` to ``begin + count`` of a stream, from 0 to below 1."""
    stream = np.random.Philox(key=seed)
    stream.advance(begin // 4)  # makes four numbers a step
    return np.random.Generator(stream).random(begin % 4 + count)[begin % 4 :]


def uniform_samples(
    problem: Problem, count: int, generator: np.random.RandomState
) -> NDArray[np.float64]:
    """Return (count, D) different samples of all ranks, each as likely as any other."""
    places = generator.choice(problem.moments.count, replace=False, size=count) - problem.begin
    values = problem.samples.tensor
    rows = np.zeros((count, values.shape[1]))
    local = np.flatnonzero((places >= 0) & (places < len(values)))
    rows[local] = to_numpy(values[torch.from_numpy(places[local]).to(values.device)])
    return problem.group.sum(rows)
