"""Metrics of single elements against closed forms, and what happens at the edges."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowtide.core.errors import CodecError, DataError, UnknownNameError
from lowtide.quality import evaluate
from lowtide.quality.metrics import pair as pairs
from lowtide.quality.metrics.registry import metrics
from tests.quality.arrays import noisy, smooth

POINTWISE = ["max_abs_error", "max_rel_error", "mse", "rmse", "nrmse", "psnr_db",
             "relative_l2_error", "max_pw_rel_error", "error_quantile:0.9"]  # fmt: skip


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small arrays have many pieces."""
    for name in ("pair", "correlation", "spectrum"):
        monkeypatch.setattr(f"lowtide.quality.metrics.{name}.PIECE", 64)
    monkeypatch.setattr("lowtide.quality.metrics.distribution.MERGED", 64)


def test_closed_forms_of_a_known_error(small_pieces: None) -> None:
    x = np.linspace(-3.0, 5.0, 1001)
    e = np.where(np.arange(1001) % 2, 0.25, -0.5)
    found = evaluate(x, x + e, POINTWISE)
    mean_square = (501 * 0.25 + 500 * 0.0625) / 1001
    assert found["max_abs_error"] == 0.5
    assert found["max_rel_error"] == 0.5 / 8
    assert found["mse"] == pytest.approx(mean_square, rel=1e-13)
    assert found["rmse"] == pytest.approx(math.sqrt(mean_square), rel=1e-13)
    assert found["nrmse"] == pytest.approx(math.sqrt(mean_square) / 8, rel=1e-13)
    decibels = 20 * math.log10(8) - 10 * math.log10(mean_square)
    assert found["psnr_db"] == pytest.approx(decibels, abs=1e-10)
    l2 = math.sqrt(mean_square / np.mean(x**2))
    assert found["relative_l2_error"] == pytest.approx(l2, rel=1e-12)
    assert not found.is_exact
    assert found.count == 1001


def test_psnr_takes_the_range_not_the_peak() -> None:
    x = np.array([1000.0, 1001.0, 1002.0])
    assert evaluate(x, x + 0.02, ["psnr_db"])["psnr_db"] == pytest.approx(40.0, abs=1e-9)


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.9, 0.999, 1.0])
def test_quantiles_are_order_statistics(share: float, small_pieces: None) -> None:
    e = np.random.default_rng(3).normal(size=997) * 10.0 ** np.random.default_rng(4).integers(
        -9, 9, size=997
    )
    found = evaluate(np.zeros(997), e, [f"error_quantile:{share}"])
    expected = np.sort(np.abs(e))[math.ceil(share * 997) - 1]
    assert found[f"error_quantile:{share}"] == expected
    assert expected == np.quantile(np.abs(e), share, method="inverted_cdf")


@pytest.mark.parametrize("sign", [1, -1])
def test_pointwise_relative_errors_of_both_signs_count(sign: int) -> None:
    x = np.array([0.0, 2.0, -4.0, 0.0, 8.0])
    y = np.array([0.0, 2.0, -4.0, 1.0, 8.0])
    y[1] += sign * 0.5
    found = evaluate(x, y, ["max_pw_rel_error"])
    assert found["max_pw_rel_error"] == 0.25
    assert found.notes["max_pw_rel_error"] == {"zeros_excluded": 2, "zeros_changed": 1}
    zeros = evaluate(np.zeros(3), np.ones(3), ["max_pw_rel_error"])
    assert zeros["max_pw_rel_error"] is None


def test_an_exact_copy_is_exact_and_its_psnr_infinite() -> None:
    x = smooth(20, 30)
    found = evaluate(x, x.copy(), list(metrics()))
    assert found.is_exact
    assert found["psnr_db"] == math.inf
    assert {found[name] for name in ("mse", "nrmse", "dssim", "ks_statistic", "kl_divergence",
                                     "gradient_error", "spectral_error")} == {0.0}  # fmt: skip
    assert found["ssim"] == found["cosine_similarity"] == found["pearson_r"] == 1.0
    assert found["error_autocorr"] == 0.0
    assert "degenerate" in found.notes["error_autocorr"]
    plain = found.as_dict()
    assert plain["metrics"]["psnr_db"] is None
    assert plain["infinite"] == {"psnr_db": "inf"}
    assert plain["exact"] is True
    json.dumps(plain, allow_nan=False)


