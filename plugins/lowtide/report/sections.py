"""The parts of the page that are not charts: header, tiles, tables, configuration."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowtide.report.figures import (
    PHASES,
    KeyFigures,
    SpanRow,
    counter_totals,
    last_gauges,
)
from lowtide.report.records import Run
from lowtide.report.text import (
    bytes_text,
    date_text,
    escape,
    number,
    plural,
    quantity,
    seconds_text,
)

_PILLS = {"done": "good", "running": "wait"}
_MAX_JSON = 60_000
_MAX_ROWS = 60
_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|(-?\d[\d.eE+-]*|\btrue\b|\bfalse\b|\bnull\b)')


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = ()
) -> str:
    """Return an HTML table. Cells are HTML already; columns listed in `numeric` align right."""
    names = ["n" if index in numeric else "wrap" for index in range(len(head))]
    first = "".join(
        f'<th scope="col" class="{cls}">{escape(text)}</th>'
        for cls, text in zip(names, head, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{c}">{cell}</td>' for c, cell in zip(names, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{first}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(title: str, body: str, *, cls: str = "") -> str:
    """Return one card of the page."""
    attribute = f' class="{cls}"' if cls else ""
    return f"<section{attribute}><h2>{escape(title)}</h2>{body}</section>"


def reading(text: str) -> str:
    """Return the line that says how to read what follows."""
    return f'<p class="reading">{escape(text)}</p>' if text else ""


def header(run: Run, figures: KeyFigures) -> str:
    """Return name, status and the facts that identify a run."""
    facts = run.facts
    place = facts.get("environment") or {}
    begun = run.lead.attempts[0].begin_s if run.lead.attempts else math.nan
    meta = [
        f"started {date_text(begun)}" if math.isfinite(begun) else "",
        f"{seconds_text(figures.duration_s)} of work",
        plural(figures.ranks, "rank"),
        plural(figures.attempts, "attempt"),
        f"host {facts['host']}" if facts.get("host") else "",
        f"commit {place['commit']}" if place.get("commit") else "commit unknown",
    ]
    hardware = [
        str(place["cpu"]) if place.get("cpu") else "",
        plural(place["cores"], "core") if isinstance(place.get("cores"), int) else "",
        f"{bytes_text(float(place['memory_bytes']))} memory"
        if isinstance(place.get("memory_bytes"), int) else "",
        str(place["gpu"]) if place.get("gpu") else "no GPU",
    ]  # fmt: skip
    versions = [
        f"{name} {place[name]}"
        for name in ("lowtide", "torch", "deepspeed", "megatron-core", "python")
        if place.get(name)
    ]
    pill = _PILLS.get(figures.status, "stop")
    return (
        '<header class="top"><p class="eyebrow">Lowtide run report</p><div class="title">'
        f'<h1>{escape(run.name)}</h1><span class="pill {pill}">{escape(figures.status)}</span>'
        f"</div>{_meta(meta)}{_meta(hardware) if place else ''}{_meta(versions)}</header>"
    )


def _meta(items: Sequence[str]) -> str:
    spans = "".join(f"<span>{escape(item)}</span>" for item in items if item)
    return f'<p class="meta">{spans}</p>' if spans else ""


def tiles(figures: KeyFigures) -> str:
    """Return the key figures. A figure that was not recorded shows a dash and says so."""
    absent = "not recorded"
    loss = "Training loss" if figures.status == "running" else "Final training loss"
    averaged = plural(figures.train_loss_values, "value")
    bits = figures.validation_bits_per_byte
    rows = [
        (loss, number(figures.train_loss), "",
         f"mean of the last {averaged}" if figures.train_loss is not None else absent),
        ("Validation", number(bits), "bits/byte" if bits is not None else "",
         _against_yardstick(figures) if bits is not None else absent),
        ("Throughput", number(figures.tokens_per_s, 3),
         "tokens/s" if figures.tokens_per_s is not None else "",
         "median" if figures.tokens_per_s is not None else absent),
        ("Optimizer steps", number(figures.last_step, 12), "",
         plural(figures.attempts, "attempt") if figures.last_step is not None else absent),
        ("Time per step", *_split_unit(seconds_text(figures.step_time_median_s)),
         f"median; 90 % below {seconds_text(figures.step_time_p90_s)}"
         if figures.step_time_median_s is not None else absent),
        ("Peak memory", *_split_unit(bytes_text(figures.peak_memory_bytes)),
         "largest rank" + (
             f"; device {bytes_text(figures.peak_device_memory_bytes)}"
             if figures.peak_device_memory_bytes is not None else "")
         if figures.peak_memory_bytes is not None else absent),
    ]  # fmt: skip
    return '<dl class="tiles">' + "".join(_tile(*row) for row in rows) + "</dl>"


def _tile(name: str, value: str, unit: str, more: str) -> str:
    unit = f'<span class="unit">{escape(unit)}</span>' if unit else ""
    return (
        f'<div class="tile"><dt>{escape(name)}</dt><dd><div class="value">{escape(value)}{unit}'
        f'</div><div class="more">{escape(more)}</div></dd></div>'
    )


def _split_unit(text: str) -> tuple[str, str]:
    value, _, unit = text.partition(" ")
    return (text, "") if " " in unit else (value, unit)


def _against_yardstick(figures: KeyFigures) -> str:
    best, bits = figures.best_reference_bits_per_byte, figures.validation_bits_per_byte
    if best is None or bits is None or best <= 0:
        return "no yardstick recorded"
    change = 100 * (bits / best - 1)
    side = "above" if change >= 0 else "below"
    return f"{number(abs(change), 3)} % {side} {figures.best_reference} ({number(best, 3)})"


def step_table(rows: Sequence[SpanRow], names: Mapping[str, str]) -> str:
    """Return the table of span times; `names` gives the CSS class of each span's swatch."""
    cells = [
        [
            f'<span class="swatch {names.get(row.name, "k-other")}"></span>{escape(row.name)}',
            seconds_text(row.median_s),
            seconds_text(row.p90_s),
            f"{number(100 * row.share, 3)} %" if math.isfinite(row.share) else "–",
            seconds_text(row.total_s),
            number(row.calls_per_step, 3) if math.isfinite(row.calls_per_step) else "–",
        ]
        for row in rows[:_MAX_ROWS]
    ]
    beside = any(row.name not in (*PHASES, "other") for row in rows)
    note = (
        "Spans of plugins and of the script may overlap the host's, so shares can add up "
        "to more than 100\u00a0%."
    )
    head = ("per step", "median", "90th percentile", "share of time", "total", "calls")
    return table(head, cells, numeric=(1, 2, 3, 4, 5)) + (reading(note) if beside else "")


