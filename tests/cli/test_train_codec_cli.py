"""``lowtide train-codec``, and `compress`, `decompress`, `inspect` with what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from lowtide.cli import app
from lowtide.compression.learned import library
from lowtide.compression.learned.model import load_model
from tests.compression.learned.tiny import field

runner = CliRunner()


def _run(*arguments: object) -> Result:
    return runner.invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


def _json(*arguments: object) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No model is at hand, and one thread trains."""
    monkeypatch.setattr(library, "_registered", {})
    monkeypatch.delenv("LOWTIDE_MODELS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _steps(count: int, *, seed: int) -> np.ndarray:
    """Return (count, 8, 12)."""
    return np.stack([field((2, 3), seed=100 * seed + step) for step in range(count)])


def _train(folder: Path, *more: object) -> list[object]:
    for name, seed in (("a", 0), ("b", 1)):
        np.save(folder / f"{name}.npy", _steps(30, seed=seed))
    shape = ("--block", "4,4", "--latent", 3, "--channels", "2", "--epochs", 1)
    sources = (folder / "a.npy", folder / "b.npy")
    return ["train-codec", *sources, "--out", folder / "m.safetensors", *shape, *more]


def test_a_model_is_trained_and_used(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    trained = _json(*_train(tmp_path))
    assert trained["sha256"] == load_model(model).sha256
    assert trained["stored_bytes"] == model.stat().st_size
    assert trained["training"]["validation_psnr_db"] > 50
    assert trained["training"]["aligned"] is True
    test, small, back = tmp_path / "test.npy", tmp_path / "test.lt", tmp_path / "back.npy"
    np.save(test, _steps(20, seed=2))
    found = _json("compress", test, small, "--bound", 0.02, "--model", model)
    assert found["codec"]["id"] == "lowtide.aesz"
    assert found["codec"]["model"] == trained["sha256"]
    assert found["max_abs_error"] <= found["limit"] == 0.02
    plain = _json("compress", test, tmp_path / "plain.lt", "--bound", 0.02)
    assert found["stream_bytes"] < plain["stream_bytes"]
    refused = _run("decompress", small, back)
    assert refused.exit_code == 2
    assert trained["sha256"] in refused.stderr
    assert not back.exists()
    shown = _run("inspect", small).stdout
    assert "not at hand" in shown
    assert "autoencoder" in shown
    _json("decompress", small, back, "--model", model)
    assert np.abs(np.load(back) - np.load(test)).max() <= 0.02


def test_people_see_progress_and_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run(*_train(tmp_path, "--seed", 4, "--unaligned", "--minutes", 5))
    assert "epoch 1 of 1: loss" in result.stderr
    assert "dB on what is not trained on" in result.stderr
    sha256 = load_model(tmp_path / "m.safetensors").sha256
    assert result.stdout.startswith(f"{tmp_path}/m.safetensors: ")
    assert result.stdout.rstrip().endswith(f"SHA-256 {sha256}")
    facts = load_model(tmp_path / "m.safetensors").facts
    assert (facts["seed"], facts["aligned"]) == (4, False)
    small = tmp_path / "a.lt"
    monkeypatch.setenv("LOWTIDE_MODELS", str(tmp_path))
    _run(
        "compress",
        tmp_path / "a.npy",
        small,
        "--bound",
        0.02,
        "--model",
        tmp_path / "m.safetensors",
    )
    shown = _run("inspect", small).stdout
    assert f"{sha256}, " in shown
    assert "the ratio with it is" in shown


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    arguments = _train(tmp_path)
    (tmp_path / "m.safetensors").write_bytes(b"mine")
    for more, text in (
        ((), "m.safetensors"),
        (("--force", "--block", "4x4"), "--block: '4x4'"),
        (("--force", "--block", "6,6", "--channels", "2,2"), "multiple of 4"),
        (("--force", "--block", "32,32,32", "--channels", "2"), "too small"),
        (("--force", "--epochs", -1), "epochs -1"),
    ):
        result = _run(*arguments, *more)
        assert result.exit_code == 2, result.output
        assert text in result.stderr
        assert (tmp_path / "m.safetensors").read_bytes() == b"mine"
    bad = _run(
        "compress", tmp_path / "a.npy", tmp_path / "o", "--bound", 1, "--model", tmp_path / "a.npy"
    )
    assert bad.exit_code == 2
    assert "is no model" in bad.stderr
