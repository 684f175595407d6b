"""What is run on 1, 2 and 4 ranks: each scenario returns what one rank found, as plain JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.functions import partial_down
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.loss import vocabulary_cross_entropy
from lowtide.tensor_parallel.norms import NormSetting
from lowtide.tensor_parallel.reduction import Reduction
from lowtide.tensor_parallel.sharding import load_unsharded_state_dict, shard, unsharded_state_dict
from tests.tensor_parallel.compare import (
    Batch,
    Edit,
    batch,
    compare,
    errors,
    gradient,
    of_reference,
    parameter_pairs,
    pooled,
    run_pair,
    sharded,
    step,
    step_errors,
    summary,
)
from tests.tensor_parallel.reference import IGNORED, LowRankDecoder, Sizes, build, next_token_loss

TIERS = ("none", "latents", "sharded_latents")
PLAIN = Sizes()
COLA = Sizes(activation="silu", gate_activation=None, has_biases=True, is_tied=True)
FUSED = Sizes(
    is_fused=True, activation="silu", has_biases=True, has_head_norms=True, has_head_bias=True,
    padding=5,
)  # fmt: skip
MANY_HEADS = Sizes(kv_heads=8, attention_rank=12, is_tied=True, has_head_norms=True, padding=3)
SHORT = replace(PLAIN, layers=2)
LAYER_NORM = Sizes(norm="layer", activation="silu", has_biases=True, has_head_bias=True)
LAYOUTS = {
    "plain": PLAIN, "cola": COLA, "fused": FUSED, "many heads": MANY_HEADS,
    "layer norm": LAYER_NORM,
}  # fmt: skip


def exact(group: TensorGroup) -> Any:
    """Every layout in float64."""
    return {name: summary(run_pair(s, batch(s), group)["sharded"]) for name, s in LAYOUTS.items()}


def _tiny(model: LowRankDecoder) -> None:
    # Everything that enters the residual stream is small, so epsilon counts in every norm.
    model.embedding.weight.mul_(1e-4)
    for layer in model.layers:
        layer.o.up.weight.mul_(1e-4)
        layer.down.up.weight.mul_(1e-4)


def _outlier(model: LowRankDecoder) -> None:
    model.embedding.weight[:, 5] *= 300


def _large_means(model: LowRankDecoder) -> None:
    # Of all columns, and other ones of each half: where they are taken away late, digits are lost.
    model.embedding.weight.add_(30)
    model.embedding.weight[:, : model.sizes.width // 2] += 20


def _zero_token(model: LowRankDecoder) -> None:
    model.embedding.weight[7] = 0


def _masks(sizes: Sizes, data: Batch) -> dict[str, Tensor]:
    rows, length = data.tokens.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    is_padding = torch.arange(length) < torch.tensor([0, 3, 1])[:rows, None]
    padded = (causal & ~is_padding[:, None, :]) | torch.eye(length, dtype=torch.bool)
    slopes = torch.linspace(0.1, 0.9, sizes.heads, dtype=torch.float64).view(1, -1, 1, 1)
    distance = torch.arange(length).view(-1, 1) - torch.arange(length)
    by_head = (-slopes * distance).masked_fill(~causal, float("-inf"))
    return {"padding": padded[:, None], "by head": by_head}


def hard_inputs(group: TensorGroup) -> Any:
    """float64, on inputs that a wrong norm, mask or stride would show with."""
    data = batch(SHORT)
    cases: dict[str, tuple[Sizes, Batch, Edit]] = {
        "tiny": (SHORT, data, _tiny),
        "tiny, tied": (replace(SHORT, is_tied=True), data, _tiny),
        "outlier": (SHORT, data, _outlier),
        "outlier, silu": (replace(COLA, layers=2, has_biases=False), batch(COLA), _outlier),
    }
    zeros = batch(SHORT)
    zeros.tokens[0, :4] = 7
    zeros.tokens[1] = 7
    cases["zero tokens"] = (SHORT, zeros, _zero_token)
    centred = replace(LAYER_NORM, layers=2)
    cases["layer: tiny"] = (centred, batch(centred), _tiny)
    for norm in ("layer", "layer without gain"):
        for name, edit in {"outlier": _outlier, "means": _large_means}.items():
            cases[f"{norm}: {name}"] = (replace(centred, norm=norm), batch(centred), edit)
    cases["layer: tied"] = (replace(centred, is_tied=True), batch(centred), _large_means)
    for name, mask in _masks(SHORT, data).items():
        cases[f"mask: {name}"] = (SHORT, replace(data, mask=mask), lambda model: None)
    turned = Batch(data.tokens.T, data.labels.T)
    assert not turned.tokens.is_contiguous()
    cases["transposed tokens"] = (SHORT, turned, lambda model: None)
    cases["one row of three"] = (FUSED, Batch(data.tokens[:1, :3], data.tokens[:1, :3]), _outlier)
    for vocabulary in (5, 96):
        sizes = replace(COLA, vocabulary=vocabulary)
        cases[f"vocabulary {vocabulary}"] = (sizes, batch(sizes), lambda model: None)
    return {
        name: summary(run_pair(s, given, group, edit=_without_gradients(edit))["sharded"])
        for name, (s, given, edit) in cases.items()
    }


def _without_gradients(edit: Edit) -> Edit:
    def edited(model: LowRankDecoder) -> None:
        with torch.no_grad():
            edit(model)

    return edited


def layer_calls(group: TensorGroup) -> Any:
    """One layer by itself: strides nobody expects, and ranks that come late to backward."""
    found = {}
    generator = torch.Generator().manual_seed(3)
    for name, order in {"rows": (1, 0, 2), "width": (0, 2, 1), "all": (2, 1, 0)}.items():
        reference, model = build(FUSED), sharded(build(FUSED), group)
        shape = [(5, 7, FUSED.width)[axis] for axis in order]
        x, dy = (
            torch.randn(shape, generator=generator, dtype=torch.float64).permute(order)
            for _ in range(2)
        )
        cos, sin = reference.angles(x.shape[1], x.dtype)
        whole = x.detach().requires_grad_()
        y = reference.layers[1](whole, cos, sin)
        y.backward(dy)
        mine = x.chunk(group.size, -1)[group.rank].detach().requires_grad_()
        out = model.layers[1](mine, cos, sin)
        if group.rank > 0:
            out.register_hook(lambda _: time.sleep(0.1))
        local_dy = dy.chunk(group.size, -1)[group.rank]
        assert not local_dy.is_contiguous()
        assert not mine.is_contiguous()
        out.backward(local_dy)
        assert mine.grad is not None
        assert whole.grad is not None
        pairs = parameter_pairs(
            model, of_reference(reference, gradient), FUSED, group, gradient
        )  # all others have none, on both sides
        pairs["logits"] = (out.detach(), y.detach().chunk(group.size, -1)[group.rank], False)
        pairs["dx"] = (mine.grad, whole.grad.chunk(group.size, -1)[group.rank], False)
        found[name] = summary(errors(pairs, group))
    return found


def whole_logits(group: TensorGroup) -> Any:
    """A loss that the user computes from whole logits, with a gradient of odd strides."""
    found = {}
    for name, sizes in {"plain": PLAIN, "cola": COLA, "fused": FUSED}.items():
        data = batch(sizes)
        generator = torch.Generator().manual_seed(6)
        weight = torch.randn(101, 7, 3, generator=generator, dtype=torch.float64).permute(2, 1, 0)
        models = [build(sizes), sharded(build(sizes), group)]
        for model in models:
            (model(data.tokens)[1] * weight).sum().backward()
        pairs = parameter_pairs(
            models[1], of_reference(models[0], gradient), sizes, group, gradient
        )
        found[name] = summary(errors(pairs, group))
    return found


def optimizer_steps(group: TensorGroup) -> Any:
    """Parameters after 5 steps of AdamW, in float64."""
    found = {}
    for name, layout in LAYOUTS.items():
        sizes = replace(layout, layers=2)
        models = [build(sizes), sharded(build(sizes), group, "latents")]
        for model in models:
            # Not 1e-8: where a gradient is zero but for rounding, that would make it a whole step.
            settings = {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1}
            optimizer = torch.optim.AdamW(model.parameters(), **settings)  # type: ignore[arg-type]
            for index in range(5):
                data = batch(sizes, seed=index)
                optimizer.zero_grad()
                model(data.tokens, labels=data.labels)[0].backward()
                optimizer.step()
        pairs = parameter_pairs(
            models[1], of_reference(models[0], Tensor.detach), sizes, group, Tensor.detach
        )
        found[name] = summary(errors(pairs, group))
    return found


FROZEN: dict[str, Callable[[str], bool]] = {
    "embedding and first A": lambda name: (
        name.startswith(("embedding", "layers.0.attention_norm"))
        or name in [f"layers.0.{each}.down.weight" for each in "qkv"]
    ),
    "all A": lambda name: ".down.weight" in name,
    "all B": lambda name: ".up.weight" in name,
    "gains": lambda name: "norm" in name,
    "all but A's biases": lambda name: not name.endswith(".down.bias"),
    "all but one gain": lambda name: name != "layers.1.mlp_norm.weight",
    "all but the head": lambda name: not name.startswith("head"),
    "all but the last down": lambda name: not name.startswith("layers.1.down"),
    "all but one gate": lambda name: not name.startswith(("layers.0.gate", "layers.0.up")),
}


def frozen(group: TensorGroup) -> Any:
    """Who gets a gradient, and which, when some parameters are frozen; float64."""
    found = {}
    sizes = replace(COLA, is_tied=False, layers=2)
    data = batch(sizes)
    for name, is_frozen in FROZEN.items():
        # The tiers differ only where nothing before a segment is trained.
        for tier in TIERS if name in ("embedding and first A", "all but one gate") else TIERS[1:2]:

            def freeze(model: LowRankDecoder, is_frozen: Any = is_frozen) -> None:
                for each, parameter in model.named_parameters():
                    parameter.requires_grad_(not is_frozen(each))

            result = run_pair(sizes, data, group, tier=tier, edit=freeze)["sharded"]
            found[f"{name}, {tier}"] = summary(result)
    return found


def precision(group: TensorGroup) -> Any:
    """float32, bfloat16 and float16 against float64, beside a single rank of the same precision."""
    found = {}
    for name in LAYOUTS if group.size < 4 else ("cola", "layer norm"):
        sizes = LAYOUTS[name]
        for dtype, runs in ((torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 2)):
            results = [
                run_pair(sizes, batch(sizes, (3, 16), seed), group, dtype=dtype, seed=seed)
                for seed in range(runs)
            ]
            found[f"{name}, {str(dtype)[6:]}"] = pooled(results)
    return found


def outliers(group: TensorGroup) -> Any:
    """One channel 300 times larger than the others, in lower precisions."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, sizes, edit in (
            ("", PLAIN, _outlier),
            ("layer norm, ", LAYER_NORM, _outlier),
            # Without biases: those of keys have next to no gradient, which is all rounding here.
            ("means, ", replace(LAYER_NORM, has_biases=False), _large_means),
        ):
            results = [
                run_pair(
                    sizes, batch(sizes, (3, 16), seed), group,
                    dtype=dtype, seed=seed, edit=_without_gradients(edit),
                )
                for seed in range(4 if name or dtype == torch.bfloat16 else 1)
            ]  # fmt: skip
            found[f"{name}{str(dtype)[6:]}"] = pooled(results)
    return found


