"""``lowtide quality``: what it prints, and its exit codes."""

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
from lowtide.compression.sz import SzCodec
from lowtide.quality import evaluate, measure, select

runner = CliRunner()


def _run(*arguments: object) -> Result:
    return runner.invoke(app, ["quality", *map(str, arguments)], env={"COLUMNS": "300"})


def _json(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _field() -> np.ndarray:
    axes = np.linspace(0, 6, 60), np.linspace(0, 4, 70)
    return np.add.outer(*map(np.sin, axes)).astype(np.float32)


@pytest.fixture
def field(tmp_path: Path) -> Path:
    np.save(tmp_path / "field.npy", _field())
    return tmp_path / "field.npy"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(
        {"a": torch.randn(50, 60), "b": torch.randn(40, 40).bfloat16(), "n": torch.arange(9)},
        tmp_path / "model.safetensors",
    )
    return tmp_path / "model.safetensors"


def test_evaluate_says_what_the_library_says(tmp_path: Path, field: Path) -> None:
    x = _field()
    y = x + np.float32(0.01) * np.cos(np.arange(70, dtype=np.float32))
    np.save(tmp_path / "other.npy", y)
    found = _json("evaluate", field, tmp_path / "other.npy", "--metric", "psnr_db",
                  "--metric", "error_autocorr:3")  # fmt: skip
    expected = evaluate(x, y, ["psnr_db", "error_autocorr:3"]).as_dict()
    assert found == {"tensors": {"field": expected}}
    header, row = _run("evaluate", field, field, "--metric", "psnr_db").stdout.splitlines()
    assert header.split()[:3] == ["tensor", "psnr_db", "exact"]
    assert row.split()[:3] == ["field", "inf", "yes"]


def test_measure_reads_every_tensor_and_sums_the_bytes(model: Path) -> None:
    found = _json("measure", model, "--mode", "rel", "--bound", 1e-2, "--tensor", "a",
                  "--tensor", "b")  # fmt: skip
    reports = [found["tensors"][name] for name in ("a", "b")]
    assert [report["is_within_bound"] for report in reports] == [True, True]
    raw, stored = (sum(r[key] for r in reports) for key in ("raw_bytes", "stream_bytes"))
    assert raw == 12000 + 3200
    assert found["compression_ratio"] == raw / stored
    torch.manual_seed(0)
    codec = {"id": "lowtide.sz", "mode": "rel", "bound": 1e-2}
    expected = measure(torch.randn(50, 60), codec)
    assert reports[0]["metrics"] == expected.as_dict()["metrics"]
    shown = _run("measure", model, "--codec", "lowtide.zstd").stdout
    assert [line.split()[0] for line in shown.splitlines()] == ["tensor", "a", "b", "n", "ratio"]


def test_a_broken_bound_is_exit_code_1(field: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = SzCodec._decode

    def off(self: SzCodec, header: Any, payload: Any) -> Any:
        return decode(self, header, payload) + np.float32(0.011)

    monkeypatch.setattr(SzCodec, "_decode", off)
    found = _json("measure", field, "--bound", 0.005, exit_code=1)
    assert found["broken_bounds"] == ["field"]
    assert "bound broken in" in _run("measure", field, "--bound", 0.005).stderr


def test_select_says_what_the_library_says(field: Path) -> None:
    found = _json("select", field, "--target", "psnr_db=60", "--target", "ssim=0.99")
    expected = select(_field(), {"psnr_db": 60, "ssim": 0.99})
    one = found["tensors"]["field"]
    assert one["codec"] == expected.candidate.config()
    assert found["compression_ratio"] == one["compression_ratio"] == expected.ratio
    assert one["measured"]["metrics"]["psnr_db"] >= 60
    listed = json.dumps([{"codec": "lowtide.sz", "mode": "abs", "bounds": [0.01, 0.1]}])
    found = _json("select", field, "--target", "max_abs_error=0.05", "--candidates", listed,
                  "--predictor", "closed_form")["tensors"]["field"]  # fmt: skip
    assert found["codec"] == {"id": "lowtide.sz", "mode": "abs", "bound": 0.01}
    assert found["decision"] == "predicted"
    found = _json("select", field, "--target", "compression_ratio=10", "--objective", "psnr_db")
    assert found["compression_ratio"] >= 10


def test_select_shows_people_what_it_chose(model: Path) -> None:
    header, a, b, n, last = _run("select", model, "--target", "psnr_db=50").stdout.splitlines()
    assert header.split()[:4] == ["tensor", "from", "codec", "ratio"]
    assert "lowtide.sz rel" in a
    assert "searched" in b
    assert "none" in n
    assert last.startswith("ratio of all: ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["measure", "gone.npy", "--bound", "1"], "gone.npy: cannot be read"),
        (["measure", "FIELD"], "bound is missing"),
        (["measure", "FIELD", "--codec", "{"], "is not JSON"),
        (["measure", "FIELD", "--bound", "1", "--metric", "psn"], "unknown metric"),
        (["measure", "FIELD", "--bound", "1", "--tensor", "x"], 'has no tensor "x"'),
        (["measure", "MODEL", "--bound", "1"], "tensor n: codec"),
        (["measure", "damaged.safetensors", "--bound", "1"], "as a .safetensors file"),
        (["evaluate", "FIELD", "MODEL"], "has no tensor field"),
        (["evaluate", "MODEL", "FIELD"], "has no tensor a"),
        (["evaluate", "FIELD", "small.npy"], "reconstructed (3,)"),
        (["select", "FIELD", "--target", "psnr_db"], "allowed is METRIC=VALUE"),
        (["select", "FIELD", "--target", "psnr=60"], 'Did you mean "psnr_db"'),
        (["select", "FIELD", "--target", "ssim=2"], "which is 1 at most"),
        (["select", "FIELD", "--target", "ssim=.9", "--candidates", "{"], "--candidates: {"),
        (["select", "FIELD", "--target", "ssim=.9", "--predictor", "x"], "unknown predictor"),
    ],
)
def test_wrong_arguments_are_exit_code_2(
    tmp_path: Path, field: Path, model: Path, arguments: list[str], text: str
) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing of that kind")
    np.save(tmp_path / "small.npy", np.zeros(3))
    places = {"FIELD": field, "MODEL": model}
    given = [places.get(a, tmp_path / a if a.endswith(("npy", "tensors")) else a)
             for a in arguments]  # fmt: skip
    result = _run(*given)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert text in result.stderr


CANDIDATES = json.dumps(
    [{"codec": {"id": "lowtide.sz", "predictor": "differences"}, "mode": "rel",
      "bounds": [1e-2, 1e-3, 1e-4]}]
)  # fmt: skip


def test_fit_predict_and_select_hang_together(tmp_path: Path) -> None:
    files = []
    for step in range(13):
        values = _field() * (1 + step) + np.random.default_rng(step).normal(0, 1e-2, (60, 70))
        tensors = {"field": torch.from_numpy(values.astype(np.float32)), "flat": torch.ones(9)}
        files.append(tmp_path / f"{step}.safetensors")
        save_file(tensors, files[-1])
    model = tmp_path / "model.safetensors"
    found = _json("fit", *files[:-1], "--output", model, "--candidates", CANDIDATES)
    assert (found["samples"], found["labels"]) == (12, 36)
    assert len(found["skipped"]) == 12
    assert "measure this" in next(iter(found["skipped"].values()))
    shown = _run("fit", *files[:-1], "--output", model, "--candidates", CANDIDATES)
    assert "learned from 12 tensors, 36 measurements" in shown.stdout
    assert "left out" in shown.stderr

    only = ("--tensor", "field")
    answer = _json("predict", files[-1], "--model", model, "--candidates", CANDIDATES, *only)
    estimates = answer["tensors"]["field"]
    assert [each["codec"]["bound"] for each in estimates] == [1e-4, 1e-3, 1e-2]
    for each in estimates:
        with_file = measure(values.astype(np.float32), each["codec"])
        assert each["metrics"]["psnr_db"]["value"] == pytest.approx(
            with_file.value("psnr_db"), abs=2
        )
    assert "psnr_db" in _run("predict", files[-1], "--model", model, *only).stdout

    options = ("--target", "psnr_db=50", "--candidates", CANDIDATES, *only)
    chosen = _json("select", files[-1], "--predictor", model, *options)["tensors"]["field"]
    assert chosen["decision"] == "predicted"
    assert chosen["predicted"]["source"] == "surrogate"
    assert chosen["measured"]["metrics"]["psnr_db"] >= 50


def test_predict_names_the_file_that_is_no_surrogate(field: Path) -> None:
    result = _run("predict", field, "--model", field)
    assert result.exit_code != 0
    assert "is no safetensors file" in str(result.exception) + result.output
