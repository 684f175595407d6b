"""Files of models: what is in them, what is refused, where the one that a stream names is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide.compression import compress, decompress, inspect, register_model
from lowtide.compression.learned import library
from lowtide.compression.learned.layers import Architecture
from lowtide.compression.learned.model import load_model, pack_model, parse_model
from lowtide.core.errors import CodecError, MissingModelError
from tests.compression.learned.tiny import field, model_of


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is registered and no folder set."""
    monkeypatch.setattr(library, "_registered", {})
    monkeypatch.setattr(library, "_in_folders", {})
    monkeypatch.delenv("LOWTIDE_MODELS", raising=False)


def saved(path: Path, **how: Any) -> Path:
    path.write_bytes(pack_model(model_of(**how)))
    return path


def test_a_model_comes_back_from_its_file(tmp_path: Path) -> None:
    made = model_of()
    path = saved(tmp_path / "m.safetensors")
    found = load_model(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == made.sha256
    assert found.stored_bytes == path.stat().st_size
    assert (found.architecture, found.low, found.high) == (made.architecture, -2.0, 2.0)
    assert found.facts == {"made": True}
    assert found.weights.keys() == made.weights.keys()
    assert all((found.weights[name] == made.weights[name]).all() for name in found.weights)
    assert pack_model(found) == path.read_bytes()


def test_blocks_become_latents_and_come_back_nearly() -> None:
    model = model_of(deep=0.0)
    blocks = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    values = model.values(model.outputs(blocks))  # with no deep way, a projection
    assert values.shape == (20, 16)
    np.testing.assert_allclose(model.latents(values), blocks, atol=5e-3)
    assert not np.allclose(model_of().outputs(blocks), model.outputs(blocks), atol=1e-3)


def test_numbers_that_are_none_become_zero() -> None:
    model = model_of()
    latents = np.array([[np.nan, 0, 0], [np.inf, 0, 0], [3e38, 3e38, 3e38]], np.float32)
    assert (model.outputs(latents) == 0).any(axis=1).all()
    assert np.isfinite(model.outputs(latents)).all()


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def with_header(raw: bytes, change: Any) -> bytes:
    header, rest = parts(raw)
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h: h.pop("__metadata__"), "format None.*train-codec"),
        (lambda h: h["__metadata__"].update(format="lowtide.aesz/2"), "aesz/2.*this release reads"),
        (lambda h: h["__metadata__"].pop("low"), "is no model"),
        (lambda h: h["__metadata__"].update(low="nan"), "are no range"),
        (lambda h: h["__metadata__"].update(low="2.0"), "are no range"),
        (lambda h: h["__metadata__"].update(block="3,4"), "multiple of 2 for 1 stages"),
        (lambda h: h["__metadata__"].update(block="4,4,4,4"), "1 to 3 axes"),
        (lambda h: h["__metadata__"].update(block="65536,65536"), "allowed are 65536 elements"),
        (lambda h: h["__metadata__"].update(block="4;4"), "is no model"),
        (lambda h: h["__metadata__"].update(latent="0"), "latent 0: allowed are 1 to 1024"),
        (lambda h: h["__metadata__"].update(latent="4"), "has shape"),
        (lambda h: h["__metadata__"].update(channels="9999"), "channels.*allowed are 1 to 1024"),
        (lambda h: h["__metadata__"].update(training="[1]"), "is no model"),
        (lambda h: h.pop("decoder.0.bias"), "is no model"),
    ],
)
def test_files_that_are_no_models_are_refused(change: Any, text: str) -> None:
    raw = with_header(pack_model(model_of()), change)
    with pytest.raises(CodecError, match=f"^here: .*{text}"):
        parse_model(raw, "here")


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    raw = pack_model(model_of())
    for damaged in (b"", raw[:7], raw[:100], raw[:-1], raw + b"x", b"\xff" * 64):
        with pytest.raises(CodecError, match=r"^here: is no model"):
            parse_model(damaged, "here")
    model = model_of()
    for weight in (np.inf, np.nan):
        weights = {name: value.copy() for name, value in model.weights.items()}
        weights["decoder.0.bias"][0] = weight
        forged = pack_model(type(model)(model.architecture, -2.0, 2.0, weights))
        with pytest.raises(CodecError, match=r"decoder\.0\.bias holds numbers that are not finite"):
            parse_model(forged, "here")
    with pytest.raises(CodecError, match=r"gone: cannot be read: No such file"):
        load_model(tmp_path / "gone")


