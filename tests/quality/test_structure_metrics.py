"""SSIM, spectra, correlation and distributions against independent definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.compression.sz import SzCodec
from lowtide.core.errors import DataError
from lowtide.quality import evaluate
from lowtide.quality.metrics import ssim as ssim_module
from lowtide.quality.metrics.entropy import quantised_entropy
from lowtide.quality.metrics.registry import metrics
from lowtide.quality.metrics.training import gradient_agreement, loss_change, score_loss
from tests.quality.arrays import ks_by_counting, noisy, smooth, ssim_by_loop


@pytest.mark.parametrize(
    ("shape", "width"),
    [((40,), 7), ((16, 19), 7), ((9, 8, 11), 7), ((5, 30), 5), ((6, 30), 5), ((3, 12), 3)],
)
def test_ssim_is_that_of_its_definition(shape: tuple[int, ...], width: int) -> None:
    x = smooth(*shape) + 2
    y = noisy(x, 0.3)
    names = ["ssim", "dssim", "ssim_qcat"]
    found = evaluate(x, y, names)
    assert found["ssim"] == pytest.approx(ssim_by_loop(x, y, width=width), abs=1e-12)
    qcat = ssim_by_loop(x, y, width=width, stride=2, is_local=True, is_unbiased=False)
    assert found["ssim_qcat"] == pytest.approx(qcat, abs=1e-11)
    assert found["ssim"] != pytest.approx(found["ssim_qcat"], abs=1e-5)
    assert found.notes["ssim"]["width"] == width


@pytest.mark.parametrize("shape", [(64,), (40, 50), (12, 13, 14)])
def test_ssim_is_that_of_scikit_image(shape: tuple[int, ...]) -> None:
    skimage = pytest.importorskip("skimage.metrics")
    x, y = smooth(*shape), noisy(smooth(*shape), 0.2)
    expected = skimage.structural_similarity(x, y, data_range=float(np.ptp(x)))
    assert evaluate(x, y, ["ssim"])["ssim"] == pytest.approx(expected, abs=1e-12)


def test_dssim_does_not_cancel() -> None:
    x = smooth(30, 30)
    e = np.random.default_rng(5).normal(size=x.shape)
    ratios = [evaluate(x, x + e * scale, ["dssim"])["dssim"] / scale**2 for scale in (1e-3, 1e-7)]
    # Quadratic in the error: at 1e-7 the value is near 1e-14, where 1 - SSIM has two digits.
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-3)


def test_slabs_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = smooth(3, 41, 17, 9), noisy(smooth(3, 41, 17, 9), 0.2)
    whole = evaluate(x, y, ["ssim", "ssim_qcat"])
    expected = np.mean([ssim_by_loop(a, b, width=7, stride=2, is_local=True, is_unbiased=False)
                        for a, b in ((x[0], y[0]), (x[1], y[1]), (x[2], y[2]))])  # fmt: skip
    assert whole["ssim_qcat"] == pytest.approx(expected, abs=1e-11)
    for block in (1, 3000, 14000):
        monkeypatch.setattr(ssim_module, "_BLOCK", block)
        found = evaluate(x, y, ["ssim", "ssim_qcat"])
        assert dict(found) == pytest.approx(dict(whole), abs=1e-13)
        assert found.notes == whole.notes


def test_constant_windows_have_the_range_1_in_the_units_of_the_data() -> None:
    x = np.concatenate([np.full(20, 3.0), 3.0 + 40 * np.sin(np.arange(20.0))])
    y = x + 0.05 * np.cos(np.arange(40.0))
    expected = ssim_by_loop(x, y, width=7, stride=2, is_local=True, is_unbiased=False)
    assert evaluate(x, y, ["ssim_qcat"])["ssim_qcat"] == pytest.approx(expected, abs=1e-12)


def test_a_window_far_smaller_than_the_range_keeps_its_precision() -> None:
    x = np.concatenate([[1e9], 5.0 + 1e-3 * smooth(40)])
    y = x + 1e-4 * np.cos(np.arange(41.0))
    expected = ssim_by_loop(x, y, width=7, stride=2, is_local=True, is_unbiased=False)
    assert evaluate(x, y, ["ssim_qcat"])["ssim_qcat"] == pytest.approx(expected, abs=1e-4)


def test_windows_with_nan_are_left_out_and_counted() -> None:
    x, y = smooth(20, 20), noisy(smooth(20, 20), 0.2)
    x[10, 10] = y[10, 10] = np.nan
    found = evaluate(x, y, ["ssim"])
    assert found.notes["ssim"]["windows_excluded"] == 49
    assert found.notes["ssim"]["windows"] == 14 * 14 - 49
    assert 0 < found["ssim"] < 1


def test_short_axes_have_no_ssim_and_axes_of_length_1_do_not_count() -> None:
    x, y = smooth(2, 30), noisy(smooth(2, 30))
    assert evaluate(x, y, ["ssim"])["ssim"] is None
    x, y = smooth(20, 30), noisy(smooth(20, 30))
    one = evaluate(x[None, :, None], y[None, :, None], ["ssim", "spectral_error"])
    assert dict(one) == dict(evaluate(x, y, ["ssim", "spectral_error"]))


def test_autocorrelation_is_that_of_its_definition() -> None:
    x = smooth(30, 40)
    e = np.add.outer(np.sin(np.arange(30.0)), np.cos(np.arange(40.0) / 5)) + 0.7
    for lag in (1, 3):
        found = evaluate(x, x + e, [f"error_autocorr:{lag}", f"error_autocorr_axes:{lag}"])
        d = (e - e.mean()) / e.std()
        flat = d.ravel()
        expected = np.mean(flat[:-lag] * flat[lag:])
        assert found[f"error_autocorr:{lag}"] == pytest.approx(expected, abs=1e-9)
        along = [np.mean(d[:-lag] * d[lag:]), np.mean(d[:, :-lag] * d[:, lag:])]
        axes = found.notes[f"error_autocorr_axes:{lag}"]["axes"]
        assert [axes["0"], axes["1"]] == pytest.approx(along, abs=1e-9)
        worst = found[f"error_autocorr_axes:{lag}"]
        assert worst == pytest.approx(max(along, key=abs), abs=1e-9)


@pytest.mark.parametrize("size", [3, 5000])
def test_a_constant_error_has_no_autocorrelation_whatever_the_size(size: int) -> None:
    x = np.arange(float(size))
    found = evaluate(x, x + 0.1, ["error_autocorr", "error_autocorr_axes"])
    assert dict(found) == {"error_autocorr": 0.0, "error_autocorr_axes": 0.0}
    assert found.notes["error_autocorr"] == {"degenerate": "the error is constant"}
    short = evaluate(np.arange(3.0), np.array([0.0, 1.0, 3.0]), ["error_autocorr:3"])
    assert short["error_autocorr:3"] is None


def test_correlations_are_those_of_numpy() -> None:
    x = smooth(500) + 100
    y = noisy(x, 0.4)
    found = evaluate(x, y, ["pearson_r", "cosine_similarity"])
    assert found["pearson_r"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert found["cosine_similarity"] == pytest.approx(cosine, abs=1e-14)
    assert evaluate(x, np.full(500, 3.0), ["pearson_r"])["pearson_r"] is None
    assert evaluate(np.zeros(5), np.arange(5.0), ["cosine_similarity"])["cosine_similarity"] is None
    assert evaluate(x, -x, ["pearson_r"])["pearson_r"] == pytest.approx(-1)


@pytest.mark.parametrize("values", ["continuous", "ties", "shifted", "longer ties"])
def test_ks_is_the_largest_gap(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowtide.quality.metrics.distribution.MERGED", 32)
    rng = np.random.default_rng(8)
    x, y = {
        "continuous": (rng.normal(size=300), rng.normal(size=300) * 1.3),
        "ties": (rng.integers(0, 9, 300) * 1.0, rng.integers(2, 9, 300) * 1.0),
        "shifted": (np.arange(300.0), np.arange(300.0) + 1000),
        "longer ties": (np.zeros(300), np.repeat([0.0, 1.0], 150)),
    }[values]
    found = evaluate(x, y, ["ks_statistic"])["ks_statistic"]
    assert found == pytest.approx(ks_by_counting(x, y), abs=1e-12)


def test_ks_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(300, 7)).astype(np.float32), rng.normal(size=(300, 7)) * 1.1
    expected = stats.ks_2samp(x.ravel().astype(float), y.ravel()).statistic
    found = evaluate(x, y, ["ks_statistic"])["ks_statistic"]
    assert found == pytest.approx(expected, abs=1e-12)


def test_kl_is_that_of_smoothed_histograms() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=200_000), rng.normal(size=200_000) + 0.5
    edges = np.linspace(min(x.min(), y.min()), max(x.max(), y.max()), 257)
    p, q = (np.histogram(each, edges)[0] + 0.5 for each in (x, y))
    p, q = p / p.sum(), q / q.sum()
    found = evaluate(x, y, ["kl_divergence"])["kl_divergence"]
    assert found == pytest.approx(float(np.sum(p * np.log(p / q))), rel=1e-3)
    assert found == pytest.approx(0.125, rel=0.05)  # of two unit normals half a sigma apart
    apart = evaluate(np.arange(9.0) // 8, np.full(9, 5.0), ["kl_divergence"])
    assert 0 < apart["kl_divergence"] < math.inf


def test_gradient_and_sobolev_errors_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowtide.quality.metrics.pair.PIECE", 100)
    x, y = smooth(7, 1, 30, 11), noisy(smooth(7, 1, 30, 11))
    e = y - x
    parts = [
        (np.sum(np.diff(e, axis=axis) ** 2), np.sum(np.diff(x, axis=axis) ** 2))
        for axis in (0, 2, 3)
    ]
    above, below = (sum(part[which] for part in parts) for which in (0, 1))
    found = evaluate(x, y, ["gradient_error", "sobolev_error"])
    assert found["gradient_error"] == pytest.approx(math.sqrt(above / below), rel=1e-10)
    whole = math.sqrt((above + np.sum(e**2)) / (below + np.sum(x**2)))
    assert found["sobolev_error"] == pytest.approx(whole, rel=1e-10)
    assert evaluate(np.ones((1, 1)), np.ones((1, 1)), ["gradient_error"])["gradient_error"] is None


def test_a_scaled_copy_has_the_same_log_ratio_in_every_bin() -> None:
    x = np.random.default_rng(3).normal(size=(33, 48))
    found = evaluate(x, x * 1.1, ["spectral_error"])
    assert found["spectral_error"] == pytest.approx(2 * math.log(1.1), abs=1e-9)
    assert found.notes["spectral_error"] == {"bins_used": 24, "bins_skipped": 0}


def test_empty_bins_are_skipped_and_counted() -> None:
    t = np.arange(128) / 128
    x = np.sin(2 * np.pi * 5 * t) + 0.5 * np.sin(2 * np.pi * 9 * t)
    y = x + 1e-3 * np.sin(2 * np.pi * 30 * t)
    found = evaluate(x, y, ["spectral_error"])
    assert found.notes["spectral_error"] == {"bins_used": 2, "bins_skipped": 62}
    assert found["spectral_error"] == pytest.approx(0, abs=1e-9)
    # Only a bin that is used is seen: half of the power of one of two.
    y = np.sin(2 * np.pi * 5 * t) + 0.5 / math.sqrt(2) * np.sin(2 * np.pi * 9 * t)
    expected = math.log(2) / 2
    assert evaluate(x, y, ["spectral_error"])["spectral_error"] == pytest.approx(expected)


def test_spectral_bins_are_those_of_a_full_transform() -> None:
    x, y = smooth(12, 20), noisy(smooth(12, 20), 0.1)
    frequencies = [np.fft.fftfreq(length) * 20 for length in (12, 20)]
    bins = np.rint(np.hypot(*np.meshgrid(*frequencies, indexing="ij"))).astype(int)
    ratios = []
    for k in range(1, 11):
        px, py = (np.mean(np.abs(np.fft.fftn(each)[bins == k]) ** 2) for each in (x, y))
        ratios.append(abs(math.log(py / px)))
    found = evaluate(x, y, ["spectral_error"])
    assert found["spectral_error"] == pytest.approx(np.mean(ratios), rel=1e-9)


def test_entropy_of_quantised_values_is_that_of_the_codes() -> None:
    x = np.repeat([0.0, 1.0, 2.0, 3.0], [50, 25, 13, 12])
    p = np.array([50, 25, 13, 12]) / 100
    assert quantised_entropy(x, 0.5) == pytest.approx(-np.sum(p * np.log2(p)))
    assert quantised_entropy(np.arange(256.0), 0.5) == 8.0
    # One step everywhere, also the first one from the 0 before it.
    assert quantised_entropy(np.arange(1.0, 257.0), 0.5, of="lorenzo") == 0.0
    first = -(np.log2(0.25) + 3 * np.log2(0.75)) / 4  # of codes 5, 1, 1, 1
    assert quantised_entropy(np.arange(5.0, 9.0), 0.5, of="lorenzo") == pytest.approx(first)
    plane = np.add.outer(np.arange(1.0, 41.0), np.arange(40.0) * 3)
    assert quantised_entropy(plane, 0.5, of="lorenzo") < 0.5 < quantised_entropy(plane, 0.5)
    assert quantised_entropy([np.nan], 1.0) is None
    with pytest.raises(DataError, match="allowed are positive"):
        quantised_entropy(x, 0.0)
    with pytest.raises(DataError, match='"data" and "lorenzo"'):
        quantised_entropy(x, 1.0, of="laplace")  # type: ignore[arg-type]


def test_gradients_are_compared_as_one_vector() -> None:
    reference = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]), None]
    found = gradient_agreement(reference, [torch.tensor([3.0, 1.0]), None, None])
    assert found.relative_error == pytest.approx(math.sqrt(17) / 5)
    assert found.cosine == pytest.approx(9 / 5 / math.sqrt(10))
    assert gradient_agreement([torch.zeros(2)], [torch.ones(2)]).cosine is None
    with pytest.raises(DataError, match="3 gradients cannot be compared with 1"):
        gradient_agreement(reference, [None])
    with pytest.raises(DataError, match=r"shapes \(2,\) and \(3,\)"):
        gradient_agreement([torch.zeros(2)], [torch.zeros(3)])


def test_the_change_of_the_loss_is_measured_and_taken_back() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 500))
    kept = weight.detach().clone()

    def loss() -> float:
        return float(weight.detach().square().sum())

    codec = SzCodec("abs", bound=0.1)
    restored = torch.from_numpy(codec.decode(codec.encode(weight)))
    expected = float(restored.square().sum()) - loss()
    assert expected != 0
    assert loss_change(loss, [weight], codec) == pytest.approx(expected)
    assert torch.equal(weight, kept)
    calls: list[Any] = []

    def fails() -> float:
        calls.append(1)
        return loss() if len(calls) == 1 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        loss_change(fails, [weight], codec)
    assert torch.equal(weight, kept)


def test_scores_lose_relative_to_themselves_unless_they_are_nothing() -> None:
    assert score_loss(0.9, 0.81) == pytest.approx(0.1)
    assert score_loss(2.0, 2.1, is_higher_better=False) == pytest.approx(0.05)
    assert score_loss(-2.0, -2.1) == pytest.approx(0.05)
    assert score_loss(0.01, 0.0) == pytest.approx(0.01)
    assert score_loss(0.9, 0.95) < 0


def test_every_metric_names_its_variant() -> None:
    for name, metric in metrics().items():
        assert metric.name == name
        assert metric.variant
        assert metric.better in ("higher", "lower", "zero")
    for metric in metrics().values():
        to, back = metric.scale.decades, metric.scale.value
        worse, better = (0.1, 0.01) if metric.better in ("lower", "zero") else (0.5, 0.9)
        assert to(better) > to(worse), metric.name
        assert back(to(better)) == pytest.approx(better), metric.name
        perfect = {"lower": 0.0, "zero": 0.0, "higher": 1.0}[metric.better]
        assert metric.name == "psnr_db" or to(perfect) == math.inf, metric.name
