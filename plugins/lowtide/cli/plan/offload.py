"""``lowtide plan offload``: one optimizer update between host and GPU, beside other schedules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.output import print_json
from lowtide.core.errors import ConfigError, TelemetryError

if TYPE_CHECKING:
    from rich.console import Console

    from lowtide.offload.outlook import Outlook
    from lowtide.offload.rates import PathRates, Profile, Rates
    from lowtide.offload.schedule import Piece

DEFAULT_MEMORY_SHARE = 0.1  # of the device's memory
_COLOURS = {
    "host": ("blue", "cyan"),
    "downcast": ("blue", "cyan"),
    "prefetch": ("green", "bright_green"),
    "upload": ("yellow", "bright_yellow"),
    "device": ("magenta", "bright_magenta"),
    "flush": ("red", "bright_red"),
    "read": ("green", "bright_green"),
    "write": ("red", "bright_red"),
}


Params = Annotated[float, typer.Option("--params", help="Parameters of the model, e.g. 20e9.")]
Gpu = Annotated[str, typer.Option("--gpu", help="A GPU's name, e.g. H100-80GB.")]
Ranks = Annotated[int, typer.Option("--ranks", help="GPUs, all on one host.")]
SubgroupSize = Annotated[float, typer.Option("--subgroup-size", help="Parameters in a subgroup.")]
MemoryGb = Annotated[
    float | None,
    typer.Option("--memory-gb", help="GPU memory to plan with; else a tenth."),
]
Fraction = Annotated[
    float | None, typer.Option("--fraction", help="Share to stage; else the best.")
]
Slots = Annotated[int, typer.Option("--slots", help="Staging slots at most.")]
GradientBytes = Annotated[
    int, typer.Option("--gradient-bytes", help="Gradient to upload: 0, 2 or 4 bytes each.")
]
NoResidents = Annotated[
    bool, typer.Option("--no-residents", help="Keep nothing on the GPU between steps.")
]
LinkGbPerS = Annotated[
    float | None, typer.Option("--link-gb-per-s", help="Pinned copies, each direction.")
]
HalfDuplex = Annotated[
    bool, typer.Option("--half-duplex", help="The two directions share the link.")
]
HostParamsPerS = Annotated[
    float | None, typer.Option("--host-params-per-s", help="Adam on one rank's cores.")
]
HostMemoryGbPerS = Annotated[
    float | None, typer.Option("--host-memory-gb-per-s", help="One rank's share.")
]
DeviceParamsPerS = Annotated[
    float | None, typer.Option("--device-params-per-s", help="Adam on the GPU.")
]
Storage = Annotated[
    list[str] | None,
    typer.Option("--storage", help="A path's GB/s for one rank, READ/WRITE; once per path."),
]
HostMemoryGb = Annotated[
    float | None,
    typer.Option("--host-memory-gb", help="One rank's host memory for state; with --storage."),
]
ChromeTrace = Annotated[
    Path | None, typer.Option("--chrome-trace", help="Also write the update, for Perfetto.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def offload(
    params: Params,
    gpu: Gpu,
    ranks: Ranks = 1,
    subgroup_size: SubgroupSize = 1e8,
    memory_gb: MemoryGb = None,
    fraction: Fraction = None,
    slots: Slots = 2,
    gradient_bytes: GradientBytes = 2,
    no_residents: NoResidents = False,
    link_gb_per_s: LinkGbPerS = None,
    half_duplex: HalfDuplex = False,
    host_params_per_s: HostParamsPerS = None,
    host_memory_gb_per_s: HostMemoryGbPerS = None,
    device_params_per_s: DeviceParamsPerS = None,
    storage: Storage = None,
    host_memory_gb: HostMemoryGb = None,
    chrome_trace: ChromeTrace = None,
    as_json: AsJson = False,
) -> None:
    """Plan one optimizer update between host and GPU, and compare it with other schedules.

    Rates that are not given come from data sheets: modelled, not measured.
    """
    from lowtide.offload.outlook import cut, look_ahead
    from lowtide.offload.rates import profile

    found = profile(gpu)
    rates = _changed(
        found.rates(ranks=ranks),
        host_to_device_bytes_per_s=_giga(link_gb_per_s),
        device_to_host_bytes_per_s=_giga(link_gb_per_s),
        is_duplex=False if half_duplex else None,
        host_params_per_s=host_params_per_s,
        host_memory_bytes_per_s=_giga(host_memory_gb_per_s),
        device_params_per_s=device_params_per_s,
        paths=tuple(_path(text) for text in storage or []),
    )
    paths = rates.paths
    memory_bytes = _memory_bytes(found, memory_gb)
    numel = -(-_whole("--params", params) // ranks)
    pieces = cut(
        numel, _whole("--subgroup-size", subgroup_size),
        gradient_upload_bytes=gradient_bytes, keeps_gradient=True,
    )  # fmt: skip
    pieces, buffers = _stored(pieces, paths, host_memory_gb)
    outlook = look_ahead(
        pieces,
        rates,
        memory_bytes=memory_bytes,
        fraction="auto" if fraction is None else fraction,
        keep_residents=not no_residents,
        max_slots=slots,
        buffers=buffers,
    )
    if chrome_trace is not None:
        _write_trace(chrome_trace, outlook)
    if as_json:
        asked = {"gpu": gpu, "ranks": ranks, "memory_bytes": memory_bytes}
        print_json({**asked, **_as_dict(outlook)})
        return
    title = f"{params / ranks / 1e9:.4g}B parameters in {len(pieces)} subgroups on each {gpu}"
    _print_outlook(outlook, title, memory_bytes)


def _path(text: str) -> PathRates:
    from lowtide.offload.rates import PathRates

    read, _, write = text.partition("/")
    try:
        return PathRates(
            read_bytes_per_s=float(read) * 1e9, write_bytes_per_s=float(write or read) * 1e9
        )
    except ValueError as error:
        raise ConfigError(
            f"--storage: got {text!r}, allowed is READ/WRITE in GB/s, such as 6.5/3"
        ) from error


def _stored(
    pieces: list[Piece], paths: tuple[PathRates, ...], host_memory_gb: float | None
) -> tuple[list[Piece], int]:
    """Return the pieces, some of them stored, and the number of staging buffers."""
    from lowtide.offload.outlook import choose_buffers, store

    if not paths and host_memory_gb is None:
        return pieces, 1
    if not paths:
        raise ConfigError("--host-memory-gb: limits what stays in memory; name a --storage too")
    if host_memory_gb is None or not host_memory_gb > 0:
        raise ConfigError(
            f"--host-memory-gb: got {host_memory_gb}, and --storage takes what does not fit there; "
            "allowed is a number above 0"
        )
    memory_bytes = host_memory_gb * 1e9
    buffers = choose_buffers(pieces, paths, memory_bytes=memory_bytes)
    return store(pieces, paths, memory_bytes=memory_bytes, buffers=buffers), buffers


def _as_dict(outlook: Outlook) -> dict[str, Any]:
    return {
        "rates": outlook.rates.as_dict(),
        "plan": outlook.plan.as_dict(),
        "schedules": [forecast.as_dict() for forecast in outlook.forecasts],
    }


def _whole(name: str, value: float) -> int:
    if not 1 <= value <= 1e15:
        raise ConfigError(f"{name}: got {value:g}, allowed is 1 to 1e15")
    return int(value)


def _giga(value: float | None) -> float | None:
    return None if value is None else value * 1e9


def _changed(rates: Rates, **changes: Any) -> Rates:
    return rates.replace(**{k: value for k, value in changes.items() if value is not None})


def _memory_bytes(profile: Profile, memory_gb: float | None) -> float:
    if memory_gb is None:
        return DEFAULT_MEMORY_SHARE * profile.memory_bytes
    if not 0 <= memory_gb * 1e9 <= profile.memory_bytes:
        raise ConfigError(
            f"--memory-gb: got {memory_gb:g}, allowed is 0 to {profile.memory_bytes / 1e9:g}, "
            "which is what the GPU has"
        )
    return memory_gb * 1e9


def _write_trace(path: Path, outlook: Outlook) -> None:
    from lowtide.core.telemetry import Span, chrome_trace

    spans = [
        Span(
            f"piece {span.piece}",
            span.lane,
            span.begin_s,
            span.end_s,
            {"piece": span.piece, "numel": outlook.pieces[span.piece].numel},
        )
        for span in outlook.simulation.trace
    ]
    try:
        path.write_text(json.dumps(chrome_trace(spans, rank=0)), encoding="utf-8")
    except OSError as error:
        raise TelemetryError(f"{path}: cannot write the trace: {error}") from error


def _print_outlook(outlook: Outlook, title: str, memory_bytes: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    plan, bound_s = outlook.plan, outlook.plan.lower_bound_s or 0.0
    console.print(title, style="bold", highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("one update", min_width=12)  # may be broken into lines; a figure may not
    is_stored = bool(plan.stored_order)
    headings = ["ms", "x bound", "on GPU", "GB there", "GB back", "GB held"]
    for heading in headings + (["GB read"] if is_stored else []):
        table.add_column(heading, justify="right", no_wrap=True)
    for forecast in outlook.forecasts:
        is_ours = forecast is outlook.forecasts[-1]
        table.add_row(
            forecast.name,
            f"{forecast.update_s * 1e3:.1f}",
            f"{forecast.update_s / bound_s:.2f}",
            f"{forecast.on_device:.0%}",
            f"{forecast.to_device_bytes / 1e9:.2f}",
            f"{forecast.to_host_bytes / 1e9:.2f}",
            f"{forecast.device_bytes / 1e9:.2f}",
            *([f"{forecast.storage_bytes / 1e9:.2f}"] if is_stored else []),
            style="bold" if is_ours else None,
        )
    table.add_row(
        "lower bound", f"{bound_s * 1e3:.1f}", "1.00", "", "", "", f"{memory_bytes / 1e9:.2f}"
    )
    console.print(table)
    console.print(_division(outlook), highlight=False)
    console.print(_orders(outlook), highlight=False)
    _print_lanes(console, outlook)
    saved = outlook.forecasts[0].update_s / outlook.forecasts[-1].update_s
    console.print(
        f"{saved:.2f} times as fast as {_first(outlook)}, if the rates hold: they are "
        "modelled from data sheets where not given.",
        highlight=False,
    )
    if plan.is_host_only:
        console.print("The GPU would not help within this memory.", highlight=False)


def _division(outlook: Outlook) -> str:
    plan = outlook.plan
    stored = (
        f"{len(plan.stored_order)} from storage in {plan.buffers} buffers, of which "
        f"{plan.carried} stay full, "
        if plan.stored_order
        else ""
    )
    return (
        f"fraction {plan.fraction:.3f}: {len(plan.host_order)} on the host, {stored}"
        f"{len(plan.staged)} "
        f"staged in {plan.slots} slot(s) of {_gb(plan.slot_bytes)}, {len(plan.residents)} resident"
    )


def _orders(outlook: Outlook) -> str:
    plan = outlook.plan
    stored = f"; from storage: {_runs(plan.stored_order)}" if plan.stored_order else ""
    return f"host: {_runs(plan.host_order)}; GPU: {_runs(plan.device_order)}{stored}"


def _first(outlook: Outlook) -> str:
    name = outlook.forecasts[0].name
    return "the stock loop" if name == "stock loop" else "one thing after another"


def _runs(order: Any) -> str:
    """Return numbers in order, runs of neighbours as one: 3-7 12 14-15."""
    parts: list[list[int]] = []
    for i in order:
        if parts and i == parts[-1][-1] + 1:
            parts[-1][1:] = [i]
        else:
            parts.append([i])
    texts = ["-".join(map(str, part)) for part in parts]
    return " ".join(texts[:12]) + (" ..." if len(texts) > 12 else "") if texts else "none"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _print_lanes(console: Console, outlook: Outlook) -> None:
    """Draw who works when; neighbouring pieces of a lane have different shades."""
    from rich.text import Text

    from lowtide.offload.picture import in_order, lane_rows, mark

    simulation = outlook.simulation
    columns = max(20, console.width - 16)
    rows = lane_rows(simulation.trace, simulation.makespan_s, columns)
    for lane in in_order(rows):
        line = Text(f"{lane:<9}")
        for busy, number in rows[lane]:
            line.append(mark(busy), style=_COLOURS[lane.rstrip("0123456789")][number % 2])
        line.append(f" {simulation.busy_s[lane] / simulation.makespan_s:4.0%}")
        console.print(line, no_wrap=True)
    end = f"{simulation.makespan_s * 1e3:.0f} ms"
    console.print(" " * 9 + "0" + end.rjust(columns - 1), highlight=False)
