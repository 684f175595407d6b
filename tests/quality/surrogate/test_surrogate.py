"""`QualitySurrogate` from samples to predictions, to files and to selections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lowtide.core.codec import codecs
from lowtide.core.errors import CorruptStreamError, DataError
from lowtide.quality import measure, select
from lowtide.quality.candidates import Candidate, Family
from lowtide.quality.surrogate.history import Following, recalled
from lowtide.quality.surrogate.model import QualitySurrogate
from lowtide.quality.surrogate.samples import Label, Sample, digest_of, head_of, labelled
from tests.quality.codecs import Rounding
from tests.quality.surrogate.learning import (
    LEARNED,
    SETTINGS,
    candidates,
    fields,
    later,
    samples,
    surrogate,
)


class Grown(Rounding):
    codec_id = "tests.grown"


@pytest.fixture
def grown_codec() -> Iterator[None]:
    codecs.register(Grown.codec_id, Grown)
    yield
    codecs.unregister(Grown.codec_id)


def errors(metric: str, scale: float = 1.0) -> np.ndarray:
    found = []
    for each in later():
        estimates = surrogate().predict(each.tensor, [label.candidate for label in each.labels])
        for estimate, label in zip(estimates, each.labels, strict=True):
            found.append(estimate.metrics[metric].value - label.values[metric])
    return np.array(found) * scale


def test_predictions_are_near_what_is_measured_later() -> None:
    truth = np.array([label.values["compression_ratio"] for s in later() for label in s.labels])
    assert np.median(np.abs(errors("compression_ratio")) / truth) < 0.1
    assert np.median(np.abs(errors("psnr_db"))) < 1.0
    assert np.median(np.abs(errors("error_autocorr"))) < 0.1


def test_learned_heads_beat_the_probe_alone() -> None:
    truth = np.array([label.values["compression_ratio"] for s in later() for label in s.labels])
    probe = []
    for each in later():
        plain, _ = each.seen
        for label in each.labels:
            at = round(-2 * np.log10(label.candidate.bound)) - 1
            probe.append(plain.item_bits / 2 ** plain.probe[at, 0])
    worse = np.median(np.abs(np.array(probe) - truth) / truth)
    assert np.median(np.abs(errors("compression_ratio")) / truth) < 0.7 * worse


def test_absolute_bounds_are_relative_ones_in_other_units() -> None:
    x = later()[0].tensor
    spread = float(x.max()) - float(x.min())
    relative = surrogate().predict(x, candidates("differences"))
    absolute = surrogate().predict(x, candidates("differences", "abs", spread))
    for one, other in zip(relative, absolute, strict=True):
        assert one.metrics["psnr_db"].value == pytest.approx(other.metrics["psnr_db"].value)
        assert other.candidate.mode == "abs"


def test_candidates_that_were_not_learned_get_no_metrics() -> None:
    x = later()[0].tensor
    asked = [
        Candidate("lowtide.zstd"), Candidate("lowtide.sz", {}, "rel", 1e-3),
        Candidate("lowtide.sz", {"predictor": "differences"}, "pw_rel", 1e-3),
        Candidate("lowtide.sz", {"predictor": "differences"}, "rel", 1e-6),
        Candidate("lowtide.sz", {"predictor": "differences"}, "rel", 1e-3),
    ]  # fmt: skip
    found = surrogate().predict(x, asked)
    assert [bool(each.metrics) for each in found] == [False] * 4 + [True]
    assert [each.candidate for each in found] == asked


def test_metrics_without_labels_are_not_predicted() -> None:
    own = [
        replace(s, labels=[Label(each.candidate, {**each.values, "dssim": None})
                           for each in s.labels])
        for s in samples()[:12]
    ]  # fmt: skip
    found = QualitySurrogate(SETTINGS).fit(own).predict(own[0].tensor, candidates("differences"))
    assert "dssim" not in found[0].metrics
    assert "ssim" not in found[0].metrics
    assert "psnr_db" in found[0].metrics


def test_fitting_twice_gives_the_same_bits() -> None:
    again = QualitySurrogate(SETTINGS).fit([s for s in samples() if s.step < LEARNED])
    asked = candidates("differences")
    x = later()[1].tensor
    assert again.predict(x, asked) == surrogate().predict(x, asked)
    assert again.describe() == surrogate().describe()


@pytest.mark.usefixtures("grown_codec")
def test_stage_one_and_old_heads_stay_when_a_codec_is_added() -> None:
    grown = QualitySurrogate(SETTINGS).fit([s for s in samples() if s.step < LEARNED])
    asked = candidates("differences")
    handle = grown.extract_features(later()[0].tensor)
    before = grown.predict_from_features(handle, asked)
    new = [
        labelled(each.values, [Candidate("tests.grown", {}, "rel", b) for b in (1e-1, 1e-2, 1e-3)],
                 series=each.series, step=each.step)
        for each in fields()[:12]
    ]  # fmt: skip
    parameters = grown.stage.network.state_dict()
    copies = {name: value.clone() for name, value in parameters.items()}
    assert len(grown.add_compressor("tests.grown", new)) == 1
    assert grown.codecs() == ["lowtide.sz", "tests.grown"]
    for name, value in grown.stage.network.state_dict().items():
        assert torch.equal(value, copies[name])
    assert grown.predict_from_features(handle, asked) == before  # the old handle is good, too
    estimate = grown.predict_from_features(handle, [Candidate("tests.grown", {}, "rel", 1e-2)])[0]
    actual = measure(later()[0].tensor, estimate.candidate, ["psnr_db"])
    assert estimate.metrics["psnr_db"].value == pytest.approx(actual.value("psnr_db"), abs=2.0)
    with pytest.raises(DataError, match="known already"):
        grown.add_compressor("tests.grown", new)
    with pytest.raises(DataError, match="none of 12 samples"):
        grown.add_compressor("lowtide.zstd", new)


def test_features_of_another_stage_are_refused() -> None:
    other = QualitySurrogate(replace(SETTINGS, seed=1)).fit(samples()[:12])
    handle = other.extract_features(later()[0].tensor)
    with pytest.raises(DataError, match="extract them again"):
        surrogate().predict_from_features(handle, candidates("differences"))


def test_saved_surrogates_predict_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "surrogate.safetensors"
    surrogate().save(path)
    found = QualitySurrogate.load(path)
    asked, x = candidates("differences"), later()[0].tensor
    assert found.predict(x, asked) == surrogate().predict(x, asked)
    assert found.describe() == surrogate().describe()
    assert found.settings == SETTINGS
    # Handles that were kept stay good.
    handle = surrogate().extract_features(x)
    assert found.predict_from_features(handle, asked) == surrogate().predict(x, asked)


def test_damaged_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "surrogate.safetensors"
    surrogate().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptStreamError, match="damaged"):
        QualitySurrogate.load(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(CorruptStreamError, match="holds no surrogate"):
        QualitySurrogate.load(path)
    path.write_bytes(whole)
    arrays = load_file(path)
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    about = header["__metadata__"]
    del arrays["heads.0.networks.w1"]
    save_file(arrays, path, metadata=about)
    with pytest.raises(CorruptStreamError, match="incomplete or damaged"):
        QualitySurrogate.load(path).predict(later()[0].tensor, candidates("differences"))
    key = next(iter(about))
    changed = json.loads(about[key]) | {"schema": 99}
    save_file(load_file(path), path, metadata={key: json.dumps(changed)})
    with pytest.raises(CorruptStreamError, match=r"schema 99.*fit the surrogate anew"):
        QualitySurrogate.load(path)


def test_other_versions_of_a_codec_are_noted_when_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "surrogate.safetensors"
    surrogate().save(path)
    QualitySurrogate.load(path)
    assert not caplog.records
    monkeypatch.setattr("lowtide.__version__", "99.0")
    QualitySurrogate.load(path)
    assert "lowtide 99.0" in caplog.text
    assert "fit it anew" in caplog.text


def test_selection_takes_the_surrogate_and_measures_what_it_says() -> None:
    families = [Family("lowtide.sz", {"predictor": "differences"}, "rel")]
    for each in later():
        found = select(each.tensor, {"psnr_db": 55}, families, predictor=surrogate())
        assert found.measured is not None
        assert found.measured.value("psnr_db") >= 55
        assert found.decision in ("predicted", "tightened"), found.fallback_reason
        assert found.measurements <= 3


def test_strange_arrays_are_marked_and_measured() -> None:
    strange = np.random.default_rng(0).normal(size=(64, 64)) ** 9
    families = [Family("lowtide.sz", {"predictor": "differences"}, "rel")]
    assert not surrogate().predict(strange, candidates("differences"))[0].is_familiar
    assert surrogate().predict(later()[0].tensor, candidates("differences"))[0].is_familiar
    found = select(strange, {"psnr_db": 55}, families, predictor=surrogate())
    assert found.decision == "searched"
    assert "unlike" in str(found.fallback_reason)


def test_memory_takes_part_of_the_last_error_away() -> None:
    following = Following(surrogate())
    first, second = (s for s in later() if s.series == "turbulence/vorticity")
    asked = [label.candidate for label in second.labels]
    assert following.predict(first.tensor, asked) == surrogate().predict(first.tensor, asked)
    wrong = [Label(label.candidate, {"psnr_db": 100.0}) for label in first.labels]
    for label in wrong:
        following.remember(label)
    plain = surrogate().predict(second.tensor, asked)
    moved = following.predict(second.tensor, asked)
    head = surrogate()._ready().heads[str(head_of(asked[0]))]
    share = head.memory[surrogate().settings.metrics.index("psnr_db")]
    assert 0 < share <= 1
    for before, after, old in zip(plain, moved, surrogate().predict(first.tensor, asked),
                                  strict=True):  # fmt: skip
        step = share * (100.0 - old.metrics["psnr_db"].value)
        assert after.metrics["psnr_db"].value - before.metrics["psnr_db"].value == (
            pytest.approx(step, rel=1e-6)
        )
        assert after.metrics["dssim"].value == pytest.approx(before.metrics["dssim"].value)
    following.forget()
    assert following.predict(second.tensor, asked) == plain


def test_memory_fades_between_bounds() -> None:
    known = {-2.0: np.array([1.0, np.nan])}
    found = recalled(known, np.array([-2.0, -2.25, -4.0]), 2)
    assert found[0] == pytest.approx([1.0, 0.0])
    assert 0.5 < found[1, 0] < 1.0
    assert found[2, 0] < 1e-6
    assert not recalled({}, np.array([-2.0]), 2).any()


def test_training_sets_have_fingerprints() -> None:
    some = list(samples()[:3])
    assert digest_of(some) == digest_of(list(samples()[:3]))
    assert digest_of(some) != digest_of(some[::-1])
    other = replace(some[0], labels=some[0].labels[1:])
    assert digest_of([other, *some[1:]]) != digest_of(some)


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(DataError, match="learned nothing yet"):
        QualitySurrogate().predict(later()[0].tensor, [])
    lossless = [Sample(s.tensor, [Label(Candidate("lowtide.zstd"), {})]) for s in samples()[:4]]
    with pytest.raises(DataError, match="no label of a codec"):
        QualitySurrogate(SETTINGS).fit(lossless)
    with pytest.raises(DataError, match=r"confidence 1\.5"):
        QualitySurrogate(confidence=1.5)
