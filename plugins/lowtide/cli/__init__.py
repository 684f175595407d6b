"""The ``lowtide`` command: one file per verb; what a verb needs is imported when it runs.

Exit codes: 0 all is well, 1 the verb worked and found something broken, 2 it could not do what was
asked (wrong arguments, missing files: one line on stderr says which), 130 interrupted.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import lowtide
from lowtide.cli import (
    checkpoint,
    compress,
    decompress,
    doctor,
    inspect,
    launch,
    plan,
    report,
    schema,
)
from lowtide.cli import eval as evaluate
from lowtide.core.errors import LowtideError

DEBUG_VARIABLE = "LOWTIDE_DEBUG"


class _Verbs(TyperGroup):
    """Turns Lowtide's own errors into one line and an exit code, for every verb."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LowtideError as error:
            if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
                raise
            typer.echo(f"lowtide: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="lowtide",
    cls=_Verbs,
    help="Plugins for an unmodified DeepSpeed and Megatron-core that move fewer bytes.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"lowtide {lowtide.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command("doctor")(doctor.doctor)
app.command("schema")(schema.schema)
app.command("report")(report.report)
app.command("compress")(compress.compress)
app.command("decompress")(decompress.decompress)
app.command("inspect")(inspect.inspect)
app.add_typer(launch.app, name="launch")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(plan.app, name="plan")
app.add_typer(evaluate.app, name="eval")


def main(arguments: list[str] | None = None) -> None:
    """Run the ``lowtide`` command with `arguments`, or with the process's own."""
    app(arguments, prog_name="lowtide")