def overlap(group: TensorGroup) -> Any:
    """Halves of the batch that take turns, in float64: an odd batch, a mask of its own per row."""
    found = {}
    for name, sizes in LAYOUTS.items():
        data = batch(sizes)
        masked = replace(data, mask=_masks(sizes, data)["padding"])
        for kind, given in {"causal": data, "masked": masked}.items():
            result = run_pair(replace(sizes, layers=2), given, group, overlaps=True)
            found[f"{name}, {kind}"] = summary(result["sharded"])
    alone = Batch(data.tokens[:1], data.tokens[:1])
    found["one row"] = summary(run_pair(PLAIN, alone, group, overlaps=True)["sharded"])
    return found


def large_halves(group: TensorGroup) -> Any:
    """float16 near its largest number: x fits, and gain * x does not."""

    def enlarge(model: LowRankDecoder) -> None:
        model.embedding.weight.clamp_(-2, 2).mul_(3e4)
        for layer in model.layers:
            layer.attention_norm.weight.mul_(3)
            layer.mlp_norm.weight.mul_(3)
        model.norm.weight.mul_(3)

    found = {}
    for name, sizes in {"untied": PLAIN, "biases": replace(COLA, is_tied=False)}.items():
        results = []
        for seed in range(2):
            data = replace(batch(sizes, (3, 16), seed), factor=2.0**14)
            edit = _without_gradients(enlarge)
            results.append(run_pair(sizes, data, group, dtype=torch.float16, seed=seed, edit=edit))
        found[name] = pooled(results)
    return found


