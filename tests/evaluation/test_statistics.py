"""Known answers: simulated coverage, closed forms, published examples, other libraries."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from lowtide.core.errors import DataError
from lowtide.evaluation import statistics as st
from lowtide.evaluation.statistics import paired as paired_module
from lowtide.evaluation.statistics import resampling
from lowtide.evaluation.statistics.clusters import cluster_sums
from lowtide.evaluation.statistics.resampling import resampled_means

RANDOM = np.random.default_rng


def covered(draw: Any, truth: float, rounds: int, **options: Any) -> float:
    """Share of intervals that hold the truth."""
    hits = 0
    for seed in range(rounds):
        values, clusters = draw(RANDOM(seed))
        found = st.bootstrap(values, clusters, seed=10**6 + seed, resamples=600, **options)
        hits += found.low <= truth <= found.high
    return hits / rounds


def normal_items(random: np.random.Generator) -> tuple[Any, Any]:
    return random.normal(0.3, 1.0, 150), None


def right_or_wrong(random: np.random.Generator) -> tuple[Any, Any]:
    return (random.random(150) < 0.8).astype(float), None


def passages(random: np.random.Generator) -> tuple[Any, Any]:
    """150 passages of 1 to 8 questions that share a passage's difficulty."""
    sizes = random.integers(1, 9, 150)
    clusters = np.repeat(np.arange(150), sizes)
    return random.normal(0, 1, 150)[clusters] + random.normal(0, 0.5, len(clusters)), clusters


@pytest.mark.parametrize(
    ("draw", "truth", "method", "rounds"),
    [
        (right_or_wrong, 0.8, "percentile", 2000), (right_or_wrong, 0.8, "bca", 2000),
        (normal_items, 0.3, "percentile", 600), (passages, 0.0, "bca", 600),
    ],
)  # fmt: skip
def test_intervals_of_95_percent_hold_the_truth_in_93_to_97(
    draw: Any, truth: float, method: Any, rounds: int
) -> None:
    assert 0.93 <= covered(draw, truth, rounds, method=method) <= 0.97


def test_intervals_of_a_ratio_and_of_other_levels_hold_it() -> None:
    def draw(random: np.random.Generator) -> tuple[Any, Any]:
        lengths = random.integers(10, 50, 60)
        return np.column_stack([random.poisson(2.0 * lengths), lengths]), None

    assert 0.93 <= covered(draw, 2.0, 400, statistic=st.ratio) <= 0.97
    assert 0.77 <= covered(draw, 2.0, 400, statistic=st.ratio, level=0.8) <= 0.83


def test_items_of_one_cluster_taken_as_single_ones_would_be_overconfident() -> None:
    hits = sum(
        abs(st.bootstrap(values, seed=s, resamples=300, method="percentile").estimate)
        <= 1.96 * st.standard_error(values)
        for s in range(200)
        for values, _ in [passages(RANDOM(s))]
    )
    assert hits / 200 < 0.80


def test_a_seed_gives_the_same_interval_and_another_one_another() -> None:
    values = RANDOM(0).normal(size=200)
    assert st.bootstrap(values, seed=1) == st.bootstrap(values, seed=1)
    assert st.bootstrap(values, seed=1).low != st.bootstrap(values, seed=2).low


