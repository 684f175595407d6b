"""Runs go on where they stopped, tables say what rows say, and other tools' files lose nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide.core.errors import ConfigError, DataError
from lowtide.evaluation import RowFile, compare, figures, load_suite, read_rows, run
from lowtide.evaluation.aggregate import summaries
from lowtide.evaluation.exports import from_inspect, from_lm_eval, to_inspect, to_lm_eval
from lowtide.evaluation.models.scripted import ScriptedModel
from lowtide.evaluation.suite.losses import LossTask
from lowtide.evaluation.suite.task import task_kinds
from tests.evaluation.fakes import Bigram, byte_model, knowing
from tests.evaluation.rows import LONG, OPEN, UNIT_TEST, changed, mcq_rows, write


def suite_of(folder: Path, *tasks: dict[str, Any]) -> Any:
    path = folder / "suite.json"
    path.write_text(json.dumps({"format": 1, "tasks": list(tasks)}))
    return load_suite(path)


def mcq(folder: Path, count: int = 12, **settings: Any) -> Any:
    write(folder / "mcq.jsonl", *mcq_rows(count))
    return suite_of(folder, {"name": "facts", "kind": "mcq", "file": "mcq.jsonl", **settings})


def right_options(count: int) -> dict[str, Any]:
    return {row["question"]: row["choices"][row["answer"]] for row in mcq_rows(count)}


def test_a_model_that_knows_half_gets_half_and_chance(tmp_path: Path) -> None:
    suite = mcq(tmp_path, 40)
    known = dict(list(right_options(40).items())[:20])
    with RowFile(tmp_path / "rows.jsonl") as rows:
        summary = run(suite, knowing(known), rows)
    assert (summary.done, summary.kept, summary.failed) == (40, 0, 0)
    found = read_rows(tmp_path / "rows.jsonl")
    half = [row.scores["accuracy"] for row in found]
    assert half[:20] == [1.0] * 20
    table = {each.metric: each for each in figures(found, resamples=500)}
    assert next(iter(table)) == "accuracy"
    assert table["accuracy"].interval.n_clusters == 20
    assert table["accuracy"].interval.n_items == 40
    assert table["accuracy"].interval.method == "bca"
    # 0.7 for what it knows and 1/4 for the rest: the softmax of these log-probabilities is exact.
    confidence = table["confidence"].interval.estimate
    assert confidence == pytest.approx((0.7 + 0.25) / 2)
    brier = (0.3**2 + 3 * 0.1**2 + 0.75**2 + 3 * 0.25**2) / 2
    assert table["brier"].interval.estimate == pytest.approx(brier)
    assert not table["brier"].is_higher_better
    said = summaries(found)[0]
    assert sum(each["count"] for each in said["reliability"]) == 40
    # Each right option stood once at each position; by a tie the first position is taken.
    bias = said["position_bias"]
    assert bias["shown"] == [160] * 4
    assert bias["chosen"] == [20 + 80, 20, 20, 20]
    assert bias["consistency"] == 0.5


def test_text_of_options_is_scored_where_none_are_listed(tmp_path: Path) -> None:
    def score(context: str, text: str) -> float:
        return -len(text) if context.startswith("Question") else -2.0 * len(text)

    rows = [{"schema": "mcq/1", "id": "a", "question": "q", "choices": ["x", "yyy"], "answer": 1}]
    write(tmp_path / "mcq.jsonl", *rows)
    entry = {"name": "t", "kind": "mcq", "file": "mcq.jsonl", "style": "text"}
    for scoring, is_right in (("sum", 0.0), ("unconditional", 1.0)):
        suite = suite_of(tmp_path, {**entry, "scoring": scoring})
        with RowFile(tmp_path / f"{scoring}.jsonl") as file:
            run(suite, ScriptedModel(score=score), file)
        row = read_rows(tmp_path / f"{scoring}.jsonl")[0]
        assert row.scores["accuracy"] == is_right
        assert row.scores["accuracy_sum"] == 0.0
        assert row.scores["accuracy_unconditional"] == 1.0
        assert row.detail["positions"] == []
    assert "position_bias" not in summaries([row])[0]


def test_open_answers_are_graded_as_each_item_says(tmp_path: Path) -> None:
    items = [
        OPEN, UNIT_TEST, {**UNIT_TEST, "id": "o3", "step": 2},
        {"schema": "open/1", "id": "e", "prompt": "capital?", "references": ["Paris"],
         "grader": {"type": "exact"}},
        {"schema": "open/1", "id": "r", "prompt": "pattern?", "references": ["7"],
         "grader": {"type": "regex", "pattern": "is (\\d)"}},
        {"schema": "open/1", "id": "s", "prompt": "metals?", "references": ["iron", "gold"],
         "grader": {"type": "set_f1"}},
        {"schema": "open/1", "id": "l", "prompt": "rouge?", "references": ["a b c d"],
         "grader": {"type": "rouge_l"}},
        {"schema": "open/1", "id": "h", "prompt": "essay?", "grader": {"type": "rubric"},
         "rubric": [{"criterion": "style", "levels": ["bad", "good"]}]},
        {"schema": "open/1", "id": "n", "prompt": "undefined?",
         "grader": {"type": "numeric", "value": "nan", "nan": "equal"}},
    ]  # fmt: skip
    answers = {
        OPEN["prompt"]: "It gets 0.2998 km.", UNIT_TEST["prompt"]: "```python\ndef add(a, b):\n"
        "    return a + b\n```", "capital?": "paris.", "pattern?": "is 6, no: is 7",
        "metals?": "iron, tin", "rouge?": "a b x", "essay?": "...", "undefined?": "NaN",
    }  # fmt: skip
    write(tmp_path / "open.jsonl", *items)
    suite = suite_of(tmp_path, {"name": "open", "kind": "open", "file": "open.jsonl"})
    with RowFile(tmp_path / "rows.jsonl") as file:
        run(suite, ScriptedModel(answers), file)
    rows = {row.item: row for row in read_rows(tmp_path / "rows.jsonl")}
    correct = {name: row.scores.get("correct") for name, row in rows.items()}
    assert correct == {
        "o1": 1.0, "o2": 1.0, "o3": 1.0, "e": 1.0, "r": 1.0, "s": None, "l": None, "h": None,
        "n": 1.0,
    }  # fmt: skip
    assert rows["s"].scores["precision"] == rows["s"].scores["recall"] == 0.5
    assert rows["l"].scores["recall"] == 0.5
    assert rows["l"].scores["precision"] == pytest.approx(2 / 3)
    said = summaries(list(rows.values()))[0]
    assert said["problems"] == {"count": 1, "solved": 1}
    assert said["answers_to_rate"] == 1
    assert rows["o2"].cluster == rows["o3"].cluster == "p"


def test_long_contexts_report_precision_recall_and_both_f1(tmp_path: Path) -> None:
    many = changed(LONG, "answers", value=["2", "{3}"])
    items = [
        changed(LONG, "id", value="any"),
        {
            **many,
            "id": "set",
            "scoring": "set",
            "needle_positions": [0.1, 0.9],
            "length_tokens": 99,
        },
    ]
    write(tmp_path / "long.jsonl", *items)
    template = "T {context} Q {question} A"
    suite = suite_of(
        tmp_path, {"name": "l", "kind": "longctx", "file": "long.jsonl", "template": template}
    )
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return "2"

    with RowFile(tmp_path / "rows.jsonl") as file:
        run(suite, ScriptedModel(answer), file)
    assert asked[0] == "T a is 1. b is 2. Q What is b? A"
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row.scores["exact"] for row in rows] == [1.0, 0.0]
    table = {each.metric: each.interval.estimate for each in figures(rows, resamples=500)}
    assert next(iter(table)) == "f1"
    assert (table["precision"], table["recall"]) == (1.0, 0.75)
    assert table["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert table["f1_of_means"] == pytest.approx(2 * 0.75 / 1.75)
    said = summaries(rows)[0]
    assert said["f1_by_length_up_to"] == {"128": pytest.approx(2 / 3), "8": 1.0}
    two_thirds = pytest.approx(2 / 3)
    assert said["f1_by_depth_from"] == {"0%": two_thirds, "40%": 1.0, "80%": two_thirds}


@pytest.mark.parametrize(("window", "context"), [(7, 0), (7, 3), (500, 0), (1, 5)])
def test_losses_score_every_byte_but_the_first_once(
    tmp_path: Path, window: int, context: int
) -> None:
    data = b"The quick brown fox jumps over the lazy dog"
    (tmp_path / "text.txt").write_bytes(data)
    entry = {"name": "t", "kind": "loss", "file": "text.txt", "window": window, "context": context}
    module = Bigram()
    with RowFile(tmp_path / "rows.jsonl") as file:
        run(suite_of(tmp_path, entry), byte_model(module), file, items_at_once=3)
    rows = read_rows(tmp_path / "rows.jsonl")
    nll = -sum(module.log_probability(a, b) for a, b in pairwise(data))
    assert sum(row.scores["nll"] for row in rows) == pytest.approx(nll, rel=1e-5)
    assert sum(row.scores["tokens"] for row in rows) == len(data) - 1
    table = {each.metric: each.interval.estimate for each in figures(rows, resamples=200)}
    assert list(table) == ["bits_per_byte", "loss", "perplexity"]
    assert table["bits_per_byte"] == pytest.approx(nll / (len(data) - 1) / math.log(2), rel=1e-5)
    assert table["perplexity"] == pytest.approx(math.exp(nll / (len(data) - 1)), rel=1e-5)


def test_losses_over_tokens_and_over_text(tmp_path: Path) -> None:
    module = Bigram()
    tokens = np.array([3, 1, 4, 1, 5, 9, 2, 6], dtype=np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    (tmp_path / "tokens.bin").write_bytes(tokens.tobytes())
    (tmp_path / "text.txt").write_text("first line é\nsecond line\nthird\n")
    entries = [
        {"name": "npy", "file": "tokens.npy", "units": "tokens"},
        {"name": "raw", "file": "tokens.bin", "units": "tokens", "dtype": "uint16", "window": 3},
        {"name": "text", "file": "text.txt", "units": "text", "window": 10},
    ]
    suite = suite_of(tmp_path, *[{**each, "kind": "loss"} for each in entries])
    with RowFile(tmp_path / "rows.jsonl") as file:
        run(suite, byte_model(module), file)
    table = {
        (each.task, each.metric): each.interval.estimate
        for each in figures(read_rows(tmp_path / "rows.jsonl"), resamples=200)
    }
    nll = -sum(module.log_probability(a, b) for a, b in pairwise(tokens))
    assert table["npy", "loss"] == table["raw", "loss"] == pytest.approx(nll / 7, rel=1e-5)
    assert ("npy", "bits_per_byte") not in table
    assert ("text", "bits_per_byte") in table
    pieces = suite.tasks[2].questions()
    assert [each.content for each in pieces] == ["first line é\n", "second line\n", "third\n"]


@pytest.mark.parametrize(
    ("entry", "content", "said"),
    [
        ({"units": "tokens", "vocabulary": 5}, np.array([1, 9], np.uint16).tobytes(), "0 to 4"),
        ({"units": "tokens"}, b"abc", "no whole number of uint16"),
        ({"units": "bytes"}, b"a", "allowed are 2 or more"),
        ({"units": "text"}, b"\xff\xfe", "not UTF-8"),
        ({"units": "text"}, b" \n", "holds no text"),
    ],
)
def test_files_that_are_no_text_are_refused(
    tmp_path: Path, entry: dict[str, Any], content: bytes, said: str
) -> None:
    (tmp_path / "f").write_bytes(content)
    suite = suite_of(tmp_path, {"name": "t", "kind": "loss", "file": "f", **entry})
    with pytest.raises(DataError, match=said):
        suite.tasks[0].questions()
    bytes_only = suite_of(tmp_path, {"name": "t", "kind": "loss", "file": "suite.json"})
    with RowFile(tmp_path / "r.jsonl") as file, pytest.raises(DataError, match="takes no tokens"):
        run(bytes_only, ScriptedModel(), file)


def test_a_run_goes_on_and_does_nothing_twice(tmp_path: Path) -> None:
    suite = mcq(tmp_path)
    path = tmp_path / "rows.jsonl"
    with RowFile(path) as rows:
        assert run(suite, ScriptedModel(), rows, max_items=5).done == 5
    first = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"schema": "evaluation.row/1", "task": "fac')  # a crash in a write
    with RowFile(path) as rows:
        summary = run(suite, ScriptedModel(), rows, seeds=(0, 1))
    assert (summary.done, summary.kept) == (19, 5)
    assert path.read_bytes().startswith(first)
    found = read_rows(path)
    assert len({row.key for row in found}) == len(found) == 24
    with RowFile(path) as rows:
        assert run(suite, ScriptedModel(), rows, seeds=(0, 1)).done == 0
        assert run(suite, ScriptedModel(name="other"), rows, seeds=(0,)).done == 12
    harder = mcq(tmp_path, style="text")
    with RowFile(path) as rows:
        assert run(harder, ScriptedModel(), rows).done == 12
    write(tmp_path / "mcq.jsonl", *[{**row, "domain": "x"} for row in mcq_rows(12)])
    with RowFile(path) as rows:
        assert run(suite, ScriptedModel(), rows).done == 12
    with pytest.raises(DataError, match="rows of two settings"):
        figures(read_rows(path))


def test_rows_say_where_they_come_from(tmp_path: Path) -> None:
    suite = mcq(tmp_path)
    with RowFile(tmp_path / "rows.jsonl") as rows:
        run(suite, ScriptedModel(), rows, max_items=3, seeds=(7,))
    row = read_rows(tmp_path / "rows.jsonl")[0]
    assert row.seed == 7
    assert {"python", "lowtide", "numpy", "platform"} <= set(row.provenance)
    assert row.model_hash == ScriptedModel().fingerprint()
    assert row.item_hash == suite.tasks[0].questions()[0].hash
    assert row.time_s > 1.7e9
    assert [r.item for r in read_rows(tmp_path / "rows.jsonl")] == ["q0", "q4", "q8"]


KILLED = """
import os, sys
from pathlib import Path
from lowtide.evaluation import RowFile, load_suite, run
from lowtide.evaluation.models.scripted import ScriptedModel

