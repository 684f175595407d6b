"""`lowtide eval`: from items to a table, in the words of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowtide.cli import app
from tests.evaluation.rows import LONG, MCQ, OPEN, changed, mcq_rows, write

runner = CliRunner()
MODEL = "python:tests.evaluation.fakes:cli_model"
OTHER = "python:tests.evaluation.fakes:cli_other_model"


def call(*arguments: Any, code: int = 0) -> str:
    result = runner.invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    write(tmp_path / "mcq.jsonl", *mcq_rows(8))
    write(tmp_path / "open.jsonl", *[{**OPEN, "id": f"o{n}"} for n in range(6)])
    write(tmp_path / "long.jsonl", *[{**LONG, "id": f"l{n}"} for n in range(6)])
    tasks = [
        {"name": name, "kind": kind, "file": f"{name}.jsonl"}
        for name, kind in (("mcq", "mcq"), ("open", "open"), ("long", "longctx"))
    ]
    path = tmp_path / "suite.json"
    path.write_text(json.dumps({"format": 1, "tasks": tasks}))
    return path


def test_a_suite_is_run_reported_and_compared(suite: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert "20 rows added" in call("run", suite, "--model", MODEL, "--out", first)
    again = json.loads(call("run", suite, "--model", MODEL, "--out", first, "--json"))
    assert again == {"rows": str(first), "done": 0, "kept": 20, "failed": 0}
    call("run", suite, "--model", OTHER, "--out", second, "--items-at-once", 4)
    text = call("report", first, "--resamples", 200)
    assert "few clusters" in text
    assert "scripted" in text
    found = json.loads(call("report", first, second, "--resamples", 200, "--json"))
    values = {(f["model"], f["task"], f["metric"]): f for f in found["figures"]}
    assert values["scripted", "open", "correct"]["estimate"] == 1.0
    assert values["scripted", "open", "correct"]["method"] == "wilson"
    assert values["other", "open", "correct"]["estimate"] == 0.0
    assert values["scripted", "long", "f1"]["estimate"] == 1.0
    assert {each["task"] for each in found["summaries"]} == {"mcq", "long"}
    differences = json.loads(call("compare", first, second, "--resamples", 500, "--json"))
    by_task = {each["task"]: each for each in differences["differences"]}
    assert set(by_task) == {"mcq", "open", "long"}
    assert by_task["open"]["difference"] == -1.0
    assert by_task["open"]["p_value"] == pytest.approx(2 / 2**6)
    assert by_task["open"]["p_corrected"] == pytest.approx(3 * 2 / 2**6)
    assert by_task["open"]["mcnemar_p"] == pytest.approx(2 / 2**6)
    assert "p (Holm)" in call("compare", first, second, "--resamples", 200)


def test_tasks_items_and_seeds_are_chosen(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    call(
        "run", suite, "--model", MODEL, "--out", out, "--task", "open", "--max-items", 2,
        "--seed", 1, "--seed", 2,
    )  # fmt: skip
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["task"], row["item"], row["seed"]) for row in rows] == [
        ("open", "o0", 1), ("open", "o3", 1), ("open", "o0", 2), ("open", "o3", 2),
    ]  # fmt: skip


def test_rows_are_written_for_other_tools(suite: Path, tmp_path: Path) -> None:
    from lowtide.evaluation import read_rows
    from lowtide.evaluation.exports import from_inspect, from_lm_eval

    out, results, logs = tmp_path / "a.jsonl", tmp_path / "results.json", tmp_path / "logs"
    call("run", suite, "--model", MODEL, "--out", out)
    report = ["report", out, "--resamples", 200, "--export"]
    assert str(results) in call(*report, "lm-eval", "--out", results)
    assert from_lm_eval(json.loads(results.read_text())) == read_rows(out)
    call(*report, "inspect", "--out", logs)
    assert sorted(path.name for path in logs.iterdir()) == ["long.json", "mcq.json", "open.json"]
    assert len(from_inspect(json.loads((logs / "mcq.json").read_text()))) == 8
    assert "pass --force" in call(*report, "lm-eval", "--out", results, code=2)
    call(*report, "lm-eval", "--out", results, "--force")
    assert "give both" in call("report", out, "--export", "inspect", code=2)


def test_items_are_validated(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", MCQ, LONG)
    assert "2 items of longctx/1, mcq/1" in call("validate", good)
    bad = write(tmp_path / "bad.jsonl", MCQ, changed(MCQ, "answer", value=9), {**MCQ, "id": "m2"})
    text = call("validate", good, bad, code=1)
    assert 'bad.jsonl:2: "answer": 9, allowed is 0 to 3' in text
    assert "duplicate: 2 items ask the same" in text
    found = json.loads(call("validate", bad, "--json", code=1))["files"][0]
    assert found["items"] == 2
    assert found["problems"][0]["line"] == 2
    assert found["findings"][0]["items"] == ["m1", "m2"]


def test_what_cannot_be_done_is_one_line(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    assert "allowed is hf:" in call("run", suite, "--model", "x", "--out", out, code=2)
    none = tmp_path / "none.json"
    assert "cannot be read" in call("run", none, "--model", MODEL, "--out", out, code=2)
    assert "cannot be read" in call("report", tmp_path / "none.jsonl", code=2)
    assert 'Did you mean "open"' in call(
        "run", suite, "--model", MODEL, "--out", out, "--task", "opne", code=2
    )
    assert "cannot be read" in call("validate", tmp_path / "none.jsonl", code=2)


def test_failed_rows_are_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one line\n")
    tasks = [{"name": "t", "kind": "loss", "file": "t.txt", "units": "text"}]
    (tmp_path / "suite.json").write_text(json.dumps({"format": 1, "tasks": tasks}))
    model = "python:tests.evaluation.fakes:cli_broken_model"
    out = tmp_path / "a.jsonl"
    text = call("run", tmp_path / "suite.json", "--model", model, "--out", out, code=1)
    assert "1 failed" in text
