"""`lowtide kmeans`: from files to files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowtide.cli import main
from lowtide.kmeans import KMeans

ROWS = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", ROWS)
    return tmp_path / "rows.npy"


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["kmeans", *map(str, arguments)])
    assert (ended.value.code or 0) == code
    return capsys.readouterr()


def test_fit_and_predict(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = samples.parent
    out, labels, more = (folder / f"{name}.npy" for name in ("out", "labels", "more"))
    options = ["--clusters", 7, "--out", out, "--labels", labels, "--fault-tolerance", "correct"]
    told, _ = run(capsys, "fit", samples, *options, "--json")
    facts = json.loads(told)
    expected = KMeans(7, random_state=0, fault_tolerance="correct").fit(ROWS)
    assert (np.load(out) == expected.cluster_centers_).all()
    assert (np.load(labels) == expected.labels_).all()
    assert facts["inertia"] == expected.inertia_
    assert facts["faults"]["checks"] > 0
    assert facts["faults"]["detected"] == 0
    run(capsys, "predict", samples, out, "--out", more)
    assert (np.load(more) == expected.labels_).all()
    _, told = run(capsys, "predict", samples, out, "--out", more, code=2)
    assert "--force" in told


def test_tensor_of_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "out.npy"
    rows = torch.from_numpy(ROWS)
    save_file({"a": rows.bfloat16(), "b": rows}, path)
    _, told = run(capsys, "fit", path, "--clusters", 3, "--out", out, code=2)
    assert "holds several tensors; name one with --tensor" in told
    _, told = run(capsys, "fit", path, "--clusters", 3, "--out", out, "--tensor", "c", code=2)
    assert 'has no tensor "c"' in told
    assert not out.exists()
    run(capsys, "fit", path, "--clusters", 3, "--out", out, "--tensor", "a")
    assert np.load(out).dtype == np.float32


def test_wrong_arguments_are_one_line(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = samples.parent / "out.npy"
    for arguments, expected in (
        (["--clusters", 401], "n_samples=400 should be >= n_clusters=401"),
        (["--clusters", 3, "--fault-tolerance", "on"], '"on" is unknown'),
        (["--clusters", 3, "--labels", out], "name two files"),
    ):
        _, told = run(capsys, "fit", samples, "--out", out, *arguments, code=2)
        assert expected in told
        assert len(told.strip().splitlines()) == 1
        assert not out.exists()