def test_a_constant_original_has_no_range() -> None:
    x = np.full((8, 9), 3.5)
    exact, off = evaluate(x, x, list(metrics())), evaluate(x, x + 0.1, list(metrics()))
    assert (exact["nrmse"], exact["psnr_db"]) == (0.0, math.inf)
    assert (off["nrmse"], off["psnr_db"], off["max_rel_error"]) == (math.inf, -math.inf, math.inf)
    assert off["pearson_r"] is None
    assert off["spectral_error"] is None
    assert off["gradient_error"] == pytest.approx(0.0, abs=1e-12)
    assert "degenerate" in off.notes["psnr_db"]
    assert off.as_dict()["infinite"]["psnr_db"] == "-inf"
    json.dumps(off.as_dict(), allow_nan=False)


def test_nan_and_infinity_are_left_out_where_they_came_back(small_pieces: None) -> None:
    x = smooth(40, 41)
    x[3, 5], x[9, 0], x[39, 40] = np.nan, np.inf, -np.inf
    y = noisy(x)
    is_in = np.isfinite(x)
    found, flat = evaluate(x, y, POINTWISE), evaluate(x[is_in], y[is_in], POINTWISE)
    assert (found.count, found.nonfinite, found.mismatched) == (1637, 3, 0)
    for name in POINTWISE:
        assert found[name] == pytest.approx(flat[name], rel=1e-12), name


@pytest.mark.parametrize(
    ("before", "after"),
    [(1.0, np.nan), (np.nan, 1.0), (np.inf, -np.inf), (np.inf, np.nan), (2.0, np.inf)],
)
def test_what_became_nan_or_infinite_is_within_no_bound(before: float, after: float) -> None:
    x = smooth(12, 12)
    y = x.copy()
    x[4, 4], y[4, 4] = before, after
    found = evaluate(x, y, list(metrics()))
    assert found.mismatched == 1
    assert not found.is_exact
    assert found["max_abs_error"] == found["mse"] == math.inf
    assert found["psnr_db"] == -math.inf
    assert found["ssim"] is None
    assert found["ks_statistic"] is None


def test_nothing_finite_and_nothing_at_all_have_no_value() -> None:
    for x in (np.full(5, np.nan), np.zeros((0, 4)), np.array([np.inf])):
        found = evaluate(x, x.copy(), list(metrics()))
        assert set(found.scores.values()) == {None}
        assert found.is_exact
        json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 1e-160, 1e160])
def test_huge_and_tiny_values_neither_overflow_nor_vanish(scale: float) -> None:
    x, y = smooth(30, 31), noisy(smooth(30, 31))
    plain, scaled = (evaluate(x * by, y * by, list(metrics())) for by in (1.0, scale))
    for name, value in plain.items():
        if name in ("mse", "rmse", "max_abs_error", "error_quantile"):
            continue
        assert scaled[name] == pytest.approx(value, rel=1e-6), name
    assert scaled["rmse"] == pytest.approx(plain["rmse"] * scale, rel=1e-9)


def test_a_range_that_float64_cannot_hold_still_has_a_psnr() -> None:
    x = np.array([-1.7e308, 1.7e308, 0.0])
    y = x + np.array([1e300, -1e300, 0.0])
    expected = 20 * (math.log10(3.4) + 308) - 20 * (300 + 0.5 * math.log10(2 / 3))
    assert evaluate(x, y, ["psnr_db"])["psnr_db"] == pytest.approx(expected, abs=1e-6)


def _as(dtype: str, values: np.ndarray) -> Any:
    if dtype in ("bfloat16", "torch.float16"):
        return torch.from_numpy(values).to(getattr(torch, dtype.removeprefix("torch.")))
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "torch.float16", "int32"])
def test_every_type_is_measured_in_float64(dtype: str) -> None:
    x, y = _as(dtype, smooth(17, 23) * 50), _as(dtype, noisy(smooth(17, 23), 0.1) * 50)
    wide = [torch.as_tensor(each).double().numpy() for each in (x, y)]
    found, expected = evaluate(x, y, list(metrics())), evaluate(*wide, list(metrics()))
    assert dict(found) == dict(expected)


