"""What users do with a Hugging Face model on two ranks: copies, inputs that differ, sampling."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel import TensorParallelConfig, factorise, shard
from lowtide.tensor_parallel.group import TensorGroup
from tests.tensor_parallel.models import hugging_face, tokens

CONFIG = TensorParallelConfig(degree=2, rank=16, crossing="linear")


def low_rank() -> Any:
    model = hugging_face("llama", use_cache=False)
    factorise(model, CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "crossing" in name:  # they start at zero
                parameter.fill_(0.05)
    return model


def copies(group: TensorGroup) -> Any:
    """A deep copy computes what the original computed, whatever becomes of that."""
    ids = tokens()
    original = shard(low_rank(), group).model.train()
    want = original(ids, labels=ids)
    twin = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(1.0)
    original.eval()(ids, labels=ids)  # whose head gives whole logits now
    found = twin(ids, labels=ids)
    found.loss.backward()
    facts = {
        "loss": [found.loss.item(), want.loss.item()],
        "logits": torch.equal(found.logits, want.logits),
        "columns": found.logits.shape[-1],
        "gradients": [
            sum(p.grad is not None for p in each.parameters()) for each in (original, twin)
        ],
        "parameters": len(list(twin.parameters())),
        "groups": len({id(m.group) for m in twin.modules() if hasattr(m, "group")}),
    }
    expected = low_rank()(ids).logits
    whole = twin.eval()(ids).logits
    facts["error"] = ((whole - expected).norm() / expected.norm()).item()
    first = twin.generate(ids[:, :4], max_new_tokens=2, do_sample=False)
    facts["generated"] = torch.equal(first, low_rank().generate(ids[:, :4], max_new_tokens=2))
    return facts


def different_inputs(group: TensorGroup) -> Any:
    """What each rank says when something besides the tokens differs on the last one."""
    model = shard(low_rank(), group).model
    ids = tokens()
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids)
    padded, later = mask.clone(), positions + 1
    padded[0, 0] = 0
    half = model.get_input_embeddings()(ids)
    additive = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9, dtype=bool).triu(1), -1e9)  # type: ignore[call-overload]
    halved = additive.clone()
    halved[1, 0, 3, 2] = -0.5
    cases: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {
        "mask": ({"attention_mask": mask}, {"attention_mask": padded}),
        "no mask": ({"attention_mask": mask}, {}),
        "own mask": ({"attention_mask": additive}, {"attention_mask": halved}),
        "positions": ({"position_ids": positions}, {"position_ids": later}),
        "same": ({"attention_mask": padded}, {"attention_mask": padded.clone()}),
    }
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        name: (lambda a=a: model(ids, **a), lambda b=b: model(ids, **b))  # type: ignore[misc]
        for name, (a, b) in cases.items()
    }
    calls["length"] = lambda: model(inputs_embeds=half), lambda: model(inputs_embeds=half[:, :5])
    calls["embedded"] = lambda: model(ids), lambda: model(inputs_embeds=half)
    calls["same embedded"] = (lambda: model(inputs_embeds=half),) * 2
    # The tokens of embeddings are compared where they are made.
    embed = model.get_input_embeddings()
    calls["embedding"] = lambda: embed(ids), lambda: embed(ids.flip(0))
    found = {}
    for name, (here, there) in calls.items():
        group.traffic.messages.clear()
        try:
            (there if group.rank == group.size - 1 else here)()
            found[name] = ""
        except ModelError as error:
            found[name] = str(error)
        found[f"{name}, messages"] = group.traffic.messages["check/all_reduce"]
    return found


def sampling(group: TensorGroup) -> Any:
    """Ranks with random numbers of their own sample the first one's tokens."""
    ids = tokens(2, 4)
    whole, model = low_rank(), shard(low_rank(), group).model
    torch.manual_seed(0)
    want = whole.generate(ids, do_sample=True, max_new_tokens=12)
    torch.manual_seed(group.rank)
    before = torch.get_rng_state()
    found = model.generate(ids, do_sample=True, max_new_tokens=12)
    is_kept = torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    model.generate(ids, do_sample=True, max_new_tokens=3)
    facts = {"sampled": found.tolist(), "want": want.tolist(), "state is kept": is_kept}
    return facts | {"next": torch.rand(4).tolist()}


ALL: dict[str, Callable[[TensorGroup], Any]] = {
    each.__name__: each for each in (copies, different_inputs, sampling)
}
