"""``lowtide kmeans``: cluster the rows of an array in a file, and find the clusters of others."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.arrays import read_matrix, read_npy, shape_text
from lowtide.cli.output import print_json, print_table, table_of, whole_file
from lowtide.core.errors import LowtideError, UncorrectedFaultError

if TYPE_CHECKING:
    from lowtide.kmeans.protection import FaultReport

app = typer.Typer(help="Cluster the rows of an array.", no_args_is_help=True)

_Samples = Annotated[
    Path, typer.Argument(help="A .npy or .safetensors file with one sample in each row.")
]
_Tensor = Annotated[str | None, typer.Option("--tensor", help="Its name in a .safetensors file.")]
_Faults = Annotated[
    str, typer.Option("--fault-tolerance", help='"off", "detect", "correct" or "recompute".')
]
_Backend = Annotated[str, typer.Option("--backend", help='"auto", "native" or "torch".')]
_Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("fit")
def fit(
    source: _Samples,
    out: Annotated[Path, typer.Option("--out", help="The .npy file for the centroids.")],
    clusters: Annotated[int, typer.Option("--clusters", min=1, help="How many to find.")],
    labels: Annotated[
        Path | None, typer.Option("--labels", help="A .npy file for each row's cluster.")
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            "--init", help='"k-means++", "k-means||", "random", or a .npy file of centroids.'
        ),
    ] = "k-means++",
    runs: Annotated[
        int | None, typer.Option("--runs", min=1, help="Starts, the best of which is kept.")
    ] = None,
    max_iter: Annotated[int, typer.Option("--max-iter", min=1, help="Iterations at most.")] = 300,
    tol: Annotated[
        float,
        typer.Option("--tol", min=0, help="Shift that ends a run, times the mean variance."),
    ] = 1e-4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random numbers.")] = 0,
    fault_tolerance: _Faults = "off",
    backend: _Backend = "auto",
    tensor: _Tensor = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Find centroids, and write them.

    Exit code 1, and nothing written, if silent errors were found that could not be put right.
    """
    import numpy as np

    from lowtide.kmeans import KMeans
    from lowtide.kmeans.samples import to_numpy

    if labels is not None and labels == out:
        raise LowtideError(f"--labels and --out are both {out}; name two files")
    model = KMeans(
        clusters, init=read_npy(Path(init)) if init.endswith(".npy") else init,
        n_init="auto" if runs is None else runs, max_iter=max_iter, tol=tol, random_state=seed,
        backend=backend, fault_tolerance=fault_tolerance, verbose=1,
    )  # fmt: skip
    samples = read_matrix(source, tensor)
    begin_s = time.perf_counter()
    with whole_file(out, may_replace=force) as file, _iterations(is_quiet=as_json):
        _or_exit(lambda: model.fit(samples), f"{out} is not written")
        np.lib.format.write_array(file, to_numpy(model.cluster_centers_), allow_pickle=False)
        if labels is not None:
            with whole_file(labels, may_replace=force) as other:
                np.lib.format.write_array(other, to_numpy(model.labels_), allow_pickle=False)
    sizes = np.bincount(to_numpy(model.labels_), minlength=clusters)
    found: dict[str, Any] = {
        "source": str(source), "out": str(out), "labels": None if labels is None else str(labels),
        "shape": list(samples.shape), "dtype": str(to_numpy(model.cluster_centers_).dtype),
        "clusters": clusters, "iterations": model.n_iter_, "inertia": model.inertia_,
        "smallest": int(sizes.min()), "largest": int(sizes.max()),
        "seconds": time.perf_counter() - begin_s, "faults": model.fault_report_.as_dict(),
    }  # fmt: skip
    if as_json:
        print_json(found)
        return
    table = table_of("samples", "dtype", "clusters", "iterations", "inertia", "sizes", "faults")
    table.add_row(
        shape_text(found["shape"]), found["dtype"], str(clusters), str(model.n_iter_),
        f"{model.inertia_:.6g}", f"{sizes.min()} to {sizes.max()}",
        _faults_text(model.fault_report_),
    )  # fmt: skip
    print_table(table)


@app.command("predict")
def predict(
    source: _Samples,
    centroids: Annotated[Path, typer.Argument(help="What `lowtide kmeans fit` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The .npy file for each row's cluster.")],
    fault_tolerance: _Faults = "off",
    backend: _Backend = "auto",
    tensor: _Tensor = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Find the nearest centroid of each row, and write its number.

    Exit code 1, and nothing written, if silent errors were found that could not be put right.
    """
    import numpy as np

    from lowtide.kmeans import KMeans
    from lowtide.kmeans.samples import to_numpy

    model = KMeans.from_centroids(
        read_npy(centroids), backend=backend, fault_tolerance=fault_tolerance
    )
    samples = read_matrix(source, tensor)
    with whole_file(out, may_replace=force) as file:
        labels = to_numpy(_or_exit(lambda: model.predict(samples), f"{out} is not written"))
        np.lib.format.write_array(file, labels, allow_pickle=False)
    sizes = np.bincount(labels, minlength=model.n_clusters)
    found: dict[str, Any] = {
        "source": str(source), "out": str(out), "shape": list(samples.shape),
        "clusters": model.n_clusters, "smallest": int(sizes.min()), "largest": int(sizes.max()),
    }  # fmt: skip
    if as_json:
        print_json(found)
        return
    table = table_of("samples", "clusters", "sizes")
    sizes_text = f"{sizes.min()} to {sizes.max()}"
    table.add_row(shape_text(found["shape"]), str(model.n_clusters), sizes_text)
    print_table(table)


def _or_exit(work: Any, instead: str) -> Any:
    try:
        return work()
    except UncorrectedFaultError as error:
        typer.echo(f"lowtide: {error}; {instead}", err=True)
        raise typer.Exit(1) from None


def _faults_text(report: FaultReport) -> str:
    if not report.checks:
        return "not looked for"
    return f"{report.detected} in {report.checks:,} checks"


@contextmanager
def _iterations(*, is_quiet: bool) -> Iterator[None]:
    """Show the iterations that a fit logs, where somebody looks."""
    from rich.console import Console

    console = Console(stderr=True)
    if is_quiet or not console.is_terminal:
        yield
        return
    logger = logging.getLogger("lowtide")
    level = logger.level
    with console.status("starting") as status:
        handler = logging.Handler()
        handler.emit = lambda record: status.update(record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
