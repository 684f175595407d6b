"""``lowtide decompress``: a stream back to a .npy file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.arrays import read_stream, shape_text
from lowtide.cli.output import print_json, size_text, whole_file
from lowtide.core.errors import CodecError


def decompress(
    source: Annotated[Path, typer.Argument(help="What `lowtide compress` wrote.")],
    target: Annotated[Path, typer.Argument(help="The .npy file to write.")],
    max_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-bytes", min=0, help="Refuse to decode to more; for files of strangers."
        ),
    ] = None,
    models: Annotated[
        list[Path] | None,
        typer.Option("--model", help="A model that the stream may need; more than once for more."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace TARGET.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the array in a compressed file, of any registered codec, as .npy."""
    import numpy as np

    from lowtide.compression import decompress as decode
    from lowtide.core.stream import BIT_TYPES, read_header

    stream = read_stream(source)
    dtype = read_header(stream).dtype
    if dtype in BIT_TYPES:
        raise CodecError(
            f"{source}: holds {dtype}, which .npy files lack; decode it in Python with "
            "lowtide.compression.decompress"
        )
    with whole_file(target, may_replace=force) as file:
        array = decode(stream, max_bytes=max_bytes, models=models or ())
        np.lib.format.write_array(file, array, allow_pickle=False)
    if as_json:
        print_json(
            {
                "source": str(source), "target": str(target), "dtype": dtype,
                "shape": list(array.shape), "raw_bytes": array.nbytes,
                "stream_bytes": stream.nbytes,
            }
        )  # fmt: skip
    else:
        typer.echo(f"{target}: {shape_text(array.shape)}, {dtype}, {size_text(array.nbytes)}")
