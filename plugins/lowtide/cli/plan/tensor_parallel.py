"""``lowtide plan tensor_parallel``: bytes, messages, memory and time of ways to shard a model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from lowtide.cli.output import print_json
from lowtide.core.errors import ConfigError

if TYPE_CHECKING:
    from lowtide.tensor_parallel.footprint import DecoderShape
    from lowtide.tensor_parallel.outlook import Forecast, Outlook

Model = Annotated[
    str | None, typer.Option("--model", help="A model's name, e.g. llama-7b; or give widths.")
]
Width = Annotated[int | None, typer.Option("--width", help="Of the residual stream.")]
MlpWidth = Annotated[int | None, typer.Option("--mlp-width", help="Between gate/up and down.")]
Layers = Annotated[int | None, typer.Option("--layers", help="Decoder blocks.")]
Heads = Annotated[int | None, typer.Option("--heads", help="Query heads.")]
KvHeads = Annotated[
    int | None, typer.Option("--kv-heads", help="Key and value heads; else as many as heads.")
]
HeadWidth = Annotated[
    int | None, typer.Option("--head-width", help="Of one head; else width over heads.")
]
Vocabulary = Annotated[int | None, typer.Option("--vocabulary", help="Rows of the embedding.")]
Tied = Annotated[
    bool | None, typer.Option("--tied/--untied", help="Embedding and head are one matrix.")
]
Rank = Annotated[int | None, typer.Option("--rank", help="Width of each latent.")]
RankRatio = Annotated[
    float | None,
    typer.Option("--rank-ratio", help="Rank as a share of the width; 0.25 if none is given."),
]
Crossing = Annotated[
    str | None,
    typer.Option(
        "--crossing",
        help="Gate between latents of neighbouring blocks (LaX): identity, scalar, linear or "
        "low_rank; else none.",
    ),
]
Gpus = Annotated[int, typer.Option("--gpus", help="GPUs that share each layer, in one node.")]
Gpu = Annotated[str, typer.Option("--gpu", help="A GPU's name, e.g. A100 or H100-80GB.")]
Sequence = Annotated[int, typer.Option("--sequence", help="Tokens in a sequence.")]
MicroBatch = Annotated[int, typer.Option("--micro-batch", help="Sequences in a micro-batch.")]
Tier = Annotated[
    str,
    typer.Option("--tier", help="Checkpointing: none, latents or sharded_latents."),
]
Overlap = Annotated[
    bool,
    typer.Option("--overlap-forward", help="Halves of the micro-batch take turns in ours."),
]
LinkGbPerS = Annotated[
    float | None, typer.Option("--link-gb-per-s", help="What a ring reaches per GPU.")
]
HopUs = Annotated[float | None, typer.Option("--hop-us", help="Fixed time of a ring's step.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def tensor_parallel(
    model: Model = None,
    gpu: Gpu = "A100-80GB",
    gpus: Gpus = 4,
    rank: Rank = None,
    rank_ratio: RankRatio = None,
    crossing: Crossing = None,
    sequence: Sequence = 4096,
    micro_batch: MicroBatch = 4,
    tier: Tier = "none",
    overlap_forward: Overlap = False,
    width: Width = None,
    mlp_width: MlpWidth = None,
    layers: Layers = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_width: HeadWidth = None,
    vocabulary: Vocabulary = None,
    tied: Tied = None,
    link_gb_per_s: LinkGbPerS = None,
    hop_us: HopUs = None,
    as_json: AsJson = False,
) -> None:
    """Compare full-rank, naive low-rank and bottleneck-aware tensor parallelism.

    Times are modelled, not measured.
    """
    from lowtide.tensor_parallel.costs import HOP_S, machine
    from lowtide.tensor_parallel.outlook import look_ahead
    from lowtide.tensor_parallel.timing import Batch

    changes = {
        "width": width,
        "mlp_width": mlp_width,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": head_width,
        "vocabulary": vocabulary,
        "is_tied": tied,
    }
    decoder = _decoder(model, changes, rank=rank, rank_ratio=rank_ratio, crossing=crossing)
    made = machine(
        gpu,
        link_bytes_per_s=None if link_gb_per_s is None else link_gb_per_s * 1e9,
        hop_s=HOP_S if hop_us is None else hop_us * 1e-6,
    )
    batch = Batch(micro_batch=micro_batch, sequence=sequence)
    outlook = look_ahead(
        decoder, gpus, machine=made, batch=batch, tier=tier, overlap_forward=overlap_forward
    )
    if as_json:
        print_json(outlook.as_dict())
        return
    _print_outlook(outlook, model or "decoder")


def _decoder(
    name: str | None,
    changes: dict[str, int | bool | None],
    *,
    rank: int | None,
    rank_ratio: float | None,
    crossing: str | None,
) -> DecoderShape:
    from lowtide.tensor_parallel.presets import Preset, preset, rank_of

    given = {key: value for key, value in changes.items() if value is not None}
    if name is not None:
        shape = preset(name)
        if "heads" in given:  # what the preset says of them goes with its own number of heads
            shape = dataclasses.replace(shape, kv_heads=None, head_width=None)
        shape = dataclasses.replace(shape, **given)  # type: ignore[arg-type]
    else:
        needed = ("width", "mlp_width", "layers", "heads")
        missing = ["--" + key.replace("_", "-") for key in needed if key not in given]
        if missing:
            raise ConfigError(f"--model: missing; give one, or {', '.join(missing)} as well")
        shape = Preset(**given)  # type: ignore[arg-type]
    if rank is not None and rank_ratio is not None:
        raise ConfigError("--rank and --rank-ratio: got both, allowed is one of them")
    if rank is None:
        rank = rank_of(0.25 if rank_ratio is None else rank_ratio, shape.width)
    return shape.decoder(rank, crossing=crossing)


def _print_outlook(outlook: Outlook, name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    block, batch = outlook.decoder.block, outlook.batch
    console.print(
        f"{name}, rank {block.attention_rank} of {block.width}, {outlook.ranks} x "
        f"{outlook.machine.name}, {batch.micro_batch} x {batch.sequence} tokens, "
        f"tier {outlook.tier}",
        style="bold",
        highlight=False,
    )
    if block.crossing is not None:
        console.print(f"each latent reads that of the block before: {block.crossing}")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("each GPU", no_wrap=True)
    headings = ("messages", "GB sent", "MB kept", "GB held", "block ms", "x ours", "step s")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for forecast in outlook.forecasts:
        is_ours = forecast is outlook.ours
        table.add_row(*_row(outlook, forecast), style="bold" if is_ours else None)
    console.print(table)
    console.print(
        "messages: one block's, forward+backward (+recomputation); sent: in a step; kept: one "
        "block's activations; held: all of them, weights, gradients, Adam's state; x ours: block "
        "time.",
        highlight=False,
    )
    if outlook.ours.takes_turns:
        console.print(
            "*: with halves of the micro-batch that take turns in the forward.", highlight=False
        )
    console.print(
        "Times are modelled from data sheets, with constants fitted on published figures of "
        "A100: measure before you believe them.",
        highlight=False,
    )
    for warning in outlook.warnings:
        console.print(f"! {warning}", highlight=False, markup=False)


def _row(outlook: Outlook, forecast: Forecast) -> tuple[str, ...]:
    again = f"+{forecast.recompute_messages}" if forecast.recompute_messages else ""
    memory = forecast.footprint
    return (
        forecast.name,
        f"{forecast.forward_messages}+{forecast.backward_messages}{again}",
        f"{forecast.iteration_bytes / 1e9:.1f}",
        f"{memory.block_activation_bytes / 1e6:.0f}",
        f"{memory.total_bytes / 1e9:.1f}",
        f"{forecast.block.total_s * 1e3:.2f}",
        f"{outlook.block_ratio(forecast.name):.2f}",
        f"{forecast.iteration_s:.3f}",
    )
