"""``lowtide plan``: what a plugin would do on a machine that is not at hand."""

from __future__ import annotations

import typer

from lowtide.cli.plan import offload, tensor_parallel

app = typer.Typer(help="Plan ahead, for a machine that is not at hand.", no_args_is_help=True)
app.command("offload")(offload.offload)
app.command("tensor_parallel")(tensor_parallel.tensor_parallel)
