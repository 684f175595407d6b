"""What is sent, seen from below: a dispatch mode that sees every collective and matrix product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowtide.tensor_parallel.group import TensorGroup
from tests.tensor_parallel.compare import batch, sharded
from tests.tensor_parallel.reference import Sizes, build

# Which argument is as large as what is sent: the sum, what is gathered, what is scattered.
_COLLECTIVES: dict[str, tuple[str, Callable[[Any], torch.Tensor]]] = {
    "c10d::allreduce_": ("all_reduce", lambda args: args[0][0]),
    "c10d::_allgather_base_": ("all_gather", lambda args: args[0]),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", lambda args: args[1]),
}
_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}
EQUAL_RANKS = Sizes(attention_rank=16, mlp_rank=16, activation="silu")
LAYOUTS = {
    "equal ranks": EQUAL_RANKS,
    "different ranks": replace(EQUAL_RANKS, attention_rank=20, mlp_rank=12, has_biases=True),
    "fused": replace(EQUAL_RANKS, attention_rank=20, mlp_rank=12, is_fused=True),
}
BATCH = (2, 5)


class Watch(TorchDispatchMode):
    """Counts collectives with their elements and bytes, and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()
        self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name.startswith("c10d"):
            kind, sent = _COLLECTIVES[name]  # an unknown collective is an error
            self.messages[kind] += 1
            self.elements[kind] += sent(args).numel()
            self.nbytes[kind] += sent(args).nbytes
        self.products += name in _PRODUCTS
        return func(*args, **(kwargs or {}))

    def as_dict(self) -> dict[str, Any]:
        return {
            "messages": dict(self.messages),
            "elements": dict(self.elements),
            "nbytes": dict(self.nbytes),
            "products": self.products,
        }


def _watched(
    sizes: Sizes,
    group: TensorGroup,
    dtype: torch.dtype = torch.float32,
    tier: str = "none",
    overlaps: bool = False,
) -> dict[str, Any]:
    model = sharded(build(sizes, dtype=dtype), group, tier, overlaps=overlaps)
    data = batch(sizes, BATCH)
    group.traffic.messages.clear()
    group.traffic.payload_bytes.clear()
    with Watch() as forward:
        loss, _ = model(data.tokens, labels=data.labels)
    with Watch() as backward:
        loss.backward()
    return {
        "forward": forward.as_dict(),
        "backward": backward.as_dict(),
        "traffic": group.traffic.as_dict(),
    }


def messages(group: TensorGroup) -> Any:
    """One step of models of 1 and of 3 blocks, by layout, dtype and tier."""
    cases = [("equal ranks", dtype, "none") for dtype in ("bfloat16", "float32", "float64")]
    cases += [("equal ranks", "float16", "none"), ("fused", "bfloat16", "none")]
    cases += [("different ranks", "bfloat16", tier) for tier in ("none", "latents")]
    cases += [("different ranks", "bfloat16", "sharded_latents")]
    cases += [("different ranks", "float32", "sharded_latents")]
    return {
        f"{layout}, {dtype}, {tier}": {
            str(layers): _watched(
                replace(LAYOUTS[layout], layers=layers), group, getattr(torch, dtype), tier
            )
            for layers in (1, 3)
        }
        for layout, dtype, tier in cases
    }


def other_messages(group: TensorGroup) -> Any:
    """The same with LayerNorm, and with halves of the batch that take turns."""
    of_norm = replace(EQUAL_RANKS, norm="layer")
    cases = {
        f"layer norm, {dtype}": (of_norm, dtype, False) for dtype in ("bfloat16", "float32")
    } | {"overlap, bfloat16": (EQUAL_RANKS, "bfloat16", True)}
    return {
        name: {
            str(layers): _watched(
                replace(sizes, layers=layers), group, getattr(torch, dtype), overlaps=overlaps
            )
            for layers in (1, 3)
        }
        for name, (sizes, dtype, overlaps) in cases.items()
    }


def message_ends(group: TensorGroup) -> Any:
    """Embedding, last norm and head by themselves."""
    found: dict[str, Any] = {}
    for name, is_tied in {"untied": False, "tied": True}.items():
        sizes = replace(EQUAL_RANKS, is_tied=is_tied, layers=1)
        model = sharded(build(sizes, dtype=torch.bfloat16), group)
        tokens = batch(sizes, BATCH).tokens
        for check in (True, False):
            group.check_data = check
            with Watch() as forward:
                x = model.embedding(tokens)
            found[f"{name}, embedding, check {check}"] = forward.as_dict()
        group.check_data = True
        with Watch() as backward:
            x.backward(torch.ones_like(x))
        found[f"{name}, embedding, backward"] = backward.as_dict()
        x = x.detach().requires_grad_()
        with Watch() as forward:
            normed = model.norm(x)
        with Watch() as backward:
            normed.backward(torch.ones_like(normed))
        found[f"{name}, norm"] = forward.as_dict()
        found[f"{name}, norm, backward"] = backward.as_dict()
    return found


def frozen_messages(group: TensorGroup) -> Any:
    """What backward sends when only the last block's last projection is trained."""
    sizes = replace(EQUAL_RANKS, layers=3)
    found = {}
    for tier in ("none", "latents", "sharded_latents"):
        model = build(sizes)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("layers.2.down"))
        sharded(model, group, tier)
        data = batch(sizes, BATCH)
        loss, _ = model(data.tokens, labels=data.labels)
        with Watch() as backward:
            loss.backward()
        found[tier] = backward.as_dict()
    return found


ALL: dict[str, Callable[[TensorGroup], Any]] = {
    each.__name__: each for each in (messages, other_messages, message_ends, frozen_messages)
}