def mixed_precision(group: TensorGroup) -> Any:
    """Gains kept in float32 in a bfloat16 model, and autocast over a float32 model."""
    found = {}

    def make(sizes: Sizes, seed: int, has_wide_gains: bool) -> LowRankDecoder:
        model = build(sizes, seed).to(torch.bfloat16)
        if not has_wide_gains:
            return model.float()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.float()
        return model

    for name, sizes, has_wide_gains in (
        ("float32 gains", PLAIN, True), ("autocast", PLAIN, False),
        ("layer norm, float32 gains", LAYER_NORM, True),
        ("layer norm, autocast", LAYER_NORM, False),
    ):  # fmt: skip

        def forward(is_on: bool = not has_wide_gains) -> Any:
            return torch.autocast("cpu", torch.bfloat16, enabled=is_on)

        results = []
        for seed in range(3):
            reference, ours, single = (make(sizes, seed, has_wide_gains) for _ in range(3))
            data = batch(PLAIN, (3, 16), seed)
            reference.double()
            results.append(compare(reference, ours, single, data, group, forward=forward))
        found[name] = pooled(results)
    return found


def tiers(group: TensorGroup) -> Any:
    """Whether every gradient has the same bits with checkpointing as without it."""
    found = {}
    for name, dtypes in {
        "cola": (torch.float64, torch.bfloat16), "fused": (torch.float16,),
        "plain": (torch.bfloat16,), "layer norm": (torch.bfloat16,),
    }.items():  # fmt: skip
        sizes = replace(LAYOUTS[name], layers=2)
        for dtype in dtypes:
            gradients: dict[str, list[Tensor]] = {}
            for tier in TIERS:
                model = sharded(build(sizes, dtype=dtype), group, tier)
                taken = step(model, batch(sizes))
                each = [p.grad for p in model.parameters() if p.grad is not None]
                assert len(each) == len(list(model.parameters()))
                assert taken.dx is not None
                gradients[tier] = [taken.loss, taken.dx, *each]
            found[f"{name}, {str(dtype)[6:]}"] = {
                tier: sum(
                    not torch.equal(a, b)
                    for a, b in zip(gradients["none"], gradients[tier], strict=True)
                )
                for tier in TIERS[1:]
            }
    return found


