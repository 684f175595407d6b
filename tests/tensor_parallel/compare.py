"""Runs the reference and its sharded self on the same tokens, and measures how far they are apart.

Errors are relative Frobenius norms over the whole tensor: each rank compares what it holds with
its part of the reference's tensor (`reference.local_part`), and the squares are summed over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.sharding import shard, sharded_parameters
from tests.tensor_parallel.reference import IGNORED, LowRankDecoder, Sizes, build, local_part

Edit = Callable[[LowRankDecoder], None]


@dataclass
class Batch:
    tokens: Tensor
    labels: Tensor
    mask: Tensor | None = None
    factor: float = 1.0  # of the loss, as a loss scaler's
    loss: Mapping[str, Any] = field(default_factory=dict)


def batch(sizes: Sizes, shape: tuple[int, int] = (3, 7), seed: int = 1) -> Batch:
    """Return random tokens, some of them padding if there is any; some labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, sizes.vocabulary, shape, generator=generator)
    if sizes.padding is not None:
        tokens[1, 1:] = sizes.padding  # gets no gradient, but is a target as any other
    labels = tokens.clone()
    labels[0, :3] = IGNORED
    labels[-1, -1] = IGNORED
    return Batch(tokens, labels)


@dataclass
class Step:
    """What one forward and backward left behind; a sharded model's tensors are local parts."""

    loss: Tensor
    dx: Tensor | None
    logits: Tensor


def step(
    model: Any, data: Batch, *, forward: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Step:
    """Run forward (inside `forward`) and backward in training, after whole logits."""
    with torch.no_grad(), forward():
        logits = model(data.tokens, mask=data.mask)[1]
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            seen.append(output)

    handle = model.embedding.register_forward_hook(keep)
    with forward():
        loss, _ = model(data.tokens, labels=data.labels, mask=data.mask, **data.loss)
    handle.remove()
    (loss * data.factor).backward()
    return Step(loss.detach(), seen[0].grad if seen else None, logits)


def sharded(
    model: LowRankDecoder,
    group: TensorGroup,
    tier: str = "none",
    training: bool = True,
    overlaps: bool = False,
) -> LowRankDecoder:
    shard(model, group, tier=tier, overlaps_forward=overlaps)
    return model.train(training)


Pairs = dict[str, tuple[Tensor, Tensor, bool]]  # local, expected, whether it is replicated


def errors(pairs: Pairs, group: TensorGroup) -> dict[str, float]:
    """Return the relative error of each tensor, the same on all ranks (worst, if replicated)."""
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64)
    worst = torch.zeros(len(pairs), dtype=torch.float64)
    for row, (name, (local, expected, is_replicated)) in enumerate(pairs.items()):
        assert local.shape == expected.shape, (name, local.shape, expected.shape)
        difference = (local.double() - expected.double()).norm()
        size = expected.double().norm()
        if is_replicated:
            worst[row] = difference / size if difference else 0.0  # over zero: infinite
        else:
            sums[row] = torch.stack((difference, size)).square()
    if group.size > 1:
        dist.all_reduce(sums, group=group.process_group)
        # MAX may lose a NaN: send it as infinity.
        worst = worst.nan_to_num(nan=float("inf"), posinf=float("inf"))
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group.process_group)
    result = {}
    for row, name in enumerate(pairs):
        difference, size = sums[row].sqrt()
        of_parts = (difference / size).item() if difference else 0.0
        result[name] = max(of_parts, worst[row].item()) if of_parts == of_parts else of_parts
    return result


def parameter_pairs(
    model: nn.Module,
    whole: Mapping[str, Tensor | None],
    sizes: Sizes,
    group: TensorGroup,
    value: Callable[[Tensor], Tensor | None],
) -> Pairs:
    """Pair `value` of each sharded parameter with its part of `whole`, by unsharded names.

    Checks too that every whole tensor is held, once, and that no row of a parameter is left out.
    """
    pairs: Pairs = {}
    rest = set(whole)
    for name, parts in sharded_parameters(model):
        parameter = model.get_parameter(name)
        local = value(parameter)
        covered = 0
        for part in parts:
            if part.name not in whole:
                assert part.name == "head.weight"
                assert sizes.is_tied
                covered = parameter.shape[0]
                continue
            rest.remove(part.name)
            expected = whole[part.name]
            covered += parameter[part.rows].shape[0]
            if expected is None:
                assert local is None, part.name
                continue
            assert local is not None, f"{part.name}: no gradient"
            mine = local_part(part.name, expected, sizes, group.rank, group.size)
            pairs[part.name] = (local[part.rows], expected if mine is None else mine, mine is None)
        assert covered == parameter.shape[0], name
    assert not rest, rest
    return pairs