@pytest.mark.parametrize("few_values", [True, False])
def test_means_of_resamples_have_the_moments_of_the_bootstrap(
    few_values: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = RANDOM(3).choice([0.0, 0.5, 2.0], 90, p=[0.5, 0.3, 0.2])
    clusters = RANDOM(4).integers(0, 30, 90)
    if not few_values:
        monkeypatch.setattr(resampling, "_DISTINCT", 0)
    monkeypatch.setattr(resampling, "_BLOCK", 30 * 7)  # many blocks
    sums = cluster_sums(values, clusters)
    means = np.concatenate(list(resampled_means(sums, 20_000, 0)))[:, 0]
    assert len(means) == 20_000
    weighted = sums.sums[:, 0] - values.mean() * sums.counts
    expected_sd = math.sqrt((weighted**2).sum()) / len(values)
    assert means.mean() == pytest.approx(values.mean(), abs=4 * expected_sd / math.sqrt(20_000))
    assert means.std() == pytest.approx(expected_sd, rel=0.03)


def test_bca_follows_the_skew_of_a_ratio_and_percentile_does_not() -> None:
    scipy = pytest.importorskip("scipy.stats")
    values = RANDOM(5).exponential(size=60)
    for method, theirs in (("percentile", "percentile"), ("bca", "BCa")):
        found = st.bootstrap(values, method=method, resamples=40_000)
        wanted = scipy.bootstrap(
            (values,), np.mean, n_resamples=40_000, method=theirs, rng=RANDOM(1)
        ).confidence_interval
        scale = wanted.high - wanted.low
        assert found.low == pytest.approx(wanted.low, abs=0.02 * scale)
        assert found.high == pytest.approx(wanted.high, abs=0.02 * scale)


def test_bca_equals_its_formula_written_out() -> None:
    from statistics import NormalDist

    values = RANDOM(6).exponential(size=40)
    figures = np.concatenate(list(resampled_means(cluster_sums(values), 5_000, 0)))[:, 0]
    normal = NormalDist()
    z0 = normal.inv_cdf(float((figures < values.mean()).mean()))
    left_out = np.array([np.delete(values, i).mean() for i in range(40)])
    d = left_out.mean() - left_out
    a = float((d**3).sum() / (6 * (d**2).sum() ** 1.5))
    ends = []
    for tail in (0.025, 0.975):
        z = z0 + normal.inv_cdf(tail)
        ends.append(float(np.quantile(figures, normal.cdf(z0 + z / (1 - a * z)))))
    found = st.bootstrap(values, resamples=5_000)
    assert [found.low, found.high] == pytest.approx(ends, rel=1e-9)
    assert abs(a) > 0.02


def test_one_cluster_has_no_interval() -> None:
    found = st.bootstrap([1.0, 2.0, 3.0], ["a"] * 3)
    assert found.estimate == 2.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(st.standard_error([1.0, 2.0], ["a", "a"]))
    constant = st.bootstrap([1.0] * 5)
    assert (constant.low, constant.high) == (1.0, 1.0)


def test_clustered_errors_are_those_of_miller_and_of_statsmodels() -> None:
    values, clusters = passages(RANDOM(1))
    n, mean = len(values), values.mean()
    miller = 0.0  # his double sum, pair by pair
    for c in range(150):
        inside = values[clusters == c] - mean
        miller += sum(x * y for x, y in itertools.product(inside, inside))
    plain = math.sqrt(miller) / n
    assert st.standard_error(values, clusters) == pytest.approx(plain * math.sqrt(150 / 149))
    assert st.standard_error(values) == pytest.approx(values.std(ddof=1) / math.sqrt(n))
    interval = st.normal_interval(values, clusters)
    assert interval.high - mean == pytest.approx(1.959964 * st.standard_error(values, clusters))
    assert interval.n_clusters == 150
    sm = pytest.importorskip("statsmodels.api")
    fit = sm.OLS(values, np.ones(n)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    assert st.standard_error(values, clusters) == pytest.approx(float(fit.bse[0]))


def test_paired_intervals_are_narrower_than_those_of_two_runs() -> None:
    difficulty = RANDOM(0).normal(size=400)
    first = difficulty + RANDOM(1).normal(0, 0.1, 400)
    second = difficulty + 0.05 + RANDOM(2).normal(0, 0.1, 400)
    found = st.paired_bootstrap(first, second)
    assert found.low > 0
    assert found.estimate == pytest.approx((second - first).mean())
    alone = st.bootstrap(second)
    assert found.high - found.low < 0.2 * (alone.high - alone.low)
    back = st.paired_bootstrap(second, first)
    assert back.estimate == pytest.approx(-found.estimate)


def test_paired_differences_of_f1_of_means_use_both_columns() -> None:
    precise = np.tile([0.9, 0.6], (50, 1))
    complete = np.tile([0.6, 0.9], (50, 1))
    found = st.paired_bootstrap(precise, complete, statistic=st.f1_of_means)
    assert found.estimate == pytest.approx(0.0)
    assert st.bootstrap(precise, statistic=st.f1_of_means).estimate == pytest.approx(0.72)


def test_sign_flips_are_exact_for_few_clusters() -> None:
    differences = np.array([0.3, 0.1, 0.4, -0.2, 0.5])
    wanted = np.mean(
        [
            abs(np.dot(signs, np.abs(differences))) >= abs(differences.sum()) - 1e-9
            for signs in itertools.product([1, -1], repeat=5)
        ]
    )
    assert st.sign_flip_test(np.zeros(5), differences) == pytest.approx(wanted)
    assert st.sign_flip_test([1.0, 2.0], [1.0, 2.0]) == 1.0
    # Items of a cluster flip together: with two clusters no p-value is below one half.
    assert st.sign_flip_test(np.zeros(10), np.ones(10), [0] * 5 + [1] * 5) == 0.5


@pytest.mark.parametrize("few_sizes", [True, False])
def test_random_flips_find_the_rate_of_false_alarms_and_the_exact_p_value(
    few_sizes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not few_sizes:
        monkeypatch.setattr(paired_module, "_DISTINCT", 0)
    differences = RANDOM(0).choice([-1.0, 1.0], 15, p=[0.3, 0.7])
    exact = st.sign_flip_test(np.zeros(15), differences)
    monkeypatch.setattr(paired_module, "_EXACT", 0)
    flipped = st.sign_flip_test(np.zeros(15), differences, resamples=40_000)
    assert flipped == pytest.approx(exact, abs=0.01)
    if few_sizes:
        return
    alarms = sum(
        st.sign_flip_test(np.zeros(30), RANDOM(s).normal(size=30), resamples=200, seed=s) <= 0.05
        for s in range(800)
    )
    assert 0.03 <= alarms / 800 <= 0.07


def test_exchanges_test_any_statistic() -> None:
    lengths = RANDOM(0).integers(10, 50, 60).astype(float)
    first = np.column_stack([RANDOM(1).poisson(2.0 * lengths), lengths])
    same = np.column_stack([RANDOM(2).poisson(2.0 * lengths), lengths])
    more = np.column_stack([RANDOM(3).poisson(2.6 * lengths), lengths])
    assert st.sign_flip_test(first, more, statistic=st.ratio, resamples=999) == 0.001
    assert st.sign_flip_test(first, same, statistic=st.ratio, resamples=999) > 0.05
    # The same labels on all items: one exchange of everything, which is as extreme.
    assert st.sign_flip_test(first, more, np.zeros(60), statistic=st.ratio, resamples=99) == 1.0

    def like_mean(means: Any) -> Any:
        return means[..., 0]

    a, b = RANDOM(4).normal(size=40), RANDOM(5).normal(0.3, 1, 40)
    flips = st.sign_flip_test(a, b, resamples=20_000)
    assert st.sign_flip_test(a, b, statistic=like_mean, resamples=20_000) == pytest.approx(
        flips, abs=0.015
    )


def test_mcnemar_is_a_binomial_test_of_discordant_items() -> None:
    first = [1] * 9 + [0] * 2 + [1] * 20 + [0] * 5
    second = [0] * 9 + [1] * 2 + [1] * 20 + [0] * 5
    found = st.mcnemar(first, second)
    assert (found.only_first, found.only_second) == (9, 2)
    tail = sum(math.comb(11, k) for k in range(3)) / 2**11
    assert found.p_value == pytest.approx(2 * tail)
    mid = st.mcnemar(first, second, form="mid_p").p_value
    assert mid == pytest.approx(2 * tail - math.comb(11, 2) / 2**11)
    assert st.mcnemar([1, 0], [1, 0]).p_value == 1.0
    assert st.mcnemar([1, 0], [0, 1]).p_value == 1.0
    large = st.mcnemar([1] * 50_000 + [0] * 49_000, [0] * 50_000 + [1] * 49_000).p_value
    assert large == pytest.approx(math.erfc(999 / math.sqrt(99_000) / math.sqrt(2)), rel=0.01)
    with pytest.raises(DataError, match="allowed are 0 and 1"):
        st.mcnemar([0.5], [1.0])


def test_wilson_holds_at_the_ends_and_in_between() -> None:
    found = st.wilson(8, 10)  # Brown, Cai and DasGupta (2001) give such intervals; formula checked
    z = 1.959963984540054
    for end in (found.low, found.high):  # both ends solve (p - p0)^2 = z^2 p0 (1 - p0) / n
        assert (0.8 - end) ** 2 == pytest.approx(z * z * end * (1 - end) / 10)
    assert found.low < 0.8 < found.high
    assert st.wilson(0, 10).low == 0.0
    assert st.wilson(0, 10).high == pytest.approx(z * z / (10 + z * z))
    assert st.wilson(10, 10).high == 1.0
    with pytest.raises(DataError, match="0 <= successes <= trials"):
        st.wilson(11, 10)


def test_holm_is_holm() -> None:
    corrected = st.holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm (1979) by hand
    assert st.holm([0.9, 0.9]).tolist() == [1.0, 1.0]
    assert st.holm([]).tolist() == []
    with pytest.raises(DataError, match="from 0 to 1"):
        st.holm([1.5])


def test_power_is_what_was_asked_for() -> None:
    error = 0.02
    effect = st.minimal_detectable_effect(error)
    found = sum(abs(RANDOM(s).normal(effect, error)) > 1.959964 * error for s in range(3000))
    assert 0.78 <= found / 3000 <= 0.82
    assert 950 <= st.items_needed(0.03, 1 / 9) <= 1000  # Miller's "about 1,000 questions"
    with pytest.raises(DataError, match="any difference but 0"):
        st.items_needed(0, 1)
    with pytest.raises(DataError, match="0 or more"):
        st.minimal_detectable_effect(-1.0)


_ = math.nan
KRIPPENDORFF = [  # 4 observers, 12 units: "Computing Krippendorff's Alpha-Reliability" (2011), D
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]


@pytest.mark.parametrize(
    ("scale", "alpha"),
    [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)],
)
def test_alpha_is_that_of_krippendorffs_example(scale: Any, alpha: float) -> None:
    assert st.krippendorff_alpha(KRIPPENDORFF, scale=scale) == pytest.approx(alpha, abs=5e-4)


def test_alpha_at_its_ends() -> None:
    assert st.krippendorff_alpha([[1, 2, 3], [1, 2, 3]]) == 1.0
    assert math.isnan(st.krippendorff_alpha([[1, 1, 1], [1, 1, 1]]))
    assert math.isnan(st.krippendorff_alpha([[1, _], [1, 2]]))
    assert st.krippendorff_alpha([[1, 2], [2, 1]]) < 0
    with pytest.raises(DataError, match="no ratio"):
        st.krippendorff_alpha([[-1, 2], [2, 1]], scale="ratio")
    with pytest.raises(DataError, match="raters, units"):
        st.krippendorff_alpha([1, 2])
    with pytest.raises(DataError, match="scale"):
        st.krippendorff_alpha([[1, 2], [2, 1]], scale="other")  # type: ignore[arg-type]


def test_kappa_by_hand_and_as_in_scikit_learn() -> None:
    first, second = [0, 0, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 2, 0, 2, 0]
    agreed, chance = 6 / 8, (3 * 3 + 2 * 3 + 3 * 2) / 64
    kappa = st.weighted_kappa(first, second, categories=3, weights="none")
    assert kappa == pytest.approx((agreed - chance) / (1 - chance))
    assert math.isnan(st.weighted_kappa([1, 1], [1, 1], categories=3))
    with pytest.raises(DataError, match="whole numbers from 0 to 2"):
        st.weighted_kappa([3], [0], categories=3)
    metrics = pytest.importorskip("sklearn.metrics")
    for weights in ("none", "linear", "quadratic"):
        wanted = metrics.cohen_kappa_score(
            first, second, weights=None if weights == "none" else weights
        )
        found = st.weighted_kappa(first, second, categories=3, weights=weights)  # type: ignore[arg-type]
        assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([],), "not empty"),
        (([1.0, math.nan],), r"values\[1\]"),
        (([1.0, 2.0], ["a"]), "one per item"),
        (([[[1.0]]],), "not empty"),
    ],
)
def test_what_is_no_score_is_refused(arguments: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        st.bootstrap(*arguments)
    with pytest.raises(DataError, match=said):
        st.standard_error(*arguments)


@pytest.mark.parametrize(
    "options", [{"level": 1.0}, {"level": 0.0}, {"method": "t"}, {"resamples": 10}]
)
def test_parameters_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        st.bootstrap([1.0, 2.0], **options)


def test_a_pair_needs_the_same_items() -> None:
    for function in (st.paired_bootstrap, st.sign_flip_test, st.mcnemar):
        with pytest.raises(DataError, match="same items"):
            function([1.0, 0.0], [1.0])  # type: ignore[operator]


def test_statistics_need_numpy_alone() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import lowtide.evaluation.statistics, lowtide.evaluation.grading.overlap, "
        "lowtide.evaluation.grading.choices, lowtide.evaluation.grading.sandbox; "
        "sys.exit(str({'torch', 'scipy', 'pydantic', 'deepspeed'} & set(sys.modules) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.strip() == ""
