"""``lowtide inspect``: what a compressed file says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowtide.cli.arrays import read_stream, shape_text
from lowtide.cli.output import plain, print_json, print_table, size_text, table_of


def inspect(
    source: Annotated[Path, typer.Argument(help="What `lowtide compress` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a compressed file holds, without decoding it. Its checksums are compared."""
    from lowtide.compression import inspect as look

    found = look(read_stream(source))
    if as_json:
        print_json(found)
        return
    table = table_of("what", "found")
    codec = found["codec"]
    size = f"{size_text(found['stream_bytes'])} for {size_text(found['raw_bytes'])}"
    table.add_row("array", f"{shape_text(found['shape'])}, {found['dtype']}")
    table.add_row("size", size)
    if found["ratio"] is not None:
        table.add_row(
            "ratio", f"{found['ratio']:.2f}, {found['bits_per_value']:.3g} bits per value"
        )
    table.add_row("codec", plain(codec["id"]))
    parameters = ", ".join(f"{k} {v}" for k, v in codec.items() if k != "id")
    table.add_row("parameters", plain(parameters))
    if "model" in found:
        table.add_row("model", _model_text(found["model"]))
    if "chunks" in found:
        table.add_row("step", f"{found['step']:g}, {found['domain']}")
        table.add_row("exceptions", f"{found['exceptions']:,}")
    print_table(table)
    if found.get("chunks"):
        typer.echo("")
        _print_chunks(found["chunks"])


def _model_text(model: dict[str, Any]) -> str:
    if model["stored_bytes"] is None:
        return f"{model['sha256']}, not at hand"
    size = size_text(model["stored_bytes"])
    return f"{model['sha256']}, {size}; the ratio with it is {model['ratio_with_model']:.2f}"


def _print_chunks(chunks: list[dict[str, Any]]) -> None:
    """Print one row for each run of chunks that were treated alike."""
    table = table_of("chunks", "shape", "kind", "parameters", "size", "exceptions")
    known = ("shape", "kind", "stream_bytes", "exceptions")
    runs: list[tuple[Any, list[dict[str, Any]]]] = []
    for chunk in chunks:
        rest = ", ".join(f"{k} {v}" for k, v in chunk.items() if k not in known)
        key = (shape_text(chunk["shape"]), chunk["kind"], rest)
        if not runs or runs[-1][0] != key:
            runs.append((key, []))
        runs[-1][1].append(chunk)
    for key, alike in runs:
        size = size_text(sum(chunk["stream_bytes"] for chunk in alike))
        exceptions = sum(chunk["exceptions"] for chunk in alike)
        table.add_row(str(len(alike)), *key, size, f"{exceptions:,}")
    print_table(table)
