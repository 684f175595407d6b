"""``lowtide train-codec``: an autoencoder for arrays like these, for the codec lowtide.aesz."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.arrays import read_npy
from lowtide.cli.output import print_json, size_text, whole_file
from lowtide.core.errors import ConfigError


def train_codec(
    sources: Annotated[list[Path], typer.Argument(help=".npy files: earlier steps, other runs.")],
    out: Annotated[Path, typer.Option("--out", help="The model to write, .safetensors.")],
    block: Annotated[
        str, typer.Option("--block", help="Extents of a block, 1 to 3 axes: 32,32 or 8,8,8.")
    ] = "32,32",
    latent: Annotated[int, typer.Option("--latent", help="Numbers that a block becomes.")] = 16,
    channels: Annotated[
        str, typer.Option("--channels", help="Of each stage; a stage halves the axes.")
    ] = "8,16,32",
    epochs: Annotated[int, typer.Option("--epochs", help="Passes of 100 batches.")] = 60,
    fill_value: Annotated[
        float | None, typer.Option("--fill-value", help='Stands for "no value".')
    ] = None,
    unaligned: Annotated[
        bool,
        typer.Option("--unaligned", help="Cut blocks anywhere: for fields on different grids."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 0,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="End after so long, with what there is.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a model on arrays and write it; the last tenth of each only judges it.

    Compress other arrays of the same kind with it: never judge a model by what it was trained on.
    """
    from rich.console import Console

    from lowtide.compression.learned.layers import Architecture
    from lowtide.compression.learned.model import pack_model
    from lowtide.compression.learned.training import Progress, TrainingOptions, train_model

    architecture = Architecture(
        _numbers("--block", block), latent, _numbers("--channels", channels)
    )
    options = TrainingOptions(
        epochs=epochs, seed=seed, aligned=not unaligned,
        time_limit_s=math.inf if minutes is None else 60 * minutes,
    )  # fmt: skip
    console = Console(stderr=True, highlight=False)

    def report(progress: Progress) -> None:
        console.print(
            f"epoch {progress.epoch} of {epochs}: loss {progress.loss:.3g}, "
            f"{progress.psnr_db:.2f} dB on what is not trained on, {progress.elapsed_s:.0f} s"
        )

    with whole_file(out, may_replace=force) as file:
        model = train_model(
            [read_npy(source) for source in sources], architecture, options,
            fill_value=fill_value, report=report,
        )  # fmt: skip
        file.write(pack_model(model))
    found = {
        "out": str(out), "sha256": model.sha256, "stored_bytes": model.stored_bytes,
        "low": model.low, "high": model.high, "training": dict(model.facts),
    }  # fmt: skip
    if as_json:
        print_json(found)
    else:
        typer.echo(
            f"{out}: {size_text(model.stored_bytes)}, {model.facts['validation_psnr_db']:.2f} dB, "
            f"SHA-256 {model.sha256}"
        )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{option}: {text!r}, allowed are whole numbers, such as 8,8,8"
        ) from error
