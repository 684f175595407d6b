"""A group of one: the converted model against the plain low-rank model that it was made from.

Forward and backward of a Hugging Face Llama whose linears are `BottleneckLinear`, as it is and
after `shard(model, TensorGroup())`, in turn in one process; medians of the ratio of neighbours.
At most 1 is the goal: who tries one GPU first must not pay for the others.

    python benchmarks/bench_tensor_parallel.py [--rounds 31]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowtide.tensor_parallel import TensorGroup, TensorParallelConfig, factorise, shard

SHAPES = (  # width, feed-forward, layers, batch, sequence
    (128, 352, 4, 1, 32),
    (256, 704, 4, 4, 128),
    (512, 1376, 2, 2, 256),
    (1024, 2752, 1, 1, 512),
)
VOCABULARY = 1000


def models(width: int, mlp_width: int, layers: int) -> tuple[nn.Module, nn.Module]:
    """Return the plain low-rank model and the converted one, of the same weights."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=mlp_width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
            use_cache=False,
        )
    )
    settings = TensorParallelConfig(degree=1, rank_ratio=0.25, init="random", activation="silu")
    factorise(plain, settings)
    converted = copy.deepcopy(plain)
    shard(converted, TensorGroup())
    return plain, converted


def one_pass(model: nn.Module, tokens: torch.Tensor) -> float:
    """Return the seconds of one forward and backward."""
    begin_s = time.perf_counter()
    model(tokens, labels=tokens).loss.backward()
    duration_s = time.perf_counter() - begin_s
    model.zero_grad(set_to_none=True)
    return duration_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    table = Table(box=SIMPLE, pad_edge=False, title="forward and backward, float32",
                  title_justify="left")  # fmt: skip
    for heading in ("width, layers, tokens", "plain ms", "converted ms", "converted / plain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for width, mlp_width, layers, batch, sequence in SHAPES:
        plain, converted = models(width, mlp_width, layers)
        tokens = torch.randint(0, VOCABULARY, (batch, sequence))
        one_pass(plain, tokens)
        one_pass(converted, tokens)
        times: list[tuple[float, float]] = []
        for number in range(options.rounds):
            if number % 2:
                times.append((one_pass(plain, tokens), one_pass(converted, tokens)))
            else:
                later = one_pass(converted, tokens)
                times.append((one_pass(plain, tokens), later))
        ratios = sorted(ours / theirs for theirs, ours in times)
        low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
        table.add_row(
            f"{width}, {layers}, {batch * sequence}",
            f"{statistics.median(a for a, _ in times) * 1e3:.2f}",
            f"{statistics.median(b for _, b in times) * 1e3:.2f}",
            f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})",
        )
    console = Console(width=100)
    console.print(table)
    console.print(f"{torch.get_num_threads()} thread(s), {options.rounds} rounds")


if __name__ == "__main__":
    main()
