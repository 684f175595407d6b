"""Training and test sets of the surrogate's benchmark: whole arrays, never bounds of one array."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from quality_codecs import installed
from quality_labels import BETWEEN, GRID, METRICS, Labelled

from lowtide.quality.candidates import Candidate
from lowtide.quality.study.fields import APPLICATIONS
from lowtide.quality.surrogate.samples import Label, Sample, labelled

HELD_BOUNDS = (1e-2, 1e-4)
HELD_FIELD = "turbulence/velocity"
Keep = Callable[[Sample], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One split.

    Attributes:
        name: In tables.
        train, test: Samples with the labels that count.
    """

    name: str
    train: list[Sample]
    test: list[Sample]


def samples_of(found: Sequence[Labelled]) -> list[Sample]:
    """Return all labels as samples; the series has application and field in its name."""
    return [
        Sample(
            each.snapshot.values,
            [Label(one.candidate, one.values) for one in each.measured],
            each.snapshot.series,
            each.snapshot.step,
        )
        for each in found
    ]


def at_bounds(samples: Sequence[Sample], bounds: Sequence[float]) -> list[Sample]:
    """Return samples with labels at some bounds only; what was looked at once is kept."""
    return [
        _with(each, [one for one in each.labels if _is_in(one.candidate.bound, bounds)])
        for each in samples
    ]


def of_codec(samples: Sequence[Sample], is_wanted: Callable[[str], bool]) -> list[Sample]:
    """Return samples with labels of some codecs only."""
    return [
        _with(each, [one for one in each.labels if is_wanted(one.candidate.codec)])
        for each in samples
    ]


def _with(sample: Sample, labels: list[Label]) -> Sample:
    found = replace(sample, labels=labels)
    found.__dict__["seen"] = sample.seen  # the same array: looked at once for all splits
    return found


def _is_in(bound: float | None, bounds: Sequence[float]) -> bool:
    return any(bound is not None and abs(bound / each - 1) < 1e-6 for each in bounds)


def splits(samples: Sequence[Sample], *, seed: int) -> Iterator[Split]:
    """Yield S1 to S5 of generated fields; late is the last 40 % of the steps."""
    grid = at_bounds(samples, GRID)
    first_late = 0.6 * (1 + max(each.step for each in samples))
    early = [each for each in grid if each.step < first_late]
    late = [each for each in grid if each.step >= first_late]
    picked = np.random.default_rng(seed).random(len(grid)) < 0.6
    yield Split(
        name="S1 random arrays",
        train=[each for each, is_own in zip(grid, picked, strict=True) if is_own],
        test=[each for each, is_own in zip(grid, picked, strict=True) if not is_own],
    )
    yield Split(name="S2 later steps", train=early, test=late)
    later = [each for each in samples if each.step >= first_late]
    yield Split(name="S2, other bounds", train=early, test=at_bounds(later, BETWEEN))
    rest = [bound for bound in GRID if not _is_in(bound, HELD_BOUNDS)]
    yield Split(
        name="S5 held-out bounds", train=at_bounds(early, rest), test=at_bounds(late, HELD_BOUNDS)
    )
    yield _without(grid, "S3 new field", lambda each: each.series == HELD_FIELD)
    for name in APPLICATIONS:
        yield _without(grid, f"S4 new: {name}", lambda each, name=name: name in each.series)  # type: ignore[misc]


def _without(samples: Sequence[Sample], name: str, is_held: Keep) -> Split:
    return Split(
        name=name,
        train=[each for each in samples if not is_held(each)],
        test=[each for each in samples if is_held(each)],
    )


def training_split(*, seed: int, steps: int = 20) -> Split:
    """Return S7: weights, moments and activations of a small transformer, later steps held out."""
    candidates = [
        Candidate.of({**codec, "mode": "rel", "bound": bound})
        for codec in installed()
        for bound in GRID
    ]
    found = [
        labelled(
            values, candidates, series=series, step=step, metrics=("compression_ratio", *METRICS)
        )
        for step in range(steps)
        for series, values in _trained(seed, step)
    ]
    first_late = 0.6 * steps
    return Split(
        name="S7 tensors of training",
        train=[each for each in found if each.step < first_late],
        test=[each for each in found if each.step >= first_late],
    )


_RUNS: dict[int, Any] = {}


def _trained(seed: int, step: int) -> Iterator[tuple[str, Any]]:
    """Yield tensors of a run after 20 more updates."""
    if seed not in _RUNS:
        torch.manual_seed(seed)
        layer = torch.nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        model = torch.nn.ModuleDict({
            "embedding": torch.nn.Embedding(64, 128),
            "body": torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            "head": torch.nn.Linear(128, 64),
        })  # fmt: skip
        _RUNS[seed] = model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = _RUNS[seed]
    generator = torch.Generator().manual_seed(seed * 1000 + step)
    for _ in range(20):
        start = torch.randint(64, (8, 1), generator=generator)
        stride = torch.randint(1, 4, (8, 1), generator=generator)
        tokens = (start + stride * torch.arange(33)) % 64
        hidden = model["body"](model["embedding"](tokens[:, :-1]))
        loss = torch.nn.functional.cross_entropy(
            model["head"](hidden).flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = model["body"].layers[0].linear1.weight
    other = model["body"].layers[1].self_attn.in_proj_weight
    state = optimizer.state[weight]
    yield "training/linear", weight.detach().numpy().copy()
    yield "training/attention", other.detach().numpy().copy()
    yield "training/exp_avg", state["exp_avg"].numpy().copy()
    yield "training/exp_avg_sq", state["exp_avg_sq"].numpy().copy()
    yield "training/activation", hidden.detach().flatten(0, 1).numpy().copy()
