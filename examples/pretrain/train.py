"""Pretrain a small Llama-style model on real text with DeepSpeed ZeRO-3 and Lowtide.

Two ranks on one machine, five minutes in all:

    python -m torch.distributed.run --standalone --nproc-per-node 2 \
        examples/pretrain/train.py --config examples/pretrain/ds.json --minutes 5

Run the same line again after a crash, and it goes on; after the end, and it says so.
Exit codes: 0 finished, or stopped by a signal of the cluster (stop.json in the run folder says
which); 2 wrong input (one line says what); 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UsageError, tell_launcher
from pace import launch_time_s
from rich.console import Console

if TYPE_CHECKING:
    from job import Job
    from run_folder import RunFolder
    from sources import Source
    from validation import Score

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_HERE = Path(__file__).resolve().parent


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; wrong values end the process with exit code 2."""
    parser = argparse.ArgumentParser(description="Pretrain a small language model.")
    add = parser.add_argument
    add("--config", default=str(_HERE / "ds.json"), help="DeepSpeed JSON with a lowtide block")
    add("--run-dir", default=os.environ.get("LOWTIDE_RUN_DIR", "runs/pretrain"),
        help="everything the run writes goes here ($LOWTIDE_RUN_DIR, runs/pretrain)")  # fmt: skip
    add("--data", help="folder of text files, or a Megatron-core dataset prefix "
        "(default: the source of Python's standard library)")  # fmt: skip
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=_positive(float), help="time for everything (5)")
    length.add_argument("--steps", type=_positive(int), help="optimizer steps instead of a time")
    add("--seed", type=int, default=0, help="of the weights and the order of the data (0)")
    add("--layers", type=_positive(int), default=4, help="decoder blocks (4)")
    add("--width", type=_positive(int), default=128, help="model width (128)")
    add("--heads", type=_positive(int), default=4, help="attention heads (4)")
    add("--sequence", type=_positive(int), default=256, help="tokens the model reads at once (256)")
    add("--vocabulary", type=_positive(int), default=4096, help="token ids to learn (4096)")
    add("--max-mib", type=_positive(int), default=64, help="use at most this much text (64)")
    return parser.parse_args(arguments)


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its message
    return parse


def main(arguments: list[str] | None = None) -> int:
    """Run the job on this rank; returns the exit code."""
    launched_s = launch_time_s()
    rank = int(os.environ.get("RANK", "0"))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        options = parse_options(arguments)
        return _run(options, rank=rank, launched_s=launched_s)
    except UsageError as error:
        tell_launcher(str(error))
        if rank == 0:  # the others found the same, or heard it from rank 0
            console.print(f"error: {error}", markup=False)
        return EXIT_USAGE
    except KeyboardInterrupt:
        if rank == 0:
            console.print("stopped before training began; run again to start")
        return EXIT_INTERRUPTED


def _run(options: argparse.Namespace, *, rank: int, launched_s: float) -> int:
    # Wrong input is found before anything slow or collective starts, by every rank for itself.
    config = _read_config(options)
    _check_vocabulary(options.vocabulary)
    from sources import find_source

    source = find_source(options.data)
    folder = _open_run(options, source)
    if folder.is_finished(minutes=options.minutes, steps=options.steps):
        if rank == 0:
            _say_finished(folder)
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from data import prepare_on_rank_0

    if rank == 0:
        folder.save(folder.progress)
        Console(soft_wrap=True).print(f"run folder {folder.path}")
    data = prepare_on_rank_0(
        folder.data,
        source,
        rank=rank,
        vocabulary=options.vocabulary,
        limit_bytes=options.max_mib * 2**20,
    )
    _prepare_environment()
    job = _build_job(config, options, data=data, folder=folder, launched_s=launched_s)
    job.display.say(_describe(job))
    job.resume()
    if not job.train(minutes=options.minutes, steps=options.steps):
        reason = job.stop_reason
        job.display.say(
            f"stopped at step {job.step} ({reason}); the same command goes on from there"
        )
        job.close()
        return EXIT_INTERRUPTED if reason == "interrupted" else 0
    score = job.score()
    job.save(status="finished")
    used_s = job.used_s
    job.close()
    if rank == 0:
        _say_result(job, score, used_s, _write_report(folder, config))
    return 0


def _read_config(options: argparse.Namespace) -> dict[str, Any]:
    from lowtide.core.config import load_block, load_config, resolve
    from lowtide.core.errors import ConfigError

    try:
        config = load_config(options.config)
        block = load_block(config)
        if block is None:
            return config
        block = dict(block)
        telemetry = dict(block.get("telemetry") or {})
        if telemetry.get("dir") is None:
            telemetry["dir"] = str(Path(options.run_dir) / "telemetry")
        block["telemetry"] = telemetry
        if block.get("stop") and block["stop"].get("run_dir") is None:
            block["stop"] = {**block["stop"], "run_dir": options.run_dir}
        resolve(block)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    return {**config, "lowtide": block}


