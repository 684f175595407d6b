"""One self-contained HTML page about a run."""

from __future__ import annotations

import math
import os
from importlib import resources
from pathlib import Path
from string import Template

import lowtide
from lowtide.core.errors import TelemetryError
from lowtide.report import sections
from lowtide.report.curves import Chart, bits_chart, loss_chart, small_charts
from lowtide.report.figures import (
    PHASES,
    TRAIN_LOSS,
    VALIDATION_BITS,
    KeyFigures,
    key_figures,
    rank_rows,
    span_rows,
)
from lowtide.report.lanes import span_class, timeline_chart
from lowtide.report.records import Run, read_run
from lowtide.report.steps import breakdown_chart, ranks_chart, skew
from lowtide.report.text import date_text, escape, plural, seconds_text

REPORT_NAME = "report.html"
_ENDINGS = {
    "killed": "The run ended without saying so: it was killed, or its machine stopped.",
    "failed": "The run ended with an error.",
    "exited": "The script ended without closing its Lowtide session: usual with trainers that own "
    "the engine (Hugging Face), else look for an error in its output.",
    "empty": "The telemetry files hold no readable record.",
}


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of a run and return its path.

    Args:
        run_dir: The run's folder; telemetry is looked for in it and up to two folders below.
        out: File to write; None writes ``report.html`` into `run_dir`.

    Raises:
        TelemetryError: no telemetry was found, or the page cannot be written.
    """
    run_dir = Path(run_dir)
    return write_page(read_run(run_dir), run_dir / REPORT_NAME if out is None else Path(out))


def write_page(run: Run, target: Path) -> Path:
    """Write the page of a run that has been read, in one go, and return its path.

    Raises:
        TelemetryError: the page cannot be written.
    """
    page = render(run)
    scratch = target.with_name(f"{target.name}.part{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(page, encoding="utf-8")
        scratch.replace(target)
    except OSError as error:
        raise TelemetryError(
            f"{target}: the report cannot be written ({error.strerror or error}); choose another "
            "path"
        ) from error
    return target


def render(run: Run) -> str:
    """Return the page of a run as HTML text."""
    figures = key_figures(run)
    body = [
        sections.header(run, figures),
        sections.tiles(figures),
        _notes(run, figures),
        *(_chart_section(chart) for chart in (loss_chart(run), bits_chart(run)) if chart),
        _small_charts_section(run),
        _steps_section(run),
        _timeline_section(run),
        _ranks_section(run),
        sections.plugins_section(run),
        sections.attempts_section(run),
        sections.config_section(run),
        sections.environment_section(run),
    ]
    package = resources.files("lowtide.report")
    template = Template(package.joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{run.name} – Lowtide run report"),
        style=package.joinpath("style.css").read_text(encoding="utf-8").strip(),
        body="\n".join(part for part in body if part),
        written=date_text(run.read_at_s),
        version=escape(lowtide.__version__),
        source=plural(len(run.ranks), "telemetry file"),
    )


def _notes(run: Run, figures: KeyFigures) -> str:
    """Say plainly what is odd about this run or missing from its files."""
    notes = []
    if figures.status in _ENDINGS:
        notes.append(_ENDINGS[figures.status])
    if figures.train_loss_nonfinite:
        count = plural(figures.train_loss_nonfinite, "value")
        notes.append(f"{count} of the training loss not finite (NaN or infinite): marked × below.")
    if run.bad_lines:
        notes.append(
            f"{plural(run.bad_lines, 'line')} of the telemetry files could not be read and "
            "are left out (a killed run may cut its last line short)."
        )
    if any(log.newer_format for log in run.ranks):
        notes.append("A newer Lowtide wrote these files; parts may be missing here.")
    missing = run.world_size - len(run.ranks)
    if missing > 0:
        notes.append(f"The files of {missing} of {plural(run.world_size, 'rank')} were not found.")
    if not run.series(TRAIN_LOSS):
        notes.append(f"No {TRAIN_LOSS} was recorded, so there is no loss curve.")
    if not run.series(VALIDATION_BITS):
        notes.append(f"No {VALIDATION_BITS} was recorded: the run had no validation.")
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section class="notes"><ul>{items}</ul></section>'


def _figure(chart: Chart) -> str:
    legend = "".join(
        f'<li><i class="{cls}"></i>{escape(label)}</li>' for cls, label in chart.legend
    )
    head = f'<ul class="legend">{legend}</ul>' if legend else ""
    return f'{head}<div class="figure">{chart.svg}</div>'


def _chart_section(chart: Chart, extra: str = "") -> str:
    return sections.section(chart.title, sections.reading(chart.reading) + _figure(chart) + extra)


def _small_charts_section(run: Run) -> str:
    charts = small_charts(run)
    if not charts:
        return ""
    cells = "".join(f"<div><h3>{escape(c.title)}</h3>{_figure(c)}</div>" for c in charts)
    note = "What the training script recorded besides its losses, over optimizer steps."
    return sections.section(
        "Other curves", f'{sections.reading(note)}<div class="pair">{cells}</div>'
    )


def _steps_section(run: Run) -> str:
    steps = run.lead.kept_steps()
    chart = breakdown_chart(steps)
    if chart is None:
        return sections.section(
            "Where a step's time goes",
            '<p class="muted">No step record: no optimizer step was finished.</p>',
        )
    rows = span_rows(steps)
    names = [row.name for row in rows if row.name not in (*PHASES, "other")]
    classes = {row.name: span_class(row.name, names) for row in rows if row.name != "other"}
    title = f"rank {run.lead.rank}, {plural(sum(step.steps for step in steps), 'step')}"
    return _chart_section(chart, f"<h3>{escape(title)}</h3>" + sections.step_table(rows, classes))


def _timeline_section(run: Run) -> str:
    chart = timeline_chart(run.traces)
    if chart is not None:
        return _chart_section(chart)
    return sections.section(
        "Timeline of lanes",
        '<p class="muted">No trace was found ("trace": false, or the run ended before the first '
        "one was written).</p>",
    )


def _ranks_section(run: Run) -> str:
    rows = rank_rows(run)
    chart = ranks_chart(rows)
    if chart is None:
        return ""
    found = skew(rows)
    extra = ""
    if found is not None and math.isfinite(found[1]):
        extra = (
            f"<p>Largest difference between ranks: {escape(found[0])}, "
            f"{seconds_text(found[1])} per step.</p>"
        )
    return _chart_section(chart, extra)
