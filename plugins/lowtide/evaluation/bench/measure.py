"""One stack on one task: grades and bytes; and its speed.

Letters: B prompts at a time, Q words of a question.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import DataError
from lowtide.evaluation.bench.plan import Timing
from lowtide.evaluation.fixtures import facts
from lowtide.evaluation.fixtures.answers import answers_of, grade
from lowtide.evaluation.optimizations.reading import Reading, read
from lowtide.evaluation.optimizations.stack import Applied
from lowtide.evaluation.tasks.long_context import LongContextItem

CALIBRATION_SEED = 990_001


@dataclass(kw_only=True)
class Costs:
    """What reading and answering took, over all batches of a cell.

    Bytes are those of the batch with most of them, divided by its prompts.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    read_tokens: int = 0
    prompt_entries: int = 0
    kept_entries: int = 0
    kv_bytes_peak: float = 0.0
    kv_bytes_held: float = 0.0
    prefill_s: float = 0.0
    compress_s: float = 0.0

    def add(self, reading: Reading) -> None:
        """Take a batch in, when its prompts have been read."""
        prompts, meter = reading.logits.shape[0], reading.meter
        self.prompts += prompts
        self.prompt_tokens += reading.prompt_tokens * prompts
        self.read_tokens += reading.read_tokens * prompts
        self.prompt_entries += meter.prompt_entries
        self.kept_entries += meter.kept_entries
        self.kv_bytes_peak = max(self.kv_bytes_peak, meter.peak_bytes / prompts)
        self.kv_bytes_held = max(self.kv_bytes_held, meter.held_bytes() / prompts)
        self.prefill_s += reading.prefill_s
        self.compress_s += reading.compress_s

    def columns(self) -> dict[str, Any]:
        """Return them as columns of a row."""
        return {
            "prompt_tokens": self.prompt_tokens / self.prompts,
            "read_tokens": self.read_tokens / self.prompts,
            # An entry of the cache is a token in one head of one layer.
            "kept_entries_part": self.kept_entries / max(1, self.prompt_entries),
            "kv_bytes_peak": self.kv_bytes_peak,
            "kv_bytes_held": self.kv_bytes_held,
            "prefill_s": self.prefill_s,
            "compress_s": self.compress_s,
        }


def calibration(texts: int, words: int, tested: Sequence[LongContextItem]) -> Tensor:
    """Return tokens to calibrate on, (texts, words + Q), none of whose texts is tested.

    Raises:
        DataError: A text is among those of `tested`.
    """
    drawn: list[LongContextItem] = []
    for task in facts.TASKS:
        rows = -(-texts // len(facts.TASKS))
        drawn += facts.items(task, seed=CALIBRATION_SEED, rows=rows, words=words, questions=1)
    shared = {item.context for item in drawn} & {item.context for item in tested}
    if shared:
        raise DataError(
            f"{len(shared)} texts are both calibrated on and tested; use seeds other than "
            f"{CALIBRATION_SEED}"
        )
    return tokens_of([f"{item.context} {item.question}" for item in drawn[:texts]])


def tokens_of(texts: Sequence[str]) -> Tensor:
    """Return texts of one length as tokens, (B, words) int64."""
    return torch.tensor([facts.encode(text) for text in texts])


def graded(
    applied: Applied,
    items: Sequence[LongContextItem],
    *,
    batch: int,
    is_question_aware: bool,
    seed: int,
) -> tuple[list[dict[str, Any]], Costs]:
    """Return the columns of each item's row, in the order of `items`, and what it took."""
    costs = Costs()
    ask = _asked_aware if is_question_aware else _asked_later
    answered = ask(applied, items, batch, costs, seed)
    rows = []
    for item, (said, logits) in zip(items, answered, strict=True):
        found = grade(said, item)
        likely = logits.float().log_softmax(-1)
        right = [facts.TOKENS[answer] for answer in item.answers]
        old = item.distractors if isinstance(item.distractors, tuple) else ()
        rows.append(
            {
                "item": item.id,
                "item_hash": item.item_hash()[:16],
                "cluster": item.cluster_label(),
                "said": said,
                "precision": found.precision,
                "recall": found.recall,
                "f1": found.f1,
                "em": float(found.f1 == 1.0),
                "nll": -float(likely[right].mean()),
                "said_old": float(bool(set(said) & set(old))),
            }
        )
    return rows, costs


def _asked_aware(
    applied: Applied, items: Sequence[LongContextItem], batch: int, costs: Costs, seed: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Read every text together with its question, once for each question."""
    for begin in range(0, len(items), batch):
        part = items[begin : begin + batch]
        context = tokens_of([item.context for item in part])
        question = tokens_of([item.question for item in part])
        reading = read(applied.model, applied.runtime, context, question=question, seed=seed)
        costs.add(reading)
        said = answers_of(reading.logits, [item.question for item in part])
        yield from zip(said, reading.logits, strict=True)


def _asked_later(
    applied: Applied, items: Sequence[LongContextItem], batch: int, costs: Costs, seed: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Read every text once, and ask each question of it on a copy of the cache."""
    texts = [list(group) for _, group in groupby(items, key=lambda item: item.context)]
    most = max(map(len, texts))
    per_batch = max(1, batch // most)
    for begin in range(0, len(texts), per_batch):
        part = texts[begin : begin + per_batch]
        context = tokens_of([group[0].context for group in part])
        reading = read(applied.model, applied.runtime, context, seed=seed)
        costs.add(reading)
        reading.repeat(most)
        # Texts with fewer questions ask their last one again; what that gives is not looked at.
        padded = [item for group in part for item in [*group, *[group[-1]] * (most - len(group))]]
        reading.ask(tokens_of([item.question for item in padded]))
        said = answers_of(reading.logits, [item.question for item in padded])
        for row, group in enumerate(part):
            for place in range(row * most, row * most + len(group)):
                yield said[place], reading.logits[place]


def timed(
    applied: Applied, items: Sequence[LongContextItem], timing: Timing, *, seed: int
) -> dict[str, Any]:
    """Return one measurement: a batch is read, asked, and answered with a fixed number of tokens.

    Seconds are wall time; ``cpu_s`` is the time of the process over all of it.
    """
    part = [items[index % len(items)] for index in range(timing.batch)]
    context = tokens_of([item.context for item in part])
    question = tokens_of([item.question for item in part])
    aware = question if applied.stack.needs_question else None
    for run in range(timing.warmup + 1):
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        reading = read(applied.model, applied.runtime, context, question=aware, seed=seed)
        ask_s = 0.0 if aware is not None else reading.ask(question)
        _, token_s = reading.generate(timing.tokens)
        if run == timing.warmup:
            e2e_s = time.perf_counter() - begin_s
            cpu_s = time.process_time() - begin_cpu_s
    return {
        "batch": timing.batch,
        "prefill_s": reading.prefill_s,
        "compress_s": reading.compress_s,
        "ask_s": ask_s,
        "decode_s_per_token": token_s,
        "e2e_s": e2e_s,
        "cpu_s": cpu_s,
        "tokens_per_s": timing.batch * timing.tokens / e2e_s,
    }