def plugins_section(run: Run) -> str:
    """Say what each plugin did, from its counters and gauges; say so when none was active."""
    names = [str(name) for name in run.facts.get("plugins") or []]
    totals = {k: v for k, v in counter_totals(run.ranks).items() if k.startswith("lowtide.")}
    gauges = {k: v for k, v in last_gauges(run.lead).items() if k.startswith("lowtide.")}
    steps = sum(step.steps for step in run.lead.steps)
    parts = []
    if not names:
        parts.append(
            "<p>No plugin was active in this run: it is the stock host with Lowtide's "
            "measurements only.</p>"
        )
    if names or totals:
        parts.append(reading("Totals over all ranks and attempts; per step of the whole run."))
    counted = {key.split(".")[1] for key in (*totals, *gauges) if key.count(".") >= 2}
    for name in [*names, *sorted(counted - set(names))]:
        parts.append(f"<h3>{escape(name if name != 'core' else 'Lowtide itself')}</h3>")
        rows = _metric_rows(f"lowtide.{name}.", totals, gauges, steps)
        parts.append(
            table(("metric", "total", "per step"), rows[:_MAX_ROWS], numeric=(1, 2))
            if rows
            else '<p class="muted">Active; it recorded no counters.</p>'
        )
    listeners = run.facts.get("listeners") or []
    if listeners:
        items = "".join(f"<li><code>{escape(item)}</code></li>" for item in listeners[:_MAX_ROWS])
        parts.append(f"<details><summary>Order of listeners</summary><ol>{items}</ol></details>")
    return section("What the plugins did", "".join(parts))