def replicas(group: TensorGroup) -> Any:
    """How many replicated tensors have other bits on another rank, and what the statistic is."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = sharded(build(FUSED, dtype=dtype), group)
        step(model, batch(FUSED))
        flag = "tensor_model_parallel"
        shared = [p for p in model.parameters() if not getattr(p, flag)]
        assert len(shared) == FUSED.layers * 6  # latent biases of 4 groups, 2 head norms
        differing = 0
        for parameter in shared:
            assert parameter.grad is not None
            # Whole bits: -0.0 and 0.0 are not the same here.
            everywhere = _everywhere(parameter.grad.contiguous().view(torch.uint8), group)
            differing += any(not torch.equal(each, everywhere[0]) for each in everywhere)
        x = torch.randn(2, 64, FUSED.width, generator=torch.Generator().manual_seed(5))
        x[..., 3] *= 300
        x = x.to(dtype)
        mine = x.chunk(group.size, -1)[group.rank].contiguous()
        weight = torch.eye(FUSED.width, dtype=dtype).chunk(group.size, 1)[group.rank].contiguous()
        gain = torch.ones(mine.shape[-1], dtype=dtype)
        norm = NormSetting(FUSED.width, FUSED.epsilon)
        partial, *statistics = partial_down(mine, weight, group, norm, gain)
        total, (squares,) = Reduction(partial, tuple(statistics), group, norm).finish()
        bits = [_everywhere(each, group) for each in (total.contiguous(), squares)]
        found[str(dtype)[6:]] = {
            "differing": differing,
            "statistic differs": any(
                not torch.equal(each, same[0]) for same in bits for each in same
            ),
            "statistic": ((squares.double() - x.double().square().sum(-1)).abs()
                          / x.double().square().sum(-1)).max().item(),
        }  # fmt: skip
    return found


def _everywhere(value: Tensor, group: TensorGroup) -> list[Tensor]:
    if group.size == 1:
        return [value]
    everywhere = [torch.empty_like(value) for _ in range(group.size)]
    dist.all_gather(everywhere, value, group=group.process_group)
    return everywhere


def losses(group: TensorGroup) -> Any:
    """The loss function's options, against the reference's and torch's own, in float64."""
    found: dict[str, float] = {}
    sizes, data = PLAIN, batch(PLAIN)
    reference, ours = build(sizes), sharded(build(sizes), group)
    kept = (data.labels[:, 1:] != IGNORED).sum().item()

    def relative(got: Tensor, want: Tensor) -> float:
        return ((got - want).norm() / want.norm()).item()

    want, expected = (x.detach() for x in reference(data.tokens, labels=data.labels))
    found["training"] = relative(ours(data.tokens, labels=data.labels)[0], want)
    loss, logits = ours.eval()(data.tokens, labels=data.labels)
    found["evaluation"] = relative(loss, want)
    same_shape = logits.shape == expected.shape
    found["logits in evaluation"] = relative(logits, expected) if same_shape else float("inf")
    ours.train()
    loss = ours(data.tokens, labels=data.labels, num_items_in_batch=torch.tensor(5))[0]
    found["number of items"] = relative(loss, want * kept / 5)
    shifted = F.pad(data.labels, (0, 1), value=IGNORED)[:, 1:]
    found["shifted labels"] = relative(
        ours(data.tokens, labels=data.labels, shift_labels=shifted)[0], want
    )
    elsewhere = data.labels.masked_fill(data.labels == IGNORED, -7)
    loss = ours(data.tokens, labels=elsewhere, ignore_index=-7)[0]
    found["other ignored index"] = relative(loss, want)
    generator = torch.Generator().manual_seed(2)
    for vocabulary in (3, 10, 16):
        logits = torch.randn(4, 5, vocabulary, generator=generator, dtype=torch.float64) * 30
        logits += 2000  # whose exponential is infinite
        targets = torch.randint(0, vocabulary, (4, 5), generator=generator)
        targets[1, 2] = IGNORED
        part = -(-vocabulary // group.size)
        padded = F.pad(logits, (0, part * group.size - vocabulary), value=1e9)
        local = padded.chunk(group.size, -1)[group.rank]
        for reduction in ("mean", "sum", "none"):
            mine = local.detach().clone().requires_grad_()
            got = vocabulary_cross_entropy(mine, targets, vocabulary, group, reduction=reduction)
            whole = logits.detach().clone().requires_grad_()
            expected = F.cross_entropy(
                whole.flatten(0, 1), targets.flatten(), reduction=reduction
            ).view(got.shape)
            got.sum().backward()
            expected.sum().backward()
            assert mine.grad is not None
            assert whole.grad is not None
            wanted = F.pad(whole.grad, (0, part * group.size - vocabulary))
            of_rank = wanted.chunk(group.size, -1)[group.rank]
            name = f"{vocabulary} {reduction}"
            found[name] = relative(got.detach(), expected.detach())
            found[f"{name} gradient"] = errors({"": (mine.grad, of_rank, False)}, group)[""]
    return found


def out_of_range(group: TensorGroup) -> Any:
    """Token ids and labels beyond the vocabulary, where the last rank has rows to spare."""
    found = {}
    for name, sizes in {"tied": COLA, "untied": PLAIN}.items():
        model = sharded(build(sizes), group)
        data = batch(sizes)
        for what in ("token", "label"):
            for value in (sizes.vocabulary, sizes.vocabulary + 50, -1):
                tokens, labels = data.tokens.clone(), data.labels.clone()
                (tokens if what == "token" else labels)[1, 2] = value
                try:
                    model(tokens, labels=labels)
                    found[f"{name}, {what} {value}"] = "accepted"
                except (IndexError, RuntimeError) as error:
                    found[f"{name}, {what} {value}"] = type(error).__name__
    return found


def state_dicts(group: TensorGroup) -> Any:
    """Bits of the unsharded state dict, and of a model filled from it."""
    found = {}
    for name, sizes in LAYOUTS.items():
        whole = build(sizes).state_dict()
        model = sharded(build(sizes), group)
        state = unsharded_state_dict(model, group)
        other = sharded(build(sizes, seed=9), group)
        load_unsharded_state_dict(other, whole, group)
        on_last = unsharded_state_dict(model, group, on_rank=group.size - 1)
        found[name] = {
            "names": sorted(set(state) ^ set(whole)),
            "values": [key for key in whole if not torch.equal(state[key], whole[key])],
            "loaded": [
                key
                for (key, a), b in zip(other.named_parameters(), model.parameters(), strict=True)
                if not torch.equal(a, b)
            ],
            "on last": len(on_last) == (len(whole) if group.rank == group.size - 1 else 0),
        }
    return found


class _Cache:
    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self.kept:
            key = torch.cat((self.kept[layer][0], key), -2)
            value = torch.cat((self.kept[layer][1], value), -2)
        self.kept[layer] = key, value
        return key, value


def decoding(group: TensorGroup) -> Any:
    """Token by token with a cache, against all tokens at once; also with gradients on."""
    found = {}
    sizes = replace(FUSED, layers=2)
    data = batch(sizes, (2, 4))
    reference = build(sizes)
    cos, sin = reference.angles(data.tokens.shape[1], torch.float64)
    want = reference(data.tokens)[1].detach()
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for tier in TIERS:
        for grad in (False, True):
            ours = sharded(build(sizes), group, tier, training=False)
            cache, rows = _Cache(), []
            with torch.set_grad_enabled(grad):
                for at in range(data.tokens.shape[1]):
                    x = ours.embedding(data.tokens[:, at : at + 1])
                    for layer in ours.layers:
                        x = layer(x, cos[at : at + 1], sin[at : at + 1], cache=cache)
                    rows.append(ours.head(ours.norm(x)))
            logits = torch.cat(rows, 1)
            found[f"{tier}, {grad}"] = {
                "logits": ((logits.detach() - want).norm() / want.norm()).item()
            }
            if grad:
                (logits * weight).sum().backward()
                reference.zero_grad()
                (reference(data.tokens)[1] * weight).sum().backward()
                pairs = parameter_pairs(
                    ours, of_reference(reference, gradient), sizes, group, gradient
                )
                found[f"{tier}, {grad}"] |= summary(errors(pairs, group))
    return found


def subgroups(group: TensorGroup) -> Any:
    """Two groups of two ranks among four, each with data of its own."""
    if group.size < 4:
        return {}
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = group.rank // 2
    half = TensorGroup(halves[mine])
    result = run_pair(COLA, batch(COLA, seed=10 + mine), half, tier="sharded_latents")
    return summary(result["sharded"])


def late_ranks(group: TensorGroup) -> Any:
    """What a rank reads from a sum that another rank joins later."""
    if group.rank > 0:
        time.sleep(0.2)
    total = group.sum(torch.ones(3), phase="forward")
    view = torch.ones(3, 4).T
    try:
        group.sum(view, phase="forward")
        refused = group.size == 1
    except AssertionError as error:
        refused = "(4, 3)" in str(error)
    return {"sum": total.tolist(), "a view is refused": refused}


def different_data(group: TensorGroup) -> Any:
    """What each rank says when the others read other tokens."""
    found: dict[str, Any] = {}
    for name, sizes in {"untied": PLAIN, "tied": COLA}.items():
        model = build(sizes)
        shard(model, group)
        data = batch(sizes)
        other = data.tokens.clone()
        other[2, 6] += 1
        swapped = data.tokens.clone()
        swapped[0, 1], swapped[0, 2] = data.tokens[0, 2].item(), data.tokens[0, 1].item()
        assert not torch.equal(swapped, data.tokens)
        cases = {
            "token": other, "order": swapped, "shape": data.tokens.view(7, 3),
            "length": data.tokens[:, :6], "same": data.tokens.clone(),
        }  # fmt: skip
        for case, tokens in cases.items():
            mine = tokens if group.rank == group.size - 1 else data.tokens
            try:
                model(mine, labels=mine.clone())
                found[f"{name}, {case}"] = ""
            except ModelError as error:
                found[f"{name}, {case}"] = str(error)
        group.check_data = False
        group.traffic.messages.clear()
        model(data.tokens, labels=data.labels)
        found[f"{name}, unchecked"] = group.traffic.messages.get("check/all_reduce", 0)
        group.check_data = True
    return found


def replaced_loss(group: TensorGroup) -> Any:
    """A model whose loss is not replaceable still trains, from whole logits."""
    sizes, data = PLAIN, batch(PLAIN)
    reference = build(sizes)
    want = step(reference, data)
    ours = sharded(build(sizes), group)
    ours.loss_function = next_token_loss
    for hook in list(ours._forward_pre_hooks):
        del ours._forward_pre_hooks[hook]
        ours._forward_pre_hooks_with_kwargs.pop(hook, None)
    return summary(step_errors(ours, step(ours, data), reference, want, sizes, group))


# Where the number of ranks plays no part beyond there being more than one: not on 4.
_UP_TO_TWO = (
    optimizer_steps, layer_calls, whole_logits, frozen, mixed_precision, decoding, replaced_loss,
)  # fmt: skip
_ANY = (
    exact, hard_inputs, precision, outliers, large_halves, tiers, replicas, losses, out_of_range,
    state_dicts, subgroups, late_ranks, different_data,
)  # fmt: skip


def of_size(size: int) -> dict[str, Callable[[TensorGroup], Any]]:
    """Return the scenarios for a group of `size` ranks."""
    scenarios = (*_ANY, *(_UP_TO_TWO if size <= 2 else ()), *((overlap,) if size == 2 else ()))
    return {each.__name__: each for each in scenarios}
