"""A study as text, and its means as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from lowtide.evaluation.bench.analysis import (
    Finding,
    Group,
    Hidden,
    Results,
    effects,
    hidden_by_f1,
    interactions,
    interval_of_mean,
    scale_effects,
    scale_interactions,
)

METRICS = ("precision", "recall", "f1", "em", "nll", "said_old")


def show(rows: Sequence[dict[str, Any]], console: Console, *, top: int = 12) -> None:
    """Print the tables of a study; of long ones the `top` rows that stand out most."""
    results = Results(rows)
    cells = _first_cells(rows)
    for model in results.models:
        for group in results.groups:
            console.print(_means_table(results, cells, model, group))
    _show_times(rows, console)
    for title, found in (
        ("Stack - dense, F1", effects(results)),
        ("Interaction (AB - A) - (B - dense), F1", interactions(results)),
        ("Effect on the large model - on the small one, F1", scale_effects(results)),
        ("Interaction in the large model - in the small one, F1", scale_interactions(results)),
    ):
        if found:
            console.print(_findings_table(title, found, top))
    _show_hidden(*hidden_by_f1(results), console, top)


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one line for each model, task, form and stack: means, intervals, bytes."""
    results, cells = Results(rows), _first_cells(rows)
    fields = ["model", "task", "question_aware", "stack", *METRICS, "f1_low", "f1_high"]
    costs = ["weight_bytes", "kv_bytes_peak", "kv_bytes_held", "read_tokens", "kept_entries_part"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, *costs])
        for model in results.models:
            for group in results.groups:
                for stack in results.stacks(model, group):
                    means = results.means(model, group, stack)
                    low, high = _interval(results, model, group, stack)
                    cell = cells[model, group, stack]
                    writer.writerow(
                        [model, *group, stack, *(means[metric] for metric in METRICS), low, high]
                        + [cell[cost] for cost in costs]
                    )


def _first_cells(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, Group, str], dict[str, Any]]:
    found: dict[tuple[str, Group, str], dict[str, Any]] = {}
    for row in rows:
        if row["kind"] == "cell":
            group = (row["task"], row["question_aware"])
            found.setdefault((row["model"], group, row["stack"]), row)
    return found


def _interval(results: Results, model: str, group: Group, stack: str) -> tuple[float, float]:
    scores = results.scores(model, group, stack, "f1")
    return interval_of_mean(scores.values(), [results.clusters[item] for item in scores])


def _means_table(results: Results, cells: Any, model: str, group: Group) -> Table:
    form = "question known" if group[1] else "question later"
    table = Table(title=f"{model}, {group[0]}, {form}")
    table.add_column("stack")
    for name in ("P", "R", "F1", "95 %", "NLL", "old", "weights kB", "KV kB", "KV peak", "tokens"):
        table.add_column(name, justify="right")
    for stack in results.stacks(model, group):
        means, cell = results.means(model, group, stack), cells[model, group, stack]
        low, high = _interval(results, model, group, stack)
        table.add_row(
            stack, *(f"{means[name]:.3f}" for name in ("precision", "recall", "f1")),
            f"{low:.2f}-{high:.2f}", f"{means['nll']:.2f}", f"{means['said_old']:.2f}",
            f"{cell['weight_bytes'] / 1e3:.0f}", f"{cell['kv_bytes_held'] / 1e3:.1f}",
            f"{cell['kv_bytes_peak'] / 1e3:.1f}", f"{cell['read_tokens']:.0f}",
        )  # fmt: skip
    return table


def _findings_table(title: str, found: Sequence[Finding], top: int) -> Table:
    significant = [each for each in found if each.p_holm < 0.05]
    below = sum(each.estimate < 0 for each in significant)
    caption = (
        f"{len(found)} compared; {len(significant)} differ from 0 (Holm, 5 %), {below} of them "
        f"below. Detectable alone with 80 % power: median "
        f"{median(each.detectable for each in found):.3f}"
    )
    table = Table(title=title, caption=caption)
    for name in ("model", "task", "question", "stack"):
        table.add_column(name)
    for name in ("difference", "95 %", "p (Holm)", "detectable"):
        table.add_column(name, justify="right")
    for each in sorted(found, key=lambda each: (each.p_holm, -abs(each.estimate)))[:top]:
        table.add_row(
            each.model, each.task, "known" if each.question_aware else "later", each.stack,
            f"{each.estimate:+.3f}", f"{each.low:+.3f} to {each.high:+.3f}",
            f"{each.p_holm:.4f}", f"{each.detectable:.3f}",
        )  # fmt: skip
    return table


def _show_hidden(found: Sequence[Hidden], compared: int, console: Console, top: int) -> None:
    title = f"Equal F1, other precision: {len(found)} of {compared} pairs of stacks"
    table = Table(title=title)
    for name in ("model", "task", "question", "first", "second"):
        table.add_column(name)
    for name in ("F1", "95 %", "precision", "recall", "p (Holm)"):
        table.add_column(name, justify="right")
    for each in sorted(found, key=lambda each: -abs(each.precision.estimate))[:top]:
        f1 = each.f1
        table.add_row(
            f1.model, f1.task, "known" if f1.question_aware else "later", each.first, each.second,
            f"{f1.estimate:+.3f}", f"{f1.low:+.3f} to {f1.high:+.3f}",
            f"{each.precision.estimate:+.3f}", f"{each.recall.estimate:+.3f}",
            f"{each.precision.p_holm:.4f}",
        )  # fmt: skip
    console.print(table)


def _show_times(rows: Sequence[dict[str, Any]], console: Console) -> None:
    times: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "time":
            times.setdefault((row["model"], row["words"], row["stack"]), []).append(row)
    if not times:
        return
    table = Table(title="Speed, of runs in turn: median (10 % to 90 %)")
    for name in ("model", "words", "stack"):
        table.add_column(name)
    for name in ("prefill ms", "compress ms", "ms per token", "end to end ms", "CPU / wall"):
        table.add_column(name, justify="right")
    for (model, words, stack), found in times.items():
        spans = [
            _span([row[key] * 1e3 for row in found])
            for key in ("prefill_s", "compress_s", "decode_s_per_token", "e2e_s")
        ]
        share = median(row["cpu_s"] / row["e2e_s"] for row in found)
        table.add_row(model, str(words), stack, *spans, f"{share:.2f}")
    console.print(table)


def _span(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    tenths = quantiles(values, n=10, method="inclusive")
    return f"{median(values):.1f} ({tenths[0]:.1f}-{tenths[-1]:.1f})"
