"""What `measure` says of a codec: sizes, times, quality, and whether a bound was kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from lowtide.core.codec import Bound, codecs, get_codec
from lowtide.core.errors import CodecError, ConfigError, UnknownNameError
from lowtide.quality import Candidate, dataset_ratio, evaluate, measure
from lowtide.quality.measurement import keeps
from lowtide.quality.metrics.pair import Pair
from tests.quality.arrays import smooth
from tests.quality.codecs import Rounding


@pytest.fixture(autouse=True)
def rounding() -> Iterator[None]:
    codecs.register(Rounding.codec_id, Rounding)
    yield
    codecs.unregister(Rounding.codec_id)


def test_a_report_holds_what_was_stored_and_what_came_back() -> None:
    x = smooth(60, 70).astype(np.float32)
    candidate = Candidate("lowtide.sz", {}, "rel", 1e-3)
    found = measure(x, candidate)
    stream = candidate.build().encode(x)
    assert (found.raw_bytes, found.stream_bytes, found.elements) == (x.nbytes, len(stream), 4200)
    assert found.ratio == x.nbytes / len(stream)
    assert found.bit_rate == 8 * len(stream) / 4200
    assert dict(found.evaluation) == dict(evaluate(x, get_codec("lowtide.zstd").decode(
        get_codec("lowtide.zstd").encode(candidate.build().decode(stream)))))  # fmt: skip
    assert found.is_within_bound is True
    assert found.encode_s > 0
    assert found.decode_s > 0
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["compression_ratio"] == found.ratio
    assert plain["codec"] == {"id": "lowtide.sz", "mode": "rel", "bound": 1e-3}
    assert found.value("bit_rate") == found.bit_rate
    assert found.value("psnr_db") == found.evaluation["psnr_db"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_type_goes_through_as_itself(dtype: torch.dtype) -> None:
    x = torch.from_numpy(smooth(30, 40)).to(dtype).T
    found = measure(x, Candidate("lowtide.sz", {}, "abs", 0.01), ["max_abs_error"])
    assert found.raw_bytes == x.numel() * x.element_size()
    assert found.is_within_bound
    assert 0 < found.evaluation["max_abs_error"] <= 0.01
    exact = measure(x, "lowtide.zstd", ["psnr_db"])
    assert exact.evaluation.is_exact
    assert exact.is_within_bound


def test_what_does_not_get_smaller_is_stored_as_it_is() -> None:
    x = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    found = measure(x, "lowtide.zstd", [])
    assert found.stream_bytes > found.raw_bytes
    assert (found.stored_bytes, found.ratio, found.bit_rate) == (4000, 1.0, 8.0)
    empty = measure(np.zeros((0, 3)), "lowtide.zstd", ["psnr_db"])
    assert (empty.ratio, empty.bit_rate) == (None, None)
    json.dumps(empty.as_dict(), allow_nan=False)


def test_the_ratio_of_a_dataset_is_not_the_mean_of_ratios() -> None:
    reports = [measure(np.zeros(10_000), "lowtide.zstd", []), measure(
        np.random.default_rng(0).normal(size=10_000), "lowtide.zstd", [])]  # fmt: skip
    ratios = [report.ratio for report in reports]
    total = dataset_ratio(reports)
    assert total == 160_000 / sum(report.stored_bytes for report in reports)
    assert total < 3 < np.mean(ratios)
    assert dataset_ratio([]) is None


@pytest.mark.parametrize("mode", ["abs", "rel"])
def test_a_broken_bound_is_seen(mode: str) -> None:
    x = np.linspace(0, 10, 1001)
    for breaks, expected in ((0.0, True), (1.0, False)):
        candidate = Candidate("tests.rounding", {"breaks": breaks}, mode, 0.013)
        assert measure(x, candidate, []).is_within_bound is expected


def test_bounds_are_compared_to_the_last_bit() -> None:
    x = np.array([1.0, 2.0, 0.1, 11.0])
    y = np.array([1.25, 2.0, 0.1, 11.0])
    below = math.nextafter(0.25, 0)
    assert keeps(Pair(x, y), Bound("abs", 0.25))
    assert not keeps(Pair(x, y), Bound("abs", below))
    exact = Fraction(0.25) / (Fraction(11.0) - Fraction(0.1))
    nearest = float(exact)
    above = nearest if Fraction(nearest) >= exact else math.nextafter(nearest, 1)
    assert keeps(Pair(x, y), Bound("rel", above))
    assert not keeps(Pair(x, y), Bound("rel", math.nextafter(above, 0)))
    # 1 + 2^-53 is no float64: the difference rounds to the limit, and is above it.
    x, y = np.array([-(2.0**-53)]), np.array([1.0])
    assert (y - x)[0] == 1.0
    assert not keeps(Pair(x, y), Bound("abs", 1.0))
    assert keeps(Pair(x, y), Bound("abs", math.nextafter(1.0, 2)))


def test_other_promises_are_checked_too() -> None:
    x = np.array([1.0, -2.0, 0.0, np.nan])
    assert keeps(Pair(x, x * 1.25), Bound("pw_rel", 0.25))
    assert not keeps(Pair(x, x * 1.25), Bound("pw_rel", 0.24))
    assert not keeps(Pair(x, np.array([1.0, -2.0, 1e-9, np.nan])), Bound("pw_rel", 0.25))
    assert keeps(Pair(x, x.copy()), Bound("lossless"))
    assert not keeps(Pair(np.array([0.0]), np.array([-0.0])), Bound("lossless"))
    assert keeps(Pair(x, x + 5), Bound("none")) is None
    assert not keeps(Pair(x, np.array([1.0, -2.0, 0.0, 1.0])), Bound("abs", 9.0))
    assert keeps(Pair(np.full(2, np.nan), np.full(2, np.nan)), Bound("abs", 0.1))


def test_wrong_candidates_raise() -> None:
    with pytest.raises(UnknownNameError, match="unknown codec"):
        measure(np.zeros(3), "lowtide.none")
    with pytest.raises(ConfigError, match="bound is missing"):
        measure(np.zeros(3), {"id": "lowtide.sz"})
    with pytest.raises(CodecError, match="elements are int64"):
        measure(np.zeros(3, int), Candidate("lowtide.sz", {}, "abs", 0.1))
