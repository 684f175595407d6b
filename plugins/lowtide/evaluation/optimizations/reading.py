"""Reading a prompt and answering under a stack, with the time of each part.

Letters: B prompts, T tokens of the context, Q tokens of a question, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.evaluation.optimizations.adapters.attention import new_cache
from lowtide.evaluation.optimizations.base import Runtime
from lowtide.evaluation.optimizations.cache.layer import Meter
from lowtide.evaluation.optimizations.calibration import evaluation_mode
from lowtide.evaluation.optimizations.prompt.skipping import take


@dataclass(kw_only=True)
class Reading:
    """A prompt that has been read.

    Attributes:
        model: The model that read it.
        cache: Its transformers Cache.
        meter: What the cache costs.
        logits: Behind the last token read, (B, V).
        prompt_tokens: Tokens of context and question before anything was left out.
        read_tokens: Tokens that the model was given.
        prefill_s: Reading them, without what is in `compress_s`.
        compress_s: Choosing tokens and entries, and quantising.
    """

    model: nn.Module
    cache: Any
    meter: Meter
    logits: Tensor
    prompt_tokens: int
    read_tokens: int
    prefill_s: float
    compress_s: float

    def repeat(self, times: int) -> None:
        """Hold each prompt `times` times, to ask each copy something else."""
        self.cache.batch_repeat_interleave(times)
        self.logits = self.logits.repeat_interleave(times, 0)

    def ask(self, question: Tensor) -> float:
        """Read a question, (B, Q) int64, behind the prompt; return the seconds it took."""
        begin_s = now_s(question)
        self.logits = forward(self.model, question, self.cache)
        return now_s(question) - begin_s

    def generate(self, count: int) -> tuple[Tensor, float]:
        """Return `count` tokens, the likeliest each time, (B, count), and seconds for each."""
        tokens = [self.logits.argmax(-1, keepdim=True)]
        begin_s = now_s(self.logits)
        for _ in range(count - 1):
            self.logits = forward(self.model, tokens[-1], self.cache)
            tokens.append(self.logits.argmax(-1, keepdim=True))
        passed_s = now_s(self.logits) - begin_s
        return torch.cat(tokens, 1), passed_s / max(1, count - 1)


def read(
    model: nn.Module,
    runtime: Runtime,
    context: Tensor,
    *,
    question: Tensor | None = None,
    records: bool = False,
    seed: int = 0,
) -> Reading:
    """Read prompts of one length, leaving out what `runtime` says.

    Args:
        model: A transformers model that the stack of `runtime` was applied to.
        runtime: Of that stack.
        context: (B, T) int64.
        question: (B, Q) int64, read with the context, so that everything is chosen knowing it.
            None: the question comes later, through `Reading.ask`.
        records: Keep which cache entries were chosen.
        seed: Of policies that draw at random.
    """
    begin_s = now_s(context)
    whole = context.shape[1] + (0 if question is None else question.shape[1])
    if runtime.prompt is not None:
        context = take(context, runtime.prompt.kept(model, context, question))
    chosen_s = now_s(context) - begin_s
    prompt = context if question is None else torch.cat([context, question], 1)
    cache, meter = new_cache(model, runtime, records=records, seed=seed)
    begin_s = now_s(context)
    logits = forward(model, prompt, cache)
    passed_s = now_s(context) - begin_s
    return Reading(
        model=model, cache=cache, meter=meter, logits=logits, prompt_tokens=whole,
        read_tokens=prompt.shape[1], prefill_s=passed_s - meter.compress_s,
        compress_s=chosen_s + meter.compress_s,
    )  # fmt: skip


def forward(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Return the logits behind the last of `tokens`, (B, V), having added them to `cache`."""
    with evaluation_mode(model):
        found = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return found.logits[:, -1]


def now_s(tensor: Tensor) -> float:
    """Return the time when all work on `tensor`'s device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