def _metric_rows(
    prefix: str, totals: Mapping[str, float], gauges: Mapping[str, float], steps: int
) -> list[list[str]]:
    rows = [
        [
            escape(key.removeprefix(prefix)),
            escape(quantity(key, value)),
            escape(quantity(key, value / steps)) if steps else "–",
        ]
        for key, value in sorted(totals.items())
        if key.startswith(prefix)
    ]
    return rows + [
        [f"{escape(key.removeprefix(prefix))} (newest)", escape(quantity(key, value)), "–"]
        for key, value in sorted(gauges.items())
        if key.startswith(prefix)
    ]


def attempts_section(run: Run) -> str:
    """List the starts of the program; empty for a run that was started once."""
    attempts = run.lead.attempts
    if len(attempts) < 2:
        return ""
    rows = []
    for index, attempt in enumerate(attempts):
        is_last = index + 1 == len(attempts)
        ended = attempt.end_status or (run.status() if is_last else "killed")
        covered = "none" if attempt.first_step is None else (
            f"{attempt.first_step:,} – {attempt.last_step:,}"
        )  # fmt: skip
        place = attempt.facts.get("environment") or {}
        rows.append(
            [str(attempt.number), date_text(attempt.begin_s),
             seconds_text(attempt.last_s - attempt.begin_s), covered, escape(ended),
             escape(place.get("commit") or "–")]
        )  # fmt: skip
    note = (
        "Steps that a later attempt did again are shown as it did them; their first version is "
        "left out of curves and medians."
    )
    head = ("attempt", "started", "lasted", "steps", "ended", "commit")
    return section("Attempts", reading(note) + table(head, rows[-_MAX_ROWS:]))


def json_block(value: Any) -> str:
    """Return indented JSON as HTML, keys and values told apart by colour."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    if len(text) > _MAX_JSON:
        text = text[:_MAX_JSON] + "\n… cut here: too long for this page"
    parts, end = [], 0
    for match in _TOKEN.finditer(text):
        parts.append(escape(text[end : match.start()]))
        end = match.end()
        if match.group(1) is not None:
            cls = "key" if match.group(2) else "text"
            parts.append(f'<span class="{cls}">{escape(match.group(1))}</span>')
            parts.append(match.group(2) or "")
        else:
            parts.append(f'<span class="num">{escape(match.group(0))}</span>')
    parts.append(escape(text[end:]))
    return f"<pre>{''.join(parts)}</pre>"


def config_section(run: Run) -> str:
    """Show the resolved block and the host's own configuration."""
    block, host = run.facts.get("config"), run.facts.get("host_config")
    if not block and not host:
        return section("Configuration", '<p class="muted">No run record, so none is known.</p>')
    parts = [reading("The lowtide block with every default filled in and every “auto” decided.")]
    parts.append(json_block(block or {}))
    if isinstance(host, Mapping):
        rest = {key: value for key, value in host.items() if key != "lowtide"}
        parts.append("<details open><summary>DeepSpeed JSON</summary>")
        parts.append(json_block(rest) + "</details>")
    return section("Configuration", "".join(parts), cls="long")


def environment_section(run: Run) -> str:
    """Show versions and hardware as the lowest rank recorded them."""
    place = run.facts.get("environment") or {}
    rows = []
    for key, value in place.items():
        if isinstance(value, list):
            value = " ".join(str(item) for item in value)
        if isinstance(value, int) and key.endswith("_bytes"):
            value = bytes_text(float(value))
        rows.append([escape(key), escape("–" if value is None else value)])
    if not rows:
        return section("Environment", '<p class="muted">No run record, so none is known.</p>')
    return section("Environment", table(("what", "value"), rows))
