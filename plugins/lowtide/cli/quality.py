"""``lowtide quality``: how good a reconstruction is, what a codec does, which codec to take."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.arrays import configuration, read_tensors
from lowtide.cli.output import plain, print_json, print_table, size_text, table_of
from lowtide.core.errors import CodecError, ConfigError, DataError, listed

if TYPE_CHECKING:
    from lowtide.quality.predictors import Predictor
    from lowtide.quality.selection import Selection

app = typer.Typer(help="Measure quality, and choose codec and bound by it.", no_args_is_help=True)

Source = Annotated[Path, typer.Argument(help="A .npy or .safetensors file.")]
Names = Annotated[
    list[str] | None, typer.Option("--tensor", help="Only this one; may be given several times.")
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="A metric, such as ssim or error_autocorr:5; several times."),
]
Candidates = Annotated[
    str, typer.Option("--candidates", help='JSON: [{"codec": ..., "mode": ..., "bounds": ...}]')
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def evaluate(
    original: Source,
    reconstructed: Source,
    metric: Metrics = None,
    tensor: Names = None,
    as_json: AsJson = False,
) -> None:
    """Compare two files, tensor by tensor."""
    from lowtide.quality import evaluate as compare

    after = dict(read_tensors(reconstructed, tensor))
    found = {}
    for name, values in read_tensors(original, tensor):
        other = name if name in after else next(iter(after), "")
        if name not in after and (len(after) > 1 or original.suffix == ".safetensors"):
            raise DataError(f"{reconstructed}: has no tensor {name}; it holds {listed(after)}")
        with _naming(original, name):
            found[name] = compare(values, after[other], metric)
    if as_json:
        print_json({"tensors": {name: each.as_dict() for name, each in found.items()}})
        return
    table = table_of("tensor", *_names(found), "exact", "NaN/inf kept", "broken")
    for name, each in found.items():
        table.add_row(
            plain(name), *map(_number, each.values()), "yes" if each.is_exact else "no",
            str(each.nonfinite), str(each.mismatched),
        )  # fmt: skip
    print_table(table)


@app.command()
def measure(
    source: Source,
    codec: Annotated[
        str, typer.Option("--codec", help="Name of a codec, or its configuration as JSON.")
    ] = "lowtide.sz",
    mode: Annotated[str | None, typer.Option("--mode", help='"abs", "rel" or "pw_rel".')] = None,
    bound: Annotated[float | None, typer.Option("--bound", help="Largest error.")] = None,
    metric: Metrics = None,
    tensor: Names = None,
    as_json: AsJson = False,
) -> None:
    """Encode and decode each tensor with one codec; exit code 1 if a bound were broken."""
    from lowtide.quality import dataset_ratio
    from lowtide.quality import measure as measured

    given = {"mode": mode, "bound": bound}
    config = configuration(codec) | {k: v for k, v in given.items() if v is not None}
    reports = {}
    for name, values in read_tensors(source, tensor):
        with _naming(source, name):
            reports[name] = measured(values, config, metric)
    total = dataset_ratio(reports.values())
    broken = [name for name, report in reports.items() if report.is_within_bound is False]
    if as_json:
        tensors = {name: report.as_dict() for name, report in reports.items()}
        print_json({"tensors": tensors, "compression_ratio": total, "broken_bounds": broken})
    else:
        evaluations = {name: report.evaluation for name, report in reports.items()}
        table = table_of("tensor", "from", "to", "ratio", "bits/value", "bound kept",
                         *_names(evaluations))  # fmt: skip
        for name, report in reports.items():
            kept = {None: "none given", True: "yes", False: "NO"}[report.is_within_bound]
            table.add_row(
                plain(name), size_text(report.raw_bytes), size_text(report.stored_bytes),
                _number(report.ratio), _number(report.bit_rate), kept,
                *map(_number, report.evaluation.values()),
            )  # fmt: skip
        print_table(table)
        typer.echo(f"ratio of all: {_number(total)}")
    if broken:
        typer.echo(f"lowtide: {source}: bound broken in {listed(broken)}; report it", err=True)
        raise typer.Exit(1)


@app.command()
def select(
    source: Source,
    target: Annotated[
        list[str], typer.Option("--target", help="METRIC=VALUE, such as psnr_db=60; several times.")
    ],
    candidates: Candidates = "auto",
    objective: Annotated[
        str, typer.Option("--objective", help="compression_ratio, or psnr_db at a size.")
    ] = "compression_ratio",
    predictor: Annotated[
        str | None,
        typer.Option("--predictor", help="closed_form, block_sampling, or fit's file."),
    ] = None,
    tensor: Names = None,
    as_json: AsJson = False,
) -> None:
    """Find the codec and bound with the best ratio that meet the targets, by measuring."""
    from lowtide.quality.selection import select as selected

    targets = dict(_target(text) for text in target)
    wanted = _candidates(candidates)
    found: dict[str, Selection] = {}
    for name, values in read_tensors(source, tensor):
        with _naming(source, name):
            found[name] = selected(
                values, targets, wanted, objective, _predictor(predictor),
            )  # fmt: skip
    raw = sum(each.raw_bytes for each in found.values())
    stored = sum(each.stored_bytes for each in found.values())
    total = raw / stored if stored else None
    if as_json:
        tensors = {name: each.as_dict() for name, each in found.items()}
        print_json({"tensors": tensors, "compression_ratio": total})
        return
    table = table_of("tensor", "from", "codec", "ratio", *targets, "decision", "measured", "s")
    for name, each in found.items():
        report = each.measured
        values = [None if report is None else report.value(name) for name in targets]
        reason = f" ({each.fallback_reason})" if each.fallback_reason else ""
        table.add_row(
            plain(name), size_text(each.raw_bytes), str(each.candidate or "none"),
            _number(each.ratio), *map(_number, values), each.decision + reason,
            str(each.measurements), f"{each.elapsed_s:.2f}",
        )  # fmt: skip
    print_table(table)
    typer.echo(f"ratio of all: {_number(total)}")


@app.command()
def fit(
    sources: Annotated[
        list[Path], typer.Argument(help=".npy or .safetensors files: the same tensors over time.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Surrogate to write, .safetensors.")],
    candidates: Candidates = "auto",
    tensor: Names = None,
    as_json: AsJson = False,
) -> None:
    """Measure candidates on tensors, and learn to predict what was measured.

    Tensors of one name (in .npy files: of one shape) are one series, in the order of the files.
    """
    from lowtide.quality.candidates import families_of
    from lowtide.quality.surrogate.model import QualitySurrogate
    from lowtide.quality.surrogate.samples import Sample, learning_candidates
    from lowtide.quality.surrogate.samples import labelled as measured

    families = families_of(_candidates(candidates), "--candidates")
    samples: list[Sample] = []
    skipped: dict[str, str] = {}
    for step, source in enumerate(sources):
        for name, values in read_tensors(source, tensor):
            series = name if source.suffix == ".safetensors" else str(tuple(values.shape))
            found = Sample(values, [], series, step)
            try:
                spread = found.seen[0].value_range
            except DataError as error:
                skipped[f"{source}: {name}"] = str(error)
                continue
            asked = learning_candidates(families, spread)
            samples.append(measured(values, asked, series=series, step=step))
    surrogate = QualitySurrogate().fit(samples)
    surrogate.save(output)
    about = surrogate.describe()
    labels = sum(len(each.labels) for each in samples)
    if as_json:
        print_json({**about, "samples": len(samples), "labels": labels, "skipped": skipped})
        return
    for where, reason in skipped.items():
        typer.echo(f"left out: {where}: {reason}", err=True)
    table = table_of("codec", "bounds", "calibrated on")
    for name, head in about["heads"].items():
        low, high = head["bounds"]
        table.add_row(name, f"{low:.3g} to {high:.3g}", str(max(head["calibration_count"])))
    print_table(table)
    typer.echo(f"{output}: learned from {len(samples)} tensors, {labels} measurements")


@app.command()
def predict(
    source: Source,
    model: Annotated[Path, typer.Option("--model", help="What `fit` wrote.")],
    candidates: Candidates = "auto",
    tensor: Names = None,
    as_json: AsJson = False,
) -> None:
    """Predict sizes and qualities without running a codec."""
    from lowtide.quality.candidates import families_of
    from lowtide.quality.predictors import Estimate
    from lowtide.quality.surrogate.model import QualitySurrogate
    from lowtide.quality.surrogate.samples import learning_candidates

    families = families_of(_candidates(candidates), "--candidates")
    surrogate = QualitySurrogate.load(model)
    found: dict[str, list[Estimate]] = {}
    for name, values in read_tensors(source, tensor):
        with _naming(source, name):
            handle = surrogate.extract_features(values)
            asked = learning_candidates(families, handle.plain.value_range)
            found[name] = surrogate.predict_from_features(handle, asked)
    if as_json:
        print_json({"tensors": {n: [each.as_dict() for each in e] for n, e in found.items()}})
        return
    metrics = surrogate.settings.metrics
    table = table_of("tensor", "codec", "familiar", *metrics)
    for name, estimates in found.items():
        for each in estimates:
            cells = [
                f"{i.value:.3g} ({i.lower:.3g} to {i.upper:.3g})" if i is not None else "-"
                for i in map(each.metrics.get, metrics)
            ]
            table.add_row(
                plain(name), str(each.candidate), "yes" if each.is_familiar else "NO", *cells
            )
    print_table(table)


def _predictor(name: str | None) -> Predictor | None:
    from lowtide.quality.predictors import predictor_of
    from lowtide.quality.surrogate.model import QualitySurrogate

    if name is None:
        return None
    return QualitySurrogate.load(name) if name.endswith(".safetensors") else predictor_of(name)


def _candidates(text: str) -> Any:
    return text if text == "auto" else _json("--candidates", text)


@contextlib.contextmanager
def _naming(path: Path, name: str) -> Iterator[None]:
    """Say in errors about data which tensor of which file it was."""
    try:
        yield
    except (CodecError, DataError) as error:
        raise DataError(f"{path}: tensor {name}: {error}") from error


def _target(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError(text)
        return name, float(value)
    except ValueError as error:
        raise ConfigError(f"--target: got {text}, allowed is METRIC=VALUE: psnr_db=60") from error


def _json(option: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {text} is not JSON: {error}") from error


def _names(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(next(iter(found.values()), {}))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if math.isfinite(value) else str(value)
