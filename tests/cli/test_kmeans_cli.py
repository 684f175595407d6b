"""``lowtide kmeans fit`` and ``predict``: what they write, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from lowtide.cli import app
from lowtide.kmeans import KMeans
from tests.kmeans.points import chosen, points, wrong_products

runner = CliRunner()


def _run(*arguments: object) -> Result:
    return runner.invoke(app, ["kmeans", *map(str, arguments)], env={"COLUMNS": "200"})


def _json(*arguments: object) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def samples(tmp_path: Path) -> Any:
    values = points(400, 3, dtype=np.float32)
    np.save(tmp_path / "x.npy", values)
    return values


def test_centroids_and_labels_are_the_estimators(tmp_path: Path, samples: Any) -> None:
    out, labels, again = (tmp_path / f"{name}.npy" for name in ("c", "labels", "again"))
    source = tmp_path / "x.npy"
    found = _json(
        "fit", source, "--clusters", 6, "--out", out, "--labels", labels, "--seed", 3,
        "--fault-tolerance", "correct", "--tol", 0,
    )  # fmt: skip
    model = KMeans(6, random_state=3, tol=0).fit(samples)
    np.testing.assert_array_equal(np.load(out), model.cluster_centers_)
    np.testing.assert_array_equal(np.load(labels), model.labels_)
    assert found["iterations"] == model.n_iter_
    assert found["inertia"] == pytest.approx(model.inertia_)
    assert (found["shape"], found["dtype"], found["clusters"]) == ([400, 3], "float32", 6)
    sizes = np.bincount(model.labels_)
    assert (found["smallest"], found["largest"]) == (sizes.min(), sizes.max())
    assert found["faults"]["checks"] > 400
    assert found["faults"]["detected"] == 0
    told = _json("predict", source, out, "--out", again)
    np.testing.assert_array_equal(np.load(again), np.load(labels))
    assert (told["smallest"], told["largest"]) == (sizes.min(), sizes.max())


def test_starts_are_read_from_a_file(tmp_path: Path, samples: Any) -> None:
    start = chosen(samples, 4)
    np.save(tmp_path / "start.npy", start)
    options = ["--clusters", 4, "--init", tmp_path / "start.npy", "--max-iter", 1]
    found = _json("fit", tmp_path / "x.npy", "--out", tmp_path / "c.npy", *options)
    assert found["iterations"] == 1
    model = KMeans(4, init=start, max_iter=1).fit(samples)
    np.testing.assert_array_equal(np.load(tmp_path / "c.npy"), model.cluster_centers_)


def test_safetensors_are_read_by_name(tmp_path: Path, samples: Any) -> None:
    tensors = {"a.weight": torch.from_numpy(samples).bfloat16(), "b": torch.zeros(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    out = tmp_path / "c.npy"
    arguments = ["fit", tmp_path / "x.safetensors", "--clusters", 3, "--out", out]
    assert _json(*arguments, "--tensor", "a.weight")["shape"] == [400, 3]
    assert np.load(out).dtype == np.float32
    for tensor, text in ((None, "holds several tensors"), ("c", 'has no tensor "c"')):
        more = [] if tensor is None else ["--tensor", tensor]
        result = _run(*arguments, "--force", *more)
        assert result.exit_code == 2
        assert text in result.output
        assert '"b"' in result.output
    save_file({"only": tensors["a.weight"]}, tmp_path / "y.safetensors")
    arguments[1] = tmp_path / "y.safetensors"
    assert _json(*arguments, "--force")["clusters"] == 3


def test_the_table_says_what_was_done(tmp_path: Path, samples: Any) -> None:
    result = _run("fit", tmp_path / "x.npy", "--clusters", 5, "--out", tmp_path / "c.npy")
    assert result.exit_code == 0, result.output
    assert "400 x 3" in result.output
    assert "not looked for" in result.output
    result = _run("predict", tmp_path / "x.npy", tmp_path / "c.npy", "--out", tmp_path / "l.npy")
    assert "400 x 3" in result.output


def test_iterations_are_shown_on_a_terminal(
    tmp_path: Path, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    seen: list[str] = []
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: seen.append(text))
    found = _run("fit", tmp_path / "x.npy", "--clusters", 5, "--out", tmp_path / "c.npy")
    assert found.exit_code == 0
    assert seen[0].startswith("run 0, iteration 0: inertia ")


def test_nothing_is_written_when_errors_remain(
    tmp_path: Path, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "c.npy", chosen(samples, 5))

    def change(found: torch.Tensor, number: int) -> None:
        found[3, 2] += 1e5

    wrong_products(monkeypatch, change)
    options = ["--fault-tolerance", "detect", "--backend", "torch"]
    out = tmp_path / "new.npy"
    for arguments in (
        ["fit", tmp_path / "x.npy", "--clusters", 5],
        ["predict", tmp_path / "x.npy", tmp_path / "c.npy"],
    ):
        result = _run(*arguments, "--out", out, *options)
        assert result.exit_code == 1
        assert "silent errors were found" in result.output
        assert f"{out} is not written" in result.output.replace("\n", "")
        assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--clusters", "9999"], "n_samples=400 should be >= n_clusters=9999"),
        (["--clusters", "3", "--init", "kmeans++"], 'init: "kmeans++" is unknown'),
        (["--clusters", "3", "--fault-tolerance", "on"], 'mode "on" is unknown'),
        (["--clusters", "3", "--backend", "cuda"], 'backend: "cuda" is unknown'),
        (["--clusters", "3", "--tensor", "y"], 'has no tensor "y"'),
        (["--clusters", "3", "--labels", "OUT"], "name two files"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    arguments: list[str], text: str, tmp_path: Path, samples: Any
) -> None:
    out = tmp_path / "c.npy"
    words = [str(out) if word == "OUT" else word for word in arguments]
    result = _run("fit", tmp_path / "x.npy", "--out", out, *words)
    assert result.exit_code == 2
    assert text in result.output
    assert not out.exists()


def test_files_are_replaced_only_when_told(tmp_path: Path, samples: Any) -> None:
    arguments = ["fit", tmp_path / "x.npy", "--clusters", 3, "--out", tmp_path / "c.npy"]
    assert _run(*arguments).exit_code == 0
    result = _run(*arguments)
    assert (result.exit_code, "pass --force" in result.output) == (2, True)
    assert _run(*arguments, "--force").exit_code == 0