def _check_vocabulary(vocabulary: int) -> None:
    from tokenizer import SMALLEST_VOCABULARY

    if vocabulary < SMALLEST_VOCABULARY:
        raise UsageError(
            f"--vocabulary {vocabulary}: at least {SMALLEST_VOCABULARY} are needed "
            "(every byte and the end of text)"
        )


def _open_run(options: argparse.Namespace, source: Source) -> RunFolder:
    from run_folder import RunFolder, settings_of
    from sources import TextSource

    place = source.root if isinstance(source, TextSource) else source.prefix
    settings = settings_of(
        options,
        source=str(place.resolve()),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )
    return RunFolder(Path(options.run_dir), settings)


def _prepare_environment() -> None:
    """Set what DeepSpeed reads when it is imported."""
    extensions = _HERE.parents[1] / ".cache" / "torch_extensions"
    if extensions.is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions))
    # Without a launcher this is a job of one rank; DeepSpeed would look for MPI instead.
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29531")):  # fmt: skip
        os.environ.setdefault(name, value)
    # DeepSpeed 0.19.8 uses names that torch 2.13 deprecates, once for each call and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Its scheduler is asked for a rate before the first step by DeepSpeed itself.
    logging.getLogger("DeepSpeed").addFilter(
        lambda r: "before it has started" not in r.getMessage()
    )
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # known, so no warning about a missing GPU


def _build_job(config: dict[str, Any], options: argparse.Namespace, **parts: Any) -> Job:
    from job import Job
    from model import ModelConfig

    try:
        model_config = ModelConfig(
            vocabulary=parts["data"].manifest.vocabulary,
            width=options.width,
            layers=options.layers,
            heads=options.heads,
            kv_heads=options.heads // 2 if options.heads % 2 == 0 else options.heads,
            sequence=options.sequence,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Job(config, model_config, seed=options.seed, **parts)


def _describe(job: Job) -> str:
    manifest = job.data.manifest
    text = f"model {job.parameters / 1e6:.2f} M parameters; text {manifest.source}: "
    text += f"{manifest.tokens['train'] / 1e6:.2f} M tokens to train on, "
    text += f"{manifest.tokens['validation'] / 1e6:.2f} M to validate"
    if manifest.xz_bits_per_byte is not None:
        text += f"; xz -9 needs {manifest.xz_bits_per_byte:.4f} bits per byte"
    return text


def _write_report(folder: RunFolder, config: dict[str, Any]) -> str:
    if "lowtide" not in config:
        return 'none (the configuration has no "lowtide" block, so nothing was recorded)'
    try:
        from lowtide.report import write_report

        return str(write_report(folder.path))
    except Exception as error:  # noqa: BLE001 - the trained model is worth more than a page about it
        return f"none ({type(error).__name__}: {error}); `lowtide report {folder.path}` tries again"


def _say_finished(folder: RunFolder) -> None:
    done = folder.progress
    Console(soft_wrap=True, highlight=False).print(
        f"{folder.path} is finished: {done.step} steps in {done.used_s / 60:.1f} minutes.\n"
        f"  train longer: the same command with --minutes {_more_minutes(done.used_s)}\n"
        f"  start fresh:  another --run-dir, or remove {folder.path}"
    )


def _more_minutes(used_s: float) -> int:
    return max(10, round(2 * used_s / 60))


def _say_result(job: Job, score: Score, used_s: float, report: str) -> None:
    manifest = job.data.manifest
    lines = [f"finished: {job.step} steps in {used_s / 60:.1f} minutes"]
    lines.append(f"  validation loss  {score.loss:.4f} nats per token ({score.tokens} tokens)")
    if score.bits_per_byte is not None and manifest.xz_bits_per_byte is not None:
        ratio = score.bits_per_byte / manifest.xz_bits_per_byte
        lines.append(
            f"  bits per byte    {score.bits_per_byte:.4f}; xz -9 {manifest.xz_bits_per_byte:.4f} "
            f"({ratio:.2f} times xz)"
        )
    else:
        lines.append("  bits per byte    not known: the data holds tokens, not their text")
    lines.append(f"  checkpoint       {job.folder.checkpoints}")
    lines.append(f"  report           {report}")
    lines.append(
        f"  longer           the same command with --minutes {max(10, round(used_s / 30))}"
    )
    Console(soft_wrap=True, highlight=False).print("\n".join(lines), markup=False)


if __name__ == "__main__":
    sys.exit(main())
