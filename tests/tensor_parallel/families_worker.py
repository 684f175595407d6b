"""Hugging Face families, converted at full rank and sharded, against themselves before."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lowtide.tensor_parallel.config import TensorParallelConfig
from lowtide.tensor_parallel.factorisation import factorise
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.sharding import shard, unsharded_state_dict
from tests.helpers.ranks import leave_result
from tests.tensor_parallel.models import hugging_face, in_float64, tokens


def _distance(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def converted(family: str, group: TensorGroup, **settings: Any) -> dict[str, Any]:
    """Return how far loss, logits and a few gradients are from those of the model itself."""
    source = in_float64(hugging_face(family)).train()
    model = copy.deepcopy(source)
    report = factorise(model, TensorParallelConfig(degree=group.size, rank=32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shard(model, group, shape=report.shape, **settings)
    ids = tokens()
    # Of each row its own, so that cosines and sines are too.
    places = torch.arange(ids.shape[1]) + torch.tensor([[0], [3]])
    logits = source(
        ids, position_ids=places, use_cache=False
    ).logits  # transformers' own loss would round to float32
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    got = model(ids, labels=ids, position_ids=places, use_cache=False).loss
    want.backward()
    got.backward()
    name = "model.embed_tokens.weight"
    mine = source.get_parameter(name).grad.chunk(group.size, 1)[group.rank]
    result = {
        "loss": _distance(got.detach(), want.detach()),
        "embedding": _distance(model.get_parameter(name).grad, mine),
    }
    gain = "model.layers.1.input_layernorm.weight"
    if gain in dict(source.named_parameters()):
        for ours, theirs in (("gain", "weight"), ("norm_bias", "bias")):
            path = f"model.layers.1.input_layernorm.{theirs}"
            if path in dict(source.named_parameters()):
                down: Any = model.get_submodule("model.layers.1").attention_in.down
                part = source.get_parameter(path).grad.chunk(group.size)[group.rank]
                result[theirs] = _distance(getattr(down, ours).grad, part)
    exported = unsharded_state_dict(model, group)
    result["export"] = sorted(exported) == sorted(before) and all(
        torch.equal(exported[key], before[key]) for key in before
    )
    with torch.no_grad():
        wanted = source.eval()(ids, use_cache=False).logits
        result["logits"] = _distance(model.eval()(ids, use_cache=False).logits, wanted)
        result["generated"] = torch.equal(
            model.generate(ids[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0),
            source.generate(ids[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0),
        )
    return result


def main() -> None:
    """Compare the families named on the command line."""
    dist.init_process_group("gloo")
    group = TensorGroup(dist.group.WORLD)
    found = {}
    for family in sys.argv[1:]:
        found[family] = converted(family, group)
        found[f"{family}, overlap"] = converted(family, group, overlaps_forward=True)
    leave_result(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
