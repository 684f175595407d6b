"""``lowtide eval``: runs of suites, their figures, and what two runs differ in."""

from __future__ import annotations

import typer

from lowtide.cli.eval import comparing, reporting, running, validating

app = typer.Typer(help="Evaluate language models, with error bars.", no_args_is_help=True)
app.command("run")(running.run)
app.command("report")(reporting.report)
app.command("compare")(comparing.compare)
app.command("validate")(validating.validate)