def test_architectures_are_checked() -> None:
    for block, latent, channels in (
        ((), 1, (2,)), ((4, 0), 1, (2,)), ((4,), 1, ()), ((4,), 1025, (2,)), ((4,), 1, (0,)),
        ((6,), 1, (2, 2)),
    ):  # fmt: skip
        with pytest.raises(CodecError, match="allowed are"):
            Architecture(block, latent, channels)


# ---- the library


@pytest.mark.usefixtures("unknown")
def test_the_model_of_a_stream_is_found_in_each_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "m.safetensors")
    model = load_model(path)
    x = field((6, 6))
    blob = compress(x, "lowtide.aesz", bound=0.05, model=path)
    assert "autoencoder" in {chunk["kind"] for chunk in inspect(blob)["chunks"]}
    with pytest.raises(MissingModelError, match=f"{model.sha256}.*At hand: none.*not set.*--model"):
        decompress(blob)
    expected = decompress(blob, models=[path])
    assert np.abs(expected - x).max() <= 0.05
    with pytest.raises(MissingModelError):  # given once, not for ever
        decompress(blob)
    assert (decompress(blob, models=[saved(tmp_path / "o", seed=1), model]) == expected).all()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "broken.safetensors").write_bytes(b"nothing")
    saved(tmp_path / "folder" / "another.safetensors", seed=1)
    monkeypatch.setenv("LOWTIDE_MODELS", str(tmp_path / "folder"))
    with pytest.raises(MissingModelError):
        decompress(blob)
    saved(tmp_path / "folder" / "right.safetensors")
    assert (decompress(blob) == expected).all()
    monkeypatch.setattr(library, "_registered", {})
    monkeypatch.delenv("LOWTIDE_MODELS")
    assert register_model(path).sha256 == model.sha256
    assert (decompress(blob) == expected).all()


@pytest.mark.usefixtures("unknown")
def test_no_other_model_will_do(tmp_path: Path) -> None:
    blob = compress(field((6, 6)), "lowtide.aesz", bound=0.05, model=model_of())
    other = model_of(seed=1)
    register_model(other)
    with pytest.raises(MissingModelError, match=f"no other will do. At hand: {other.sha256[:12]}"):
        decompress(blob, models=[other])


@pytest.mark.usefixtures("unknown")
def test_a_stream_without_learned_blocks_needs_no_model() -> None:
    noise = np.random.default_rng(0).normal(size=(40, 40))
    blob = compress(noise, "lowtide.aesz", bound=1e-3, model=model_of())
    assert np.abs(decompress(blob) - noise).max() <= 1e-3
    assert inspect(blob)["model"]["stored_bytes"] is None


@pytest.mark.usefixtures("unknown")
def test_a_model_is_named_by_its_hash_too() -> None:
    model = model_of()
    x = field((6, 6))
    with pytest.raises(MissingModelError):
        compress(x, "lowtide.aesz", bound=0.05, model=model.sha256)
    register_model(model)
    blob = compress(x, "lowtide.aesz", bound=0.05, model=model.sha256)
    assert blob == compress(x, "lowtide.aesz", bound=0.05, model=model)
    found = inspect(blob)["model"]
    assert found["sha256"] == model.sha256
    assert found["stored_bytes"] == model.stored_bytes
    assert found["ratio_with_model"] == x.nbytes / (len(blob) + model.stored_bytes)
