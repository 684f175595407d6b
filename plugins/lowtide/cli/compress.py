"""``lowtide compress``: an array to a small file, checked by decoding it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.arrays import read_npy, shape_text
from lowtide.cli.output import print_json, print_table, size_text, table_of, whole_file
from lowtide.core.errors import BoundViolationError, ConfigError

if TYPE_CHECKING:
    from lowtide.core.codec import Codec


def compress(
    source: Annotated[Path, typer.Argument(help="A .npy file.")],
    target: Annotated[Path, typer.Argument(help="The file to write.")],
    mode: Annotated[
        str | None, typer.Option("--mode", help='"abs", "rel" or "pw_rel". [default: abs]')
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option("--bound", help="Largest error; for rel times max - min, for pw_rel times x."),
    ] = None,
    codec: Annotated[
        str,
        typer.Option(
            "--codec",
            help="Name of a codec, or its configuration as JSON. [default: lowtide.sz, with a "
            "model lowtide.aesz]",
            show_default=False,
        ),
    ] = "",
    fill_value: Annotated[
        float | None, typer.Option("--fill-value", help='Stands for "no value" and stays exact.')
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="What `lowtide train-codec` wrote: codec lowtide.aesz."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace TARGET.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an array in few bytes, decode it again and check every element against the bound.

    Exit code 1, and nothing written, if the bound were broken.
    """
    from lowtide.compression.verify import measure
    from lowtide.core.codec import get_codec
    from lowtide.core.stream import ArrayData, as_array, read_header

    path = None if model is None else str(model)
    given = {"mode": mode, "bound": bound, "fill_value": fill_value, "model": path}
    codec = codec or ("lowtide.sz" if model is None else "lowtide.aesz")
    parameters = {name: value for name, value in given.items() if value is not None}
    chosen = get_codec(_configuration(codec) | parameters)
    data = as_array(read_npy(source))
    with whole_file(target, may_replace=force) as file:
        stream = chosen.encode(data.values)
        header = read_header(stream)
        decoded = ArrayData(chosen.decode(stream), header.dtype)
        errors = measure(
            data, decoded, chosen.bound, fill_value=getattr(chosen, "fill_value", None)
        )
        if errors.outside:
            violation = BoundViolationError(
                f"{source}: {errors.outside} elements come back outside of {chosen.bound}, the "
                f"largest error is {errors.max_abs}; {target} is not written, please report it"
            )
            typer.echo(f"lowtide: {violation}", err=True)
            raise typer.Exit(1)
        file.write(stream)
    raw_bytes = header.nbytes
    found = {
        "source": str(source), "target": str(target), "dtype": header.dtype,
        "shape": list(header.shape), "codec": chosen.get_config(),
        "bound": {"kind": chosen.bound.kind, "value": chosen.bound.value},
        "raw_bytes": raw_bytes, "stream_bytes": len(stream),
        "ratio": raw_bytes / len(stream),
        "bits_per_value": 8 * len(stream) / data.values.size if data.values.size else None,
        "max_abs_error": errors.max_abs, "limit": errors.limit, "outside": errors.outside,
    }  # fmt: skip
    if as_json:
        print_json(found)
    else:
        _print(found, chosen)


def _configuration(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {"id": text}
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise ConfigError(f"--codec: {text} is not JSON: {error}") from error


def _print(found: dict[str, Any], codec: Codec) -> None:
    bits = "" if found["bits_per_value"] is None else f"{found['bits_per_value']:.3g}"
    table = table_of("shape", "dtype", "from", "to", "ratio", "bits/value", "bound", "max error")
    error = "none" if found["max_abs_error"] is None else f"{found['max_abs_error']:.6g}"
    if found["limit"] is not None:
        error += f" of {found['limit']:.6g}"
    bound = codec.bound
    table.add_row(
        shape_text(found["shape"]), found["dtype"], size_text(found["raw_bytes"]),
        size_text(found["stream_bytes"]), f"{found['ratio']:.2f}", bits,
        bound.kind if bound.kind == "lossless" else f"{bound.kind} {bound.value:g}", error,
    )  # fmt: skip
    print_table(table)