def of_reference(model: nn.Module, value: Callable[[Tensor], Tensor | None]) -> dict[str, Any]:
    return {name: value(parameter) for name, parameter in model.named_parameters()}


def gradient(parameter: Tensor) -> Tensor | None:
    return parameter.grad


def step_errors(
    model: nn.Module, got: Step, reference: nn.Module, want: Step, sizes: Sizes, group: TensorGroup
) -> dict[str, float]:
    """Return the errors of loss, logits, dx and of every weight's gradient."""
    pairs = parameter_pairs(model, of_reference(reference, gradient), sizes, group, gradient)
    pairs["loss"] = (got.loss, want.loss, True)
    pairs["logits"] = (got.logits, want.logits, True)
    if want.dx is not None:
        assert got.dx is not None
        pairs["dx"] = (got.dx, want.dx.chunk(group.size, -1)[group.rank], False)
    return errors(pairs, group)


def run_pair(
    sizes: Sizes,
    data: Batch,
    group: TensorGroup,
    *,
    dtype: torch.dtype = torch.float64,
    tier: str = "none",
    edit: Edit = lambda model: None,
    seed: int = 0,
    overlaps: bool = False,
) -> dict[str, dict[str, float]]:
    """Return the errors against float64 of the sharded model and of the unsharded one in `dtype`.

    All three have the same weights: those of `dtype`, which float64 holds exactly.
    """

    def make(of: torch.dtype) -> LowRankDecoder:
        model = build(sizes, seed)
        edit(model)
        return model.to(dtype).to(of)

    models = make(torch.float64), make(dtype), make(dtype)
    return compare(*models, data, group, tier=tier, overlaps=overlaps)


def compare(
    reference: LowRankDecoder,
    ours: LowRankDecoder,
    single: LowRankDecoder,
    data: Batch,
    group: TensorGroup,
    *,
    tier: str = "none",
    overlaps: bool = False,
    forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, dict[str, float]]:
    """Shard `ours` and return its errors and those of `single`, the same model on one rank."""
    sizes = reference.sizes
    want = step(reference, data)
    sharded(ours, group, tier, overlaps=overlaps)
    got = step(ours, data, forward=forward)
    result = {"sharded": step_errors(ours, got, reference, want, sizes, group)}
    if next(single.parameters()).dtype == torch.float64:
        return result
    got = step(single, data, forward=forward)
    pairs: Pairs = {
        name: (parameter.grad, reference.get_parameter(name).grad, True)  # type: ignore[misc]
        for name, parameter in single.named_parameters()
    }
    pairs["loss"] = (got.loss, want.loss, True)
    pairs["logits"] = (got.logits, want.logits, True)
    pairs["dx"] = (got.dx, want.dx, True)  # type: ignore[assignment]
    return result | {"single": errors(pairs, TensorGroup())}


def summary(found: dict[str, float]) -> dict[str, Any]:
    """Return loss, logits and dx, and the worst of the weights with its name."""
    ends: dict[str, Any] = {name: found[name] for name in ("loss", "logits", "dx") if name in found}
    weights = {name: value for name, value in found.items() if name not in ends}
    # NaN compares with nothing: the worst of all.
    name = max(weights, key=lambda each: (weights[each] != weights[each], weights[each]))
    return {**ends, "dW": weights[name], "worst": name}


def pooled(results: list[dict[str, dict[str, float]]]) -> Any:
    """Root mean square of errors over runs, then the summary."""
    found = {}
    for kind in results[0]:
        names = results[0][kind]
        means = {
            name: (sum(run[kind][name] ** 2 for run in results) / len(results)) ** 0.5
            for name in names
        }
        found[kind] = summary(means)
    return found
