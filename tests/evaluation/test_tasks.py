"""Rows of items: right ones are read, every wrong one is named by line and field."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from lowtide.core.errors import DataError, UnknownNameError
from lowtide.evaluation.tasks.items import Item, canonical_hash, canonical_json, schemas
from lowtide.evaluation.tasks.mcq_checks import check_set
from lowtide.evaluation.tasks.reading import check_file, read_items
from tests.evaluation.rows import LONG, MCQ, OPEN, UNIT_TEST, changed, mcq_rows, write

DROP: Any = object()


def test_right_rows_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", MCQ, "", OPEN, UNIT_TEST, LONG)
    items = read_items(path)
    assert [each.id for each in items] == ["m1", "o1", "o2", "l1"]
    assert [each.cluster_label() for each in items] == ["10.1/x", "o1", "p", "l1"]
    assert schemas.names() == ["longctx/1", "mcq/1", "open/1"]


WRONG: list[tuple[dict[str, Any], tuple[Any, ...], Any, str, str]] = [
    (MCQ, ("id",), "", "id", "at least 1 character"),
    (MCQ, ("id",), DROP, "id", "is missing"),
    (MCQ, ("id",), 3, "id", "got 3, allowed is a valid string"),
    (MCQ, ("schema",), "mcq/2", "schema", 'Did you mean "mcq/1"'),
    (MCQ, ("schema",), DROP, "schema", 'allowed is "longctx/1", "mcq/1", "open/1"'),
    (MCQ, ("schema",), 1, "schema", "got 1"),
    (MCQ, ("question",), "", "question", "at least 1 character"),
    (MCQ, ("question",), None, "question", "got null"),
    (MCQ, ("choices",), ["one"], "choices", "at least 2 items"),
    (MCQ, ("choices",), "iron", "choices", "valid array"),
    (MCQ, ("choices", 2), 7, "choices[2]", "got 7, allowed is a valid string"),
    (MCQ, ("choices", 2), " ", "", '"choices"[2]: is blank'),
    (MCQ, ("choices", 2), "iron", "", "two options are the same"),
    (MCQ, ("answer",), 4, "", '"answer": 4, allowed is 0 to 3'),
    (MCQ, ("answer",), -1, "answer", "greater than or equal to 0"),
    (MCQ, ("answer",), "B", "answer", 'got "B", allowed is a valid integer'),
    (MCQ, ("answer",), 1.5, "answer", "valid integer"),
    (MCQ, ("answer",), True, "answer", "valid integer"),
    (MCQ, ("difficulty",), "odd", "difficulty", "'easy', 'medium' or 'hard'"),
    (MCQ, ("anwser",), 1, "anwser", 'Did you mean "answer"'),
    (MCQ, ("source", "dio"), "x", "source.dio", 'Did you mean "doi"'),
    (MCQ, ("source",), "10.1/x", "source", "got"),
    (MCQ, ("review", 0, "accept"), DROP, "review[0].accept", "is missing"),
    (MCQ, ("review", 0, "question_relevance"), 6, "review[0].question_relevance", "equal to 5"),
    (MCQ, ("generator", "score"), 11, "generator.score", "equal to 10"),
    (OPEN, ("prompt",), DROP, "prompt", "is missing"),
    (OPEN, ("grader",), DROP, "grader", "is missing"),
    (OPEN, ("grader", "type"), "guess", "grader.type", "'exact'"),
    (OPEN, ("grader", "type"), DROP, "grader.type", "unable to extract tag"),
    (OPEN, ("grader", "value"), "x", "grader.value", 'got "x", allowed is a valid number'),
    (OPEN, ("grader", "rtol"), -1.0, "grader.rtol", "greater than or equal to 0"),
    (OPEN, ("grader", "tol"), 1.0, "grader.tol", 'Did you mean "rtol"'),
    (OPEN, ("grader", "unit"), "furlong", "grader", "not known"),
    (OPEN, ("grader", "nan"), "ok", "grader.nan", "'wrong' or 'equal'"),
    (OPEN, ("grader",), {"type": "regex", "pattern": "("}, "grader", "no regular expression"),
    (OPEN, ("grader",), {"type": "regex"}, "grader.pattern", "is missing"),
    (OPEN, ("grader",), {"type": "exact"}, "", '"references": is empty'),
    (OPEN, ("grader",), {"type": "rubric"}, "", '"rubric": is empty'),
    (OPEN, ("step",), 2, "", '"step": needs "parent"'),
    (OPEN, ("rubric",), [{"criterion": "x", "levels": ["a"]}], "rubric[0].levels", "at least 2"),
    (UNIT_TEST, ("grader", "functions"), [], "grader.functions", "at least 1 item"),
    (UNIT_TEST, ("grader", "functions"), ["a b"], "grader", "no name of a function"),
    (UNIT_TEST, ("grader", "tests"), "assert (", "grader", "was never closed"),
    (UNIT_TEST, ("grader", "memory_bytes"), 10, "grader.memory_bytes", "67108864"),
    (UNIT_TEST, ("step",), -1, "step", "equal to 0"),
    (LONG, ("answers",), [], "answers", "at least 1 item"),
    (LONG, ("answers",), [" "], "", '"answers"[0]: is blank'),
    (LONG, ("needle_positions", 0), 1.5, "needle_positions[0]", "less than or equal to 1"),
    (LONG, ("distractors",), -1, "", '"distractors": -1'),
    (LONG, ("distractors",), "x", "distractors", "got"),
    (LONG, ("length_tokens",), 0, "length_tokens", "equal to 1"),
    (LONG, ("scoring",), "all", "scoring", "'any' or 'set'"),
    (LONG, ("context",), "", "context", "at least 1 character"),
    (LONG, ("seed",), 1.0, "seed", "valid integer"),
]


@pytest.mark.parametrize(("row", "path", "value", "field", "reason"), WRONG)
def test_a_wrong_row_is_named_by_line_and_field(
    row: dict[str, Any], path: tuple[Any, ...], value: Any, field: str, reason: str, tmp_path: Path
) -> None:
    wrong = changed(row, *path, drop=value is DROP, value=value)
    good = {**MCQ, "id": "other"}
    file = write(tmp_path / "items.jsonl", good, "", wrong)
    items, problems = check_file(file)
    assert len(items) == 1
    assert problems
    assert all(each.line == 3 for each in problems)
    assert field in [each.field for each in problems]
    assert any(reason in each.reason for each in problems), problems
    with pytest.raises(DataError) as caught:
        read_items(file)
    assert f"{file}:3: " in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "a"', "is not JSON at column"), ("[1]", "allowed is one JSON object per line"),
        ("3", "holds 3"), ('{"id": "a", "id": "b"}', "stands twice"),
        ('{"schema": "mcq/1", "source": {"doi": "x", "doi": "y"}}', "stands twice"),
        ('{"id": NaN}', "holds NaN"), ('{"id": -Infinity}', "holds -Infinity"),
        ("{'id': 1}", "is not JSON"), ('{"id": "\\ud800"}', "UTF-16"), ("[" * 5000, "is not JSON"),
        ('{"a": 1} {"b": 2}', "is not JSON"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_object_is_named(line: str, reason: str, tmp_path: Path) -> None:
    file = write(tmp_path / "items.jsonl", MCQ, line)
    _, problems = check_file(file)
    assert [each.line for each in problems] == [2]
    assert reason in problems[0].reason


def test_files_that_cannot_be_items(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    assert "not UTF-8 at byte 8" in check_file(tmp_path / "latin.jsonl")[1][0].reason
    with pytest.raises(DataError, match="No such file"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no items"):
        read_items(write(tmp_path / "empty.jsonl", ""))
    twice = write(tmp_path / "twice.jsonl", MCQ, OPEN, MCQ)
    assert check_file(twice)[1][0].reason == '"m1" stands in line 1 already'
    mixed = write(tmp_path / "mixed.jsonl", MCQ, OPEN)
    assert 'got "open/1", allowed here is "mcq/1"' in str(check_file(mixed, schema="mcq/1")[1][0])
    many = write(tmp_path / "many.jsonl", *[f"{n}" for n in range(9)])
    with pytest.raises(DataError, match="and 4 more problems"):
        read_items(many)
    with pytest.raises(UnknownNameError):
        schemas.get("mcq/9")


@settings(max_examples=150, deadline=None)
@given(
    some.sampled_from([MCQ, OPEN, UNIT_TEST, LONG]),
    some.recursive(
        some.none() | some.booleans() | some.integers() | some.text(max_size=3),
        lambda inner: (
            some.lists(inner, max_size=2) | some.dictionaries(some.text(), inner, max_size=2)
        ),
        max_leaves=4,
    ),
    some.data(),
)
def test_no_row_raises_anything_but_problems(row: Any, value: Any, data: Any) -> None:
    from lowtide.evaluation.tasks.reading import _parse_row, _RowError

    key = data.draw(some.sampled_from(sorted(row)))
    line = json.dumps({**row, key: value})
    reasons: list[str] = []
    with contextlib.suppress(_RowError):
        try:
            assert isinstance(_parse_row(line), Item)
        except _RowError as error:
            reasons = [reason for _, reason in error.pairs] or [""]
            raise
    assert all(reasons)


def test_hashes_depend_on_what_is_said_alone(tmp_path: Path) -> None:
    def hash_of(row: dict[str, Any]) -> str:
        return read_items(write(tmp_path / "x.jsonl", row))[0].item_hash()

    reordered = dict(reversed(list(OPEN.items())))
    assert hash_of(reordered) == hash_of(OPEN)
    assert hash_of(changed(OPEN, "grader", "atol", value=0.0)) == hash_of(OPEN)
    assert hash_of(changed(OPEN, "grader", "atol", value=0.1)) != hash_of(OPEN)
    assert hash_of(changed(MCQ, "answer", value=2)) != hash_of(MCQ)
    assert canonical_json({"b": [1.0, "é"], "a": None}) == '{"a":null,"b":[1.0,"é"]}'
    assert canonical_hash({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def findings(*rows: dict[str, Any], tmp_path: Path) -> dict[str, list[Any]]:
    items: Any = read_items(write(tmp_path / "set.jsonl", *rows))
    found: dict[str, list[Any]] = {}
    for each in check_set(items):
        found.setdefault(each.kind, []).append(each)
    return found


def test_a_fair_set_has_no_findings(tmp_path: Path) -> None:
    rows = mcq_rows(200)
    for n, row in enumerate(rows):
        row["question"] = f"Question {n * 7919} on {n * 104729} and {n * 1299709}?"
    assert findings(*rows, tmp_path=tmp_path) == {}


def test_duplicates_are_found(tmp_path: Path) -> None:
    again = {**MCQ, "id": "m2", "choices": MCQ["choices"][::-1], "answer": 2,
             "question": "which metal is liquid at 300 K"}  # fmt: skip
    other = {**MCQ, "id": "m3", "choices": ["a", "b"], "answer": 0}
    long = "In the standard model of particle physics, which of the listed bosons carries it"
    near = [
        {**MCQ, "id": f"n{k}", "choices": [f"x{k}", "y"], "question": long + end}
        for k, end in enumerate(["?", " now?"])
    ]
    found = findings(MCQ, again, other, *near, tmp_path=tmp_path)
    assert [each.items for each in found["duplicate"]] == [("m1", "m2")]
    assert [each.items for each in found["near_duplicate"]] == [("n0", "n1")]
    assert found["near_duplicate"][0].value > 0.8


def test_a_leak_is_an_option_that_alone_stands_in_the_question(tmp_path: Path) -> None:
    leak = {**MCQ, "id": "a", "question": "Is mercury, the planet, named after a metal?"}
    both = {**MCQ, "id": "b", "question": "Mercury or gold: which is liquid?"}
    part = {**MCQ, "id": "c", "question": "What is a mercurytelluride?"}
    found = findings(leak, both, part, tmp_path=tmp_path)
    assert [each.items for each in found["answer_leak"]] == [("a",)]


def test_lengths_and_positions_that_give_answers_away_are_found(tmp_path: Path) -> None:
    rows = mcq_rows(60)
    for row in rows:
        row["choices"][row["answer"]] += " exactly, and nothing else"
    found = findings(*rows, tmp_path=tmp_path)
    assert "the longest option is right in 60 of 60" in found["length_bias"][0].message
    assert "position_bias" not in found
    rows = mcq_rows(60)
    for row in rows[:40]:
        row["answer"] = 2
    found = findings(*rows, tmp_path=tmp_path)
    (bias,) = found["position_bias"]
    assert bias.message.startswith("the right option stands at position 3 in 45 of 60")
