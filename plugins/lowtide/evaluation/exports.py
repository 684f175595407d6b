"""Rows for other tools: results of lm-evaluation-harness, logs of Inspect, and back.

Both keep every score of every row, and under names of ours what they have no place for, so that
reading back gives the same rows.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from lowtide.core.errors import DataError
from lowtide.evaluation.aggregate import figures, grouped
from lowtide.evaluation.rows import Row, row_from

_OWN = "lowtide"
_FIELDS = ("output", "target", "prompt", "scores")


def _one_model(rows: Sequence[Row]) -> None:
    models = {row.model_hash for row in rows}
    if len(models) != 1:
        raise DataError(f"rows: of {len(models)} models; such a file holds one, so give its rows")


def _rest(row: Row) -> dict[str, Any]:
    """Return what the formats have no place for."""
    return {name: getattr(row, name) for name in row.__slots__ if name not in _FIELDS}


def _row(rest: Any, **fields: Any) -> Row:
    if not isinstance(rest, Mapping):
        raise DataError("a sample without what Lowtide needs: the file was written by another tool")
    return row_from({"schema": "evaluation.row/1", **rest, **fields})


# -- lm-evaluation-harness ------------------------------------------------------------------


def to_lm_eval(rows: Sequence[Row], *, resamples: int = 10_000) -> dict[str, Any]:
    """Return rows as lm-eval's results with samples.

    A metric is named "<metric>,none", as of its filter "none"; standard errors are clustered.

    Raises:
        DataError: rows of more than one model, or none.
    """
    _one_model(rows)
    table = figures(rows, resamples=resamples)
    tasks = {task: members for (_, task), members in grouped(rows).items()}
    results: dict[str, Any] = {task: {"alias": task} for task in tasks}
    better: dict[str, Any] = {task: {} for task in tasks}
    for each in table:
        error = each.as_dict()["standard_error"]
        results[each.task][f"{each.metric},none"] = each.interval.estimate
        results[each.task][f"{each.metric}_stderr,none"] = "N/A" if error is None else error
        better[each.task][each.metric] = each.is_higher_better
    counts = {task: len({row.item for row in members}) for task, members in tasks.items()}
    return {
        "results": results,
        "group_subtasks": {task: [] for task in tasks},
        "configs": {
            task: {"task": task, "output_type": _output_type(members[0].kind)}
            for task, members in tasks.items()
        },
        "versions": {task: members[0].settings_hash[:12] for task, members in tasks.items()},
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": better,
        "n-samples": {task: {"original": n, "effective": n} for task, n in counts.items()},
        "config": {
            "model": _OWN, "model_args": rows[0].model, "batch_size": None, "device": None,
            "random_seed": min(row.seed for row in rows),
        },
        "git_hash": rows[0].provenance.get("commit"),
        "date": max(row.time_s for row in rows),
        "samples": {
            task: [_lm_eval_sample(n, row) for n, row in enumerate(members)]
            for task, members in tasks.items()
        },
    }  # fmt: skip


def _output_type(kind: str) -> str:
    return {"mcq": "multiple_choice", "loss": "loglikelihood_rolling"}.get(kind, "generate_until")


def _lm_eval_sample(number: int, row: Row) -> dict[str, Any]:
    prompt = hashlib.sha256(row.prompt.encode()).hexdigest()
    return {
        "doc_id": number, "doc": {"id": row.item, _OWN: _rest(row)}, "target": row.target,
        "arguments": {"gen_args_0": {"arg_0": row.prompt}}, "resps": [[row.output]],
        "filtered_resps": [row.output], "filter": "none", "metrics": list(row.scores),
        "doc_hash": row.item_hash, "prompt_hash": prompt,
        "target_hash": hashlib.sha256(row.target.encode()).hexdigest(), **row.scores,
    }  # fmt: skip


def from_lm_eval(results: Mapping[str, Any]) -> list[Row]:
    """Return the rows that `to_lm_eval` was given.

    Raises:
        DataError: the results have no samples of ours.
    """
    if not isinstance(results.get("samples"), Mapping):
        raise DataError('"samples": is missing; lm-eval writes it with --log_samples')
    try:
        return [
            _row(
                sample["doc"].get(_OWN), output=sample["filtered_resps"][0],
                target=sample["target"], prompt=sample["arguments"]["gen_args_0"]["arg_0"],
                scores={name: sample[name] for name in sample["metrics"]},
            )
            for samples in results["samples"].values() for sample in samples
        ]  # fmt: skip
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f'"samples": one lacks {error}') from None


# -- Inspect --------------------------------------------------------------------------------


def to_inspect(rows: Sequence[Row], *, resamples: int = 10_000) -> dict[str, dict[str, Any]]:
    """Return rows as one Inspect JSON log (format 2) for each task.

    Raises:
        DataError: rows of more than one model, or none.
    """
    _one_model(rows)
    table = figures(rows, resamples=resamples)
    logs = {}
    for (_, task), members in grouped(rows).items():
        own = [each for each in table if each.task == task]
        seeds = sorted({row.seed for row in members})
        started, ended = min(row.time_s for row in members), max(row.time_s for row in members)
        scores = [
            {"name": each.metric, "scorer": each.metric, "params": {}, "metrics": {
                "value": {"name": "value", "value": each.interval.estimate, "params": {}},
                **_stderr(each.as_dict()["standard_error"]),
            }}
            for each in own
        ]  # fmt: skip
        logs[task] = {
            "version": 2,
            "status": "success",
            "eval": {
                "run_id": _short_id(members[0].model_hash), "created": _iso(started),
                "task": task, "task_id": _short_id(task), "task_version": 0, "task_file": None,
                "task_attribs": {}, "task_args": {}, "model": f"{_OWN}/{members[0].model}",
                "model_args": {}, "dataset": {"name": task, "samples": len(members)},
                "config": {"epochs": len(seeds)}, "packages": {}, "metadata": {
                    "kind": members[0].kind, "settings_hash": members[0].settings_hash,
                },
            },
            "plan": {"name": "plan", "steps": [], "config": {}},
            "results": {
                "total_samples": len(members),
                "completed_samples": sum(not row.error for row in members), "scores": scores,
            },
            "stats": {
                "started_at": _iso(started), "completed_at": _iso(ended), "model_usage": {},
            },
            "samples": [_inspect_sample(row, seeds.index(row.seed) + 1) for row in members],
        }  # fmt: skip
    return logs


def _stderr(error: float | None) -> dict[str, Any]:
    if error is None:
        return {}
    return {"stderr": {"name": "stderr", "value": error, "params": {}}}


def _short_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:22]


def _iso(time_s: float) -> str:
    return datetime.datetime.fromtimestamp(time_s, datetime.timezone.utc).isoformat()


def _inspect_sample(row: Row, epoch: int) -> dict[str, Any]:
    return {
        "id": row.item, "epoch": epoch, "input": row.prompt, "target": row.target, "messages": [],
        "output": {
            "model": row.model, "choices": [{
                "message": {"role": "assistant", "content": row.output, "source": "generate"},
                "stop_reason": "stop",
            }],
        },
        "scores": {
            name: {"value": value, "answer": row.output} for name, value in row.scores.items()
        },
        "metadata": {_OWN: _rest(row)}, "store": {}, "events": [], "model_usage": {},
        "attachments": {},
    }  # fmt: skip


def from_inspect(log: Mapping[str, Any]) -> list[Row]:
    """Return the rows of one log that `to_inspect` wrote.

    Raises:
        DataError: the log has no samples of ours.
    """
    try:
        return [
            _row(
                sample["metadata"].get(_OWN),
                output=sample["output"]["choices"][0]["message"]["content"],
                target=sample["target"], prompt=sample["input"],
                scores={name: score["value"] for name, score in sample["scores"].items()},
            )
            for sample in log["samples"]
        ]  # fmt: skip
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f'"samples": one lacks {error}') from None