left = 30
def score(context, text):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    return -1.0

with RowFile(sys.argv[2]) as rows:
    run(load_suite(sys.argv[1]), ScriptedModel(score=score), rows)
"""


def test_a_kill_loses_the_item_under_way_alone(tmp_path: Path) -> None:
    suite = mcq(tmp_path, 12, shuffles=1)  # 8 requests for each item: the 30th is of the fourth
    path = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "suite.json"), str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row.item for row in read_rows(path)] == ["q0", "q1", "q2"]
    with RowFile(path) as rows:
        assert run(suite, ScriptedModel(score=lambda *_: -1.0), rows).kept == 3


def test_two_processes_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with RowFile(path), pytest.raises(DataError, match="another process is writing"):
        RowFile(path)
    with RowFile(path):
        pass
    path.write_text('{"schema": "other"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*allowed is \"evaluation.row/1\""):
        RowFile(path)
    path.write_text('{"schema": "evaluation.row/1", "task": "x"}\n')
    with pytest.raises(DataError, match="not a row"):
        read_rows(path)
    assert len(os.listdir("/proc/self/fd")) < 200


def test_a_diverged_model_gives_failed_rows_and_no_figures(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"hello world")
    module = Bigram()
    module.table.data[ord("o")] = math.nan
    suite = suite_of(tmp_path, {"name": "t", "kind": "loss", "file": "text.txt", "window": 2})
    with RowFile(tmp_path / "rows.jsonl") as file:
        summary = run(suite, byte_model(module), file)
    assert summary.failed == 2
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row.error for row in rows if row.error] == ["nll is nan"] * 2
    table = figures(rows, resamples=200)
    assert table[0].failed == 2
    assert table[0].interval.n_items == 3
    assert summaries(rows)[0]["errors"] == ["nll is nan"]


def two_runs(
    tmp_path: Path, first: int, second: int, count: int = 60
) -> tuple[list[Any], list[Any]]:
    suite = mcq(tmp_path, count)
    known = list(right_options(count).items())
    found = []
    for name, share in (("a", first), ("b", second)):
        with RowFile(tmp_path / f"{name}.jsonl") as rows:
            run(suite, knowing(dict(known[:share]), name=name), rows)
        found.append(read_rows(tmp_path / f"{name}.jsonl"))
    return found[0], found[1]


def test_runs_are_compared_item_by_item(tmp_path: Path) -> None:
    first, second = two_runs(tmp_path, 20, 50)
    (found,) = compare(first, second[:-4], resamples=2000)
    pairs = [
        b.scores["accuracy"] - a.scores["accuracy"]
        for a, b in zip(first[:-4], second[:-4], strict=True)
    ]
    assert found.interval.estimate == pytest.approx(sum(pairs) / 56)
    assert found.interval.low > 0
    assert found.p_value < 0.01
    assert found.p_corrected == found.p_value
    assert found.unpaired == 4
    assert math.isnan(found.mcnemar_p)  # clusters of two
    back = compare(second, first, resamples=2000)[0]
    assert back.interval.estimate == pytest.approx(-compare(first, second)[0].interval.estimate)
    every = compare(first, second, every_metric=True, resamples=2000)
    assert len(every) == 7
    assert [each.p_corrected >= each.p_value for each in every] == [True] * 7
    assert max(e.p_corrected for e in every) > max(e.p_value for e in every) or len(every) == 1
    same = compare(first, first, resamples=200)[0]
    assert same.p_value == 1.0
    assert same.interval.low == same.interval.high == 0.0


def test_items_that_changed_are_no_pairs(tmp_path: Path) -> None:
    first, _ = two_runs(tmp_path, 20, 50, count=12)
    write(tmp_path / "mcq.jsonl", *[{**row, "domain": "x"} for row in mcq_rows(12)])
    with RowFile(tmp_path / "c.jsonl") as rows:
        run(load_suite(tmp_path / "suite.json"), knowing({}, name="c"), rows)
    changed_items = read_rows(tmp_path / "c.jsonl")
    with pytest.raises(DataError, match="no scored item in common"):
        compare(first, changed_items)
    with pytest.raises(DataError, match="rows of 2 models"):
        compare(first + changed_items, first)
    with pytest.raises(DataError, match="there are none"):
        figures([])


def test_seeds_of_an_item_are_one_cluster(tmp_path: Path) -> None:
    suite = mcq(tmp_path)
    with RowFile(tmp_path / "rows.jsonl") as rows:
        run(suite, knowing(right_options(12)), rows, seeds=(0, 1, 2), items_at_once=5)
    table = figures(read_rows(tmp_path / "rows.jsonl"), resamples=200)
    assert table[0].interval.n_items == 36
    assert table[0].interval.n_clusters == 6
    assert table[0].seeds == 3


def test_other_tools_files_lose_no_score(tmp_path: Path) -> None:
    first, _ = two_runs(tmp_path, 3, 9, count=12)
    (tmp_path / "text.txt").write_bytes(b"hello world")
    loss = suite_of(tmp_path, {"name": "t", "kind": "loss", "file": "text.txt", "window": 2})
    with RowFile(tmp_path / "loss.jsonl") as file:
        run(loss, byte_model(Bigram(), name="x", fingerprint=first[0].model_hash), file)
    rows = [*first, *read_rows(tmp_path / "loss.jsonl")]
    results = json.loads(json.dumps(to_lm_eval(rows, resamples=200), allow_nan=False))
    assert from_lm_eval(results) == rows
    assert set(results["results"]) == {"facts", "t"}
    mean = np.mean([row.scores["accuracy"] for row in first])
    assert results["results"]["facts"]["accuracy,none"] == mean
    assert results["n-samples"]["facts"] == {"original": 12, "effective": 12}
    assert results["higher_is_better"]["t"]["bits_per_byte"] is False
    logs = json.loads(json.dumps(to_inspect(rows, resamples=200), allow_nan=False))
    assert [row for log in logs.values() for row in from_inspect(log)] == rows
    sample = logs["facts"]["samples"][0]
    assert sample["scores"]["accuracy"]["value"] == first[0].scores["accuracy"]
    named = {score["name"]: score["metrics"] for score in logs["facts"]["results"]["scores"]}
    assert named["accuracy"]["value"]["value"] == mean
    for bad, reader in (
        ({}, from_lm_eval), ({"samples": {"t": [{}]}}, from_lm_eval), ({}, from_inspect),
        ({"samples": [{"metadata": {}}]}, from_inspect),
    ):  # fmt: skip
        with pytest.raises(DataError, match="samples"):
            reader(bad)  # type: ignore[operator]
    with pytest.raises(DataError, match="of 2 models"):
        to_lm_eval([*first, *read_rows(tmp_path / "b.jsonl")])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"format": 2, "tasks": []}, r"suite.json.format: got 2"),
        ({"format": 1, "tasks": []}, "one or more tasks"),
        ({"format": 1, "task": []}, "suite.json.task: unknown key"),
        ({"format": 1, "tasks": [{"kind": "mcq"}]}, r"tasks\[0\].name: missing"),
        ({"format": 1, "tasks": [{"kind": "mqc"}]}, 'Did you mean "mcq"'),
        ({"format": 1, "tasks": [3]}, r'an object with "name", "kind" and "file"'),
        (
            {"format": 1, "tasks": [{"name": "a", "kind": "mcq", "file": "f", "shuffle": 1}]},
            'Did you mean "shuffles"',
        ),
        (
            {"format": 1, "tasks": [{"name": "a b", "kind": "mcq", "file": "f"}]},
            r"tasks\[0\].name: got \"a b\"",
        ),
        (
            {"format": 1, "tasks": [{"name": "a", "kind": "mcq", "file": "f"}] * 2},
            "names are unique",
        ),
        (
            {"format": 1, "tasks": [{"name": "a", "kind": "loss", "file": "f", "units": "text",
                                     "context": 3}]},
            "drop it",
        ),
    ],
)  # fmt: skip
def test_suites_that_cannot_be_used_are_refused(
    tmp_path: Path, content: dict[str, Any], said: str
) -> None:
    (tmp_path / "suite.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        load_suite(tmp_path / "suite.json")


def test_suites_are_json_and_tasks_are_chosen_by_name(tmp_path: Path) -> None:
    suite = mcq(tmp_path)
    assert [task.name for task in suite.only(["facts"]).tasks] == ["facts"]
    with pytest.raises(ConfigError, match='Did you mean "facts"'):
        suite.only(["fact"])
    with pytest.raises(ConfigError, match="use JSON"):
        load_suite(tmp_path / "suite.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_suite(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_suite(tmp_path / "bad.json")
    assert task_kinds.get("loss") is LossTask
    with RowFile(tmp_path / "r.jsonl") as rows, pytest.raises(DataError, match="different seeds"):
        run(suite, ScriptedModel(), rows, seeds=(1, 1))
    with RowFile(tmp_path / "r.jsonl") as rows, pytest.raises(DataError, match="max_items"):
        run(suite, ScriptedModel(), rows, max_items=0)
