"""``lowtide checkpoint``: list, check, compare, thin out, export and expand checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.output import (
    others_on_stderr,
    print_json,
    print_table,
    size_text,
    table_of,
)
from lowtide.core.errors import CheckpointError

if TYPE_CHECKING:
    from lowtide.checkpoint.store.catalog import Entry
    from lowtide.checkpoint.store.integrity import Report
    from lowtide.checkpoint.store.scan import OnProgress

app = typer.Typer(
    help="List, check, compare, thin out, export and expand checkpoints.", no_args_is_help=True
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[Path, typer.Argument(help="What save_checkpoint was given.")]
Item = Annotated[Path, typer.Argument(help="A checkpoint's folder, or a torch file.")]

_MARKS = {"complete": "green", "in progress": "cyan", "incomplete": "red", "abandoned": "red"}


@app.command("ls")
def ls(folder: Folder, as_json: AsJson = False) -> None:
    """List the checkpoints in a folder, the newest first, with what is left of unfinished ones.

    Also those in its sub-folders, four levels deep, but not through symbolic links.
    """
    from lowtide.checkpoint.store.catalog import list_checkpoints

    entries = list_checkpoints(folder, below=True)
    if as_json:
        print_json({"folder": str(folder), "checkpoints": [e.as_dict() for e in entries]})
    elif entries:
        _print_entries(entries)
    else:
        typer.echo(f"no checkpoints in {folder}")


@app.command("verify")
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a folder of checkpoints.")],
    fast: Annotated[
        bool, typer.Option("--fast", help="Sizes, records and a sample of each file.")
    ] = False,
    all_of_them: Annotated[
        bool, typer.Option("--all", help="Every checkpoint in the folder, not only the newest.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="How many read at once.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint and compare every byte with its checksums. Exit code 1 for damage."""
    from lowtide.checkpoint.store.integrity import find_latest_damage
    from lowtide.checkpoint.store.integrity import verify as check

    paths, is_folder = _checkpoints_at(path, all_of_them=all_of_them)
    reports = []
    for each in paths:
        with _progress(each.name, is_quiet=as_json) as on_progress:
            mode = "fast" if fast else "full"
            report = check(each, mode=mode, threads=threads, on_progress=on_progress)  # type: ignore[arg-type]
        reports.append(report)
        if not as_json:
            _print_report(report)
    latest = find_latest_damage(path) if is_folder else None
    is_ok = latest is None and all(report.is_ok for report in reports)
    if as_json:
        found = [report.as_dict() for report in reports]
        print_json({"ok": is_ok, "checkpoints": found, "latest": latest and str(latest)})
    elif latest is not None:
        typer.echo(str(latest))
    if not is_ok:
        raise typer.Exit(1)


