"""Moments may change within their bound, and nothing else may."""

from __future__ import annotations

import itertools
import logging
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lowtide.checkpoint import verify
from lowtide.checkpoint.compact import SUFFIX
from lowtide.checkpoint.compact import encode as compact_encode
from lowtide.checkpoint.compact.bound import keeps_bound
from lowtide.checkpoint.compact.copies import CompactConfig, beside, expand
from lowtide.checkpoint.compact.file import read_table
from lowtide.checkpoint.compact.records import find_records
from lowtide.core.codec import Bound, codecs
from tests.checkpoint import plans
from tests.checkpoint.small_copies import (
    NAME,
    Ratios,
    Save,
    Steps,
    Sz3,
    adam,
    assert_gives,
    checkpoint,
    contents,
    encodings,
    moments,
    role,
    shrink,
)

STEPS = {"id": "test.steps", "step": 1e-3}  # bound "abs"
RATIOS = {"id": "test.ratios", "value": 2.0**-4}  # bound "pw_rel"


@pytest.fixture(autouse=True)
def _test_codecs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compact_encode, "_told", set())
    for codec in (Steps, Ratios, Sz3):
        codecs.register(codec.codec_id, codec)
    yield
    for codec in (Steps, Ratios, Sz3):
        codecs.unregister(codec.codec_id)