def test_every_layout_is_the_same() -> None:
    x, y = smooth(20, 30), noisy(smooth(20, 30))
    expected = dict(evaluate(x, y, list(metrics())))
    torch_x = torch.from_numpy(np.ascontiguousarray(x.T)).T.requires_grad_()
    assert dict(evaluate(torch_x, np.asfortranarray(y), list(metrics()))) == expected
    strided = np.zeros((40, 60))
    strided[::2, ::-2] = y
    assert dict(evaluate(x, strided[::2, ::-2], list(metrics()))) == expected
    assert dict(evaluate(x.astype(">f8"), y, list(metrics()))) == expected


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> None:
    x, y = smooth(9, 11, 13), noisy(smooth(9, 11, 13))
    x[1, 2, 3] = y[1, 2, 3] = np.nan
    in_pieces = evaluate(x, y, list(metrics()))
    monkeypatch.undo()
    assert x.size < pairs.PIECE
    whole = evaluate(x, y, list(metrics()))
    spectra = [found.scores.pop("spectral_error") for found in (in_pieces, whole)]
    assert spectra == [None, None]  # because of the NaN; without it:
    assert dict(in_pieces) == pytest.approx(dict(whole), rel=1e-9, abs=1e-15)
    assert in_pieces.notes["ssim"] == whole.notes["ssim"]
    x[1, 2, 3] = y[1, 2, 3] = 0.0
    spectrum = ["spectral_error", "kl_divergence"]
    expected = dict(evaluate(x, y, spectrum))
    monkeypatch.setattr("lowtide.quality.metrics.spectrum.PIECE", 64)
    monkeypatch.setattr("lowtide.quality.metrics.pair.PIECE", 64)
    assert dict(evaluate(x, y, spectrum)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((np.zeros(3), np.zeros(4)), DataError, r"shape \(3,\), reconstructed \(4,\)"),
        ((np.zeros(3, complex), np.zeros(3)), DataError, "original holds complex128"),
        ((np.array(["a"]), np.zeros(1)), CodecError, "cannot encode elements of"),
        ((np.zeros(3), np.zeros(3), ["psnr"]), UnknownNameError, 'Did you mean "psnr_db"'),
        ((np.zeros(3), np.zeros(3), ["psnr_db:2"]), DataError, "takes no parameter"),
        ((np.zeros(3), np.zeros(3), ["error_autocorr:x"]), DataError, "write error_autocorr:1"),
        ((np.arange(3.0), np.ones(3), ["error_autocorr:0"]), DataError, "allowed lags are 1"),
        ((np.zeros(3), np.ones(3), ["error_quantile:1.5"]), DataError, "above 0 and up to 1"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        evaluate(*arguments)


_FINITE = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float32, n, elements=_FINITE), hnp.arrays(np.float32, n, elements=_FINITE)
        )
    )
)
def test_metrics_keep_their_relations(arrays: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = arrays
    found = evaluate(x, y, list(metrics()))
    e = y.astype(np.float64) - x.astype(np.float64)
    assert found["max_abs_error"] == np.abs(e).max()
    assert found["mse"] == pytest.approx(np.mean(e**2), rel=1e-9)
    assert found["error_quantile"] <= found["max_abs_error"]
    assert found["rmse"] <= found["max_abs_error"] * (1 + 1e-12)
    assert found.is_exact == bool((x == y).all())
    for name in ("ssim", "ssim_qcat", "pearson_r", "cosine_similarity", "error_autocorr",
                 "error_autocorr_axes"):  # fmt: skip
        assert found[name] is None or -1 <= found[name] <= 1, name
    assert 0 <= found["ks_statistic"] <= 1
    assert found["kl_divergence"] >= 0
    json.dumps(found.as_dict(), allow_nan=False)