@app.command("prune")
def prune(
    folder: Folder,
    keep: Annotated[int, typer.Option("--keep", min=1, help="How many of the newest stay.")],
    keep_every: Annotated[
        int | None,
        typer.Option("--keep-every", min=1, help="Those whose step is a multiple of it stay too."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old complete checkpoints: never the newest one, nor the one that `latest` names.

    Tags with slashes are thinned out too, in each sub-folder by itself.
    """
    from lowtide.checkpoint.store.retention import prune as remove_old

    done = remove_old(folder, keep=keep, keep_every=keep_every, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, **done.as_dict()})
        return
    verb = "would remove" if dry_run else "removed"
    for entry in done.removed:
        typer.echo(f"{verb} {entry.tag} ({size_text(entry.size_bytes)})")
    typer.echo(
        f"{verb} {len(done.removed)} of {len(done.removed) + len(done.kept)} complete checkpoints, "
        f"{size_text(done.removed_bytes)}"
    )


@app.command("diff")
def diff(first: Item, second: Item, as_json: AsJson = False) -> None:
    """Show which tensors of two checkpoints, or of two torch files, differ. Exit code 1 if any.

    Unpickles both: only for files that you trust.
    """
    from lowtide.checkpoint.state.compare import compare

    with others_on_stderr(), _working(is_quiet=as_json) as on_file:
        found = compare(first, second, on_file=on_file)
    if as_json:
        print_json({"same": not found, "differences": [d.as_dict() for d in found]})
    elif not found:
        typer.echo("no difference")
    else:
        table = table_of("file", "name", "what", "dtype", "shape", "max |A - B|", "elements")
        for d in found:
            largest = "" if d.max_abs_difference is None else f"{d.max_abs_difference:.3g}"
            count = "" if d.differing_elements is None else f"{d.differing_elements:,}"
            table.add_row(d.file, d.name, d.kind, d.dtype, d.shape, largest, count)
        print_table(table)
    if found:
        raise typer.Exit(1)


@app.command("export")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the safetensors files to.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help='E.g. "bfloat16". [default: as saved, fp32]')
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the parameters as safetensors, for Hugging Face loaders."""
    import torch

    from lowtide.checkpoint import state

    wanted = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not isinstance(wanted, torch.dtype):
        raise CheckpointError(
            f'--dtype: got "{dtype}", allowed is the name of a torch type, e.g. "float32"'
        )
    with others_on_stderr():
        files = state.export(checkpoint, out, dtype=wanted)
    if as_json:
        sizes = {path.name: path.stat().st_size for path in files}
        print_json({"out": str(out), "files": sizes})
    else:
        for path in files:
            typer.echo(f"{path} ({size_text(path.stat().st_size)})")


@app.command("expand")
def expand(
    source: Annotated[Path, typer.Argument(help="The folder of a compact checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to make, such as checkpoints/step100.")],
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint again from its compact copy, so that any tool can load it."""
    from lowtide.checkpoint.compact.copies import beside
    from lowtide.checkpoint.compact.copies import expand as make_again

    files = make_again(source, target, find_base=beside(source))
    if as_json:
        sizes = {file.path.relative_to(target).as_posix(): file.size_bytes for file in files}
        print_json({"target": str(target), "files": sizes})
    else:
        total_bytes = sum(file.size_bytes for file in files)
        typer.echo(f"{target}: {len(files)} files, {size_text(total_bytes)}")


def _checkpoints_at(path: Path, *, all_of_them: bool) -> tuple[list[Path], bool]:
    """Return the checkpoints to look at, and whether `path` is a folder of checkpoints."""
    from lowtide.checkpoint.store.catalog import is_checkpoint, list_checkpoints

    if is_checkpoint(path):
        return [path], False
    done = ("complete", "unverified", "incomplete")
    paths = [entry.path for entry in list_checkpoints(path, below=True) if entry.state in done]
    if not paths:
        raise CheckpointError(
            f"{path}: holds no checkpoint; pass a checkpoint, or what save_checkpoint was given"
        )
    return (paths if all_of_them else paths[:1]), True


def _print_entries(entries: list[Entry]) -> None:
    table = table_of("tag", "step", "state", "size", "files", "ranks", "written")
    for e in entries:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(e.time_s))
        color = _MARKS.get(e.state, "yellow")
        table.add_row(
            f"{e.tag}{'  <- latest' if e.is_latest else ''}",
            "" if e.step is None else str(e.step),
            f"[{color}]{e.state}[/{color}]{_notes(e)}",
            size_text(e.size_bytes), str(e.files),
            "" if e.world_size is None else str(e.world_size), written,
        )  # fmt: skip
    print_table(table)


def _notes(entry: Entry) -> str:
    notes = [] if entry.is_published else ["not named yet"]
    return "".join(f", {note}" for note in [*notes, *(["compact"] if entry.is_compact else [])])


def _print_report(report: Report) -> None:
    kind = "" if report.is_checksummed else ", no checksums by Lowtide: torch's own were checked"
    rate = report.read_bytes / max(report.wall_s, 1e-9)
    typer.echo(
        f"{report.path.name}: {'ok' if report.is_ok else 'DAMAGED'} ({report.mode}, "
        f"{size_text(report.read_bytes)} read at {size_text(rate)}/s{kind})"
    )
    for damage in report.damage:
        typer.echo(f"  {damage}")


@contextmanager
def _progress(name: str, *, is_quiet: bool) -> Iterator[OnProgress | None]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    if is_quiet or not console.is_terminal:
        yield None
        return
    columns: Any = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _working(*, is_quiet: bool) -> Iterator[Any]:
    from rich.console import Console

    console = Console(stderr=True)
    if is_quiet or not console.is_terminal:
        yield None
        return
    with console.status("reading") as status:
        yield lambda name: status.update(f"reading {name}")