def exact(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


# ---- what is kept


@pytest.mark.parametrize("save", [torch.save, plans.save], ids=["torch", "lowtide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_only_moments_change_and_only_within_the_bound(
    tmp_path: Path, save: Save, dtype: torch.dtype
) -> None:
    original = checkpoint(tmp_path / "step1", {NAME: adam(dtype=dtype)}, save=save)
    small = shrink(original, tmp_path / "slow" / "step1", moments=RATIOS)
    expand(small, tmp_path / "again", find_base=beside(small))
    before, after = moments(original), moments(tmp_path / "again")
    assert torch.equal(before[2], after[2])
    for one, other in zip(before[:2], after[:2], strict=True):
        assert one.dtype == other.dtype
        assert not torch.equal(one, other)
        assert (np.abs(exact(one) - exact(other)) <= 2.0**-4 * np.abs(exact(one))).all()
    assert after[1].min() >= 0
    assert not torch.signbit(after[1]).any()
    # Everything else is the same, and the file is whole for torch, for zip tools and for Lowtide.
    assert verify(tmp_path / "again").is_ok
    with (
        zipfile.ZipFile(tmp_path / "again" / NAME) as found,
        zipfile.ZipFile(original / NAME) as was,
    ):
        assert found.testzip() is None
        changed = [n for n in was.namelist() if found.read(n) != was.read(n)]
    assert len(changed) == 2
    assert len(contents(tmp_path / "again")[NAME]) == len(contents(original)[NAME])


def test_the_bound_is_written_down(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "step1", {NAME: adam()})
    small = shrink(original, tmp_path / "slow" / "step1", moments=RATIOS)
    for name in ("moment", "second moment"):
        record = role(small, name)
        assert encodings(record) == {"lossy"}
        assert record.codec == RATIOS
        assert record.bound == {"kind": "pw_rel", "value": 2.0**-4}
    assert role(small, "master").bound is None
    raw = (small / f"{NAME}{SUFFIX}").read_bytes()
    assert b'"is_lossy":true' in raw
    exactly = shrink(original, tmp_path / "exact" / "step1")
    assert b'"is_lossy":false' in (exactly / f"{NAME}{SUFFIX}").read_bytes()


def test_moments_are_exact_when_no_codec_is_named_for_them(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "step1", {NAME: adam(count=50_000)})
    for number, settings in enumerate([{}, {"moments": "lowtide.zstd"}]):
        small = shrink(original, tmp_path / f"slow{number}" / "step1", **settings)
        assert_gives(small, original, tmp_path / f"again{number}")


def test_second_moments_stay_exact_when_small_ones_could_become_zero(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = checkpoint(tmp_path / "step1", {NAME: adam()})
    with caplog.at_level(logging.WARNING, "lowtide"):
        for name, spec in (("abs", STEPS), ("again", STEPS), ("wide", {**RATIOS, "value": 1.0})):
            small = shrink(original, tmp_path / name / "step1", moments=spec)
            assert encodings(role(small, "moment")) == {"lossy"}
            assert encodings(role(small, "second moment")) == {"codec"}
    assert ["small second moments" in r.getMessage() for r in caplog.records] == [True, True]


def test_zeros_of_second_moments_stay_zeros_and_have_no_sign(tmp_path: Path) -> None:
    state = adam()
    second = state["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["exp_avg_sq"]
    second[:1000] = -0.0
    second[500_000:] = 0
    second[300_000] = -1  # no second moment, and its place is not to be lost either
    original = checkpoint(tmp_path / "step1", {NAME: state})
    small = shrink(original, tmp_path / "slow" / "step1", moments=RATIOS)
    kinds = [b.encoding for b in role(small, "second moment").blocks]
    assert kinds == ["lossy", "codec", "lossy"]
    expand(small, tmp_path / "again", find_base=beside(small))
    found = moments(tmp_path / "again")[1]
    assert torch.equal(found == 0, second == 0)
    assert torch.signbit(found).nonzero().tolist() == [[300_000]]


# ---- what falls back


@pytest.mark.parametrize("spec", [STEPS, RATIOS], ids=["steps", "ratios"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_blocks_with_non_finite_numbers_stay_exact(tmp_path: Path, value: float, spec: Any) -> None:
    state = adam()
    inner = state["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]
    inner["exp_avg"][300_000] = value
    inner["exp_avg_sq"][-1] = value
    original = checkpoint(tmp_path / "step1", {NAME: state})
    small = shrink(original, tmp_path / "slow" / "step1", moments=spec)
    kinds = [[b.encoding for b in role(small, r).blocks] for r in ("moment", "second moment")]
    assert kinds[0] == ["lossy", "codec", "lossy"]
    assert kinds[1] == (["lossy", "lossy", "codec"] if spec is RATIOS else ["codec"] * 3)
    expand(small, tmp_path / "again", find_base=beside(small))
    assert verify(tmp_path / "again").is_ok
    for before, after in zip(moments(original), moments(tmp_path / "again"), strict=True):
        same = [np.isnan(exact(before)), np.isinf(exact(before)) * np.sign(exact(before))]
        found = [np.isnan(exact(after)), np.isinf(exact(after)) * np.sign(exact(after))]
        np.testing.assert_array_equal(same, found)
    second = slice(262_144, 524_288)
    assert exact(moments(original)[0][second]).tobytes() == (
        exact(moments(tmp_path / "again")[0][second]).tobytes()
    )


@pytest.mark.parametrize("number", [0, 1])
def test_moments_stay_exact_when_the_zip_has_no_right_checksum_to_replace(
    tmp_path: Path, number: int
) -> None:
    original = checkpoint(tmp_path / "made" / "step1", {NAME: adam()})
    raw = bytearray((original / NAME).read_bytes())
    (first,) = [r for r in find_records(original / NAME, len(raw)) if r.role == "moment"]
    raw[first.crc_at[number]] ^= 1
    original = checkpoint(tmp_path / "step1", {NAME: bytes(raw)})
    small = shrink(original, tmp_path / "slow" / "step1", moments=RATIOS)
    assert encodings(role(small, "moment")) == {"codec"}
    assert encodings(role(small, "second moment")) == {"lossy"}


@pytest.mark.parametrize(
    ("shift", "text"), [(90.0, "does not keep what it promises"), (1e9, "fails with")]
)
def test_a_codec_that_breaks_its_word_is_told_once_and_not_used(
    tmp_path: Path, shift: float, text: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if shift == 1e9:
        monkeypatch.setattr(Steps, "_encode", lambda self, data: 1 / 0)
    original = checkpoint(tmp_path / "step1", {NAME: adam()})
    with caplog.at_level(logging.WARNING, "lowtide"):
        for name in ("slow", "again"):
            small = shrink(original, tmp_path / name / "step1", moments={**STEPS, "shift": shift})
            assert not read_table(small / f"{NAME}{SUFFIX}").is_lossy
            assert_gives(small, original, tmp_path / f"{name} again")
    told = [r.getMessage() for r in caplog.records if "second moments" not in r.getMessage()]
    assert [text in each and "test.steps" in each for each in told] == [True]


def test_a_lossless_codec_that_is_not_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Steps, "bound", Bound("lossless"))
    original = checkpoint(tmp_path / "step1", {NAME: adam(count=9000)})
    with caplog.at_level(logging.WARNING, "lowtide"):
        small = shrink(original, tmp_path / "slow" / "step1", codec=STEPS)
    assert encodings(role(small, "master")) == {"raw"}
    assert_gives(small, original, tmp_path / "again")
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"codec": "test.steps"}, '"codec" is test.steps, which is lossy'),
        ({"moments": "test.step"}, 'Did you mean "test.steps"'),
        ({"moments": {"id": "test.steps", "size": 1}}, "cannot use the parameters"),
        ({"max_chain": 0}, "greater than or equal to 1"),
        ({"delta": 1}, "valid boolean"),
    ],
)
def test_settings_are_refused_when_they_make_no_sense(settings: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        CompactConfig(**settings)


def test_a_codec_without_a_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steps, "bound", Bound("none"))
    with pytest.raises(ValidationError, match="keeps no bound"):
        CompactConfig(moments="test.steps")


# ---- the check of the bound

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8),
    st.sampled_from(["abs", "rel", "pw_rel"]),
    st.floats(0, 4),
    st.sampled_from(["float32", "float64"]),
)
def test_the_check_is_that_of_fractions(
    pairs: list[tuple[float, float]], kind: str, value: float, dtype: str
) -> None:
    before, after = (np.array(side, dtype) for side in zip(*pairs, strict=True))
    xs, ys = ([Fraction(float(v)) for v in side] for side in (before, after))
    # Bounds that some error meets exactly, and the next number below.
    errors = [abs(b - a) for a, b in zip(xs, ys, strict=True)]
    unit = {"abs": Fraction(1), "rel": max(xs) - min(xs), "pw_rel": abs(xs[0])}[kind]
    met = [float(errors[0] / unit)] if unit and errors[0] / unit < 2**1000 else []
    for limit in (value, *met, *(float(np.nextafter(m, 0)) for m in met)):
        scale = Fraction(limit) * (max(xs) - min(xs) if kind == "rel" else 1)
        wanted = all(
            error <= scale * (abs(a) if kind == "pw_rel" else 1)
            for error, a in zip(errors, xs, strict=True)
        )
        found = keeps_bound(before.tobytes(), after.tobytes(), dtype, Bound(kind, limit))
        assert found == wanted


def test_the_check_refuses_what_is_not_finite_or_missing() -> None:
    ones = np.ones(3, np.float32)
    bound = Bound("abs", 5)
    assert keeps_bound(ones.tobytes(), ones.tobytes(), "float32", bound)
    assert not keeps_bound(ones.tobytes(), ones[:2].tobytes(), "float32", bound)
    for value in (np.nan, np.inf):
        other = np.array([1, value, 1], np.float32)
        assert not keeps_bound(ones.tobytes(), other.tobytes(), "float32", bound)
    large = np.array([-1.7e308, 1.7e308])
    assert keeps_bound(large.tobytes(), large[::-1].tobytes(), "float64", Bound("rel", 1))


# ---- SZ3


@pytest.mark.parametrize("value", [1e-2, 1e-3, 1e-4])
def test_sz3_keeps_its_bound_in_real_moments(tmp_path: Path, value: float) -> None:
    pytest.importorskip("pysz")
    original = checkpoint(tmp_path / "step1", {NAME: adam()})
    small = shrink(
        original, tmp_path / "slow" / "step1", moments={"id": "test.sz3", "value": value}
    )
    assert encodings(role(small, "moment")) == {"lossy"}
    expand(small, tmp_path / "again", find_base=beside(small))
    before, after = moments(original), moments(tmp_path / "again")
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])
    for begin in range(0, len(before[0]), 262_144):  # the bound holds in each block by itself
        x, y = (exact(side[0][begin:][:262_144]) for side in (before, after))
        limit = Fraction(value) * (Fraction(x.max()) - Fraction(x.min()))
        assert 0 < Fraction(np.abs(y - x).max()) <= limit


def test_training_goes_on_about_as_well_from_moments_within_bounds(
    tmp_path: Path, record_property: Any
) -> None:
    pytest.importorskip("pysz")
    losses = {}
    codecs = {"exact": None, "SZ3 1e-4": {"id": "test.sz3", "value": 1e-4}}
    codecs |= {"SZ3 1e-3": {"id": "test.sz3", "value": 1e-3}, "each 1/16": RATIOS}
    for mode, bound in (("rel", 1e-4), ("pw_rel", 1e-2)):
        codecs[f"{mode} {bound:g}"] = {"id": "lowtide.sz", "mode": mode, "bound": bound}
    for name, codec in codecs.items():
        folder = tmp_path / name.replace("/", " of ")
        model, optimizer, batches = trainer()
        for _ in range(150):
            step(model, optimizer, next(batches))
        state = {"module": model.state_dict(), "optimizer": optimizer.state_dict()}
        original = checkpoint(folder / "step1", {NAME: state})
        small = shrink(original, folder / "slow" / "step1", moments=codec)
        assert read_table(small / f"{NAME}{SUFFIX}").is_lossy == (codec is not None)
        expand(small, folder / "again", find_base=beside(small))
        found = torch.load(folder / "again" / NAME, weights_only=False)
        model, optimizer, _ = trainer()
        model.load_state_dict(found["module"])
        optimizer.load_state_dict(found["optimizer"])
        history = [step(model, optimizer, next(batches)) for _ in range(100)]
        losses[name] = (history[0], max(history), float(np.mean(history[-20:])))
        record_property(f"first, largest and last loss with moments {name}", str(losses[name]))
    # The weights are exact, so the first loss is; what follows shows what the moments cost.
    wanted = losses["exact"]
    for found in losses.values():
        assert found[0] == wanted[0]
        assert found[2] == pytest.approx(wanted[2], rel=0.05), losses


def trainer() -> tuple[torch.nn.Module, torch.optim.Optimizer, Iterator[Any]]:
    torch.manual_seed(0)
    layers = torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    target = torch.randn(32, 8)

    def batches() -> Iterator[Any]:
        for seed in itertools.count():
            x = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
            yield x, torch.sin(x @ target)

    return model, optimizer, batches()


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())
