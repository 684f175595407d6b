"""What users do with a model around its conversion: it works, or is refused by name."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowtide.core.errors import ModelError
from lowtide.core.lifecycle import Event, Moment
from lowtide.tensor_parallel import TensorParallelConfig, factorisation, factorise, group, shard
from lowtide.tensor_parallel.adapters.deepspeed import WholeSaver
from lowtide.tensor_parallel.build import Builder
from lowtide.tensor_parallel.group import TensorGroup, fingerprint
from lowtide.tensor_parallel.parameters import Successors
from tests.tensor_parallel.models import hugging_face, tokens
from tests.tensor_parallel.starts import of_each

pytestmark = pytest.mark.timeout(600)  # the first test of two ranks starts them for all


class OfTwo(TensorGroup):
    """Pretends to be rank 0 of 2; what has to be refused is refused before a message."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2


def convert(model: Any, group: TensorGroup | None = None) -> Any:
    factorise(model, TensorParallelConfig(degree=1, rank=16))
    return shard(model, group or TensorGroup()).model


def test_attention_with_a_mask_stays_with_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # On CUDA grouped heads and a mask together end in the kernel that stores all scores.
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention
    calls: list[tuple[bool, bool]] = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((kwargs["attn_mask"] is not None, kwargs["enable_gqa"]))
        return attention(*args, **kwargs)

    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padding on the left
    low_rank = hugging_face("llama")
    factorise(low_rank, TensorParallelConfig(degree=1, rank=16))
    want = [low_rank(ids, attention_mask=each).logits for each in (mask, None)]
    model = convert(hugging_face("llama"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    found = [model(ids, attention_mask=each).logits for each in (mask, None)]
    assert calls == [(True, False)] * 2 + [(False, True)] * 2
    for mine, theirs, kept in zip(found, want, (mask, torch.ones_like(mask)), strict=True):
        torch.testing.assert_close(mine[kept > 0], theirs[kept > 0], rtol=2e-5, atol=2e-5)


def test_fingerprints_tell_batches_apart_where_sums_do_not() -> None:
    first = torch.full((2, 9), 10)
    for change in ([2, -4, 2], [1, -2, 1], [0, 5, -10, 5], [1, -3, 3, -1]):
        second = first.clone()
        second[0, : len(change)] += torch.tensor(change)
        assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first) == fingerprint(first.clone())
    assert fingerprint(tokens()) != fingerprint(tokens().flip(1))
    assert abs(int(fingerprint(tokens(64, 64)))) < 2**62  # so that its negative is a number too


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fingerprints_of_masks_see_every_part(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(group, "_CHUNK", 64)
    mask = torch.zeros(2, 1, 9, 9, dtype=dtype)
    want = fingerprint(mask)
    for at in (0, 63, 64, 161):
        other = mask.clone()
        other.view(-1)[at] = -1.0
        assert fingerprint(other) != want
    assert fingerprint(mask.view(-1)[:1].expand(162)) == want, "one number, seen many times"
    swapped = torch.arange(162).to(dtype).view(2, 81)
    assert fingerprint(swapped) != fingerprint(swapped.flip(0))
    monkeypatch.undo()
    assert fingerprint(mask) == want, "whatever the parts"


def test_a_fingerprint_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Widened(TorchDispatchMode):
        longest = 0

        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.int64:
                self.longest = max(self.longest, result.numel())
            return result

    monkeypatch.setattr(group, "_CHUNK", 64)
    with Widened() as widened:
        fingerprint(torch.zeros(1000))
    assert widened.longest == 64


def test_a_deep_copy_is_saved_with_its_own_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = convert(hugging_face("llama"))
    model.save_pretrained = WholeSaver(model, degree=1)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(2.0)
    average.save_pretrained(tmp_path / "average")
    model.save_pretrained(tmp_path / "model")
    found, own = (load_file(tmp_path / each / "model.safetensors") for each in ("average", "model"))
    assert found.keys() == own.keys()
    for name, value in found.items():
        assert torch.equal(value, 2.0 * own[name]), name


def test_a_converted_model_is_not_converted_again() -> None:
    model = convert(hugging_face("llama"))
    for again in (convert, shard_again):
        with pytest.raises(ModelError, match="is spread over ranks already"):
            again(model)


def shard_again(model: Any) -> None:
    shard(model, TensorGroup())


@pytest.mark.parametrize("path", ["model.embed_tokens", "model.layers.1", "model.norm", "lm_head"])
def test_hooks_that_a_conversion_would_lose_are_refused(path: str) -> None:
    model = hugging_face("llama")
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match=f"{path}: has hooks"):
        convert(model)


def test_gradient_checkpointing_that_a_conversion_would_lose_is_refused() -> None:
    model = hugging_face("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match='activation_checkpointing to "latents"'):
        convert(model)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_is_not_returned_is_refused(name: str) -> None:
    model = convert(hugging_face("llama"))
    with pytest.raises(ModelError, match=f"{name} is set"):
        model(tokens(), **{name: True})


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_is_not_returned_is_refused_where_the_config_asks_for_it(name: str) -> None:
    model = convert(hugging_face("llama", attn_implementation="eager"))
    setattr(model.config, name, True)
    with pytest.raises(ModelError, match=f"{name} is set"):
        model(tokens())
    assert model(tokens(), **{name: False}).logits.shape == (2, 9, 61)


@pytest.mark.dist
def test_a_deep_copy_is_a_model_of_its_own_on_the_same_ranks() -> None:
    for facts in of_each(2, "copies"):
        found, wanted = facts["loss"]
        assert found == wanted
        assert facts["logits"]
        assert facts["columns"] == 31, "half of the vocabulary, as the copy's own head was told"
        assert facts["gradients"] == [0, facts["parameters"]]
        assert facts["groups"] == 1
        assert facts["error"] <= 2e-6
        assert facts["generated"]


@pytest.mark.dist
def test_inputs_beside_tokens_are_compared_in_one_message() -> None:
    for facts in of_each(2, "different_inputs"):
        for name, what in {
            "mask": "attention_mask", "no mask": "attention_mask", "own mask": "attention_mask",
            "positions": "position_ids", "length": "inputs_embeds", "embedded": "input_ids",
            "embedding": "shape",
        }.items():  # fmt: skip
            assert "got different batches" in facts[name]
            assert f"this rank: {what}" in facts[name]
        assert facts["same"] == facts["same embedded"] == ""
        assert {facts[name] for name in facts if name.endswith(", messages")} == {1}


@pytest.mark.dist
def test_ranks_with_different_seeds_sample_the_same_tokens() -> None:
    first, second = of_each(2, "sampling")
    assert first["sampled"] == second["sampled"] == first["want"]
    assert (first["state is kept"], second["state is kept"]) == (False, True)
    assert first["next"] == second["next"], "ranks seeded alike stay alike"


def test_whole_embeddings_from_outside_are_refused() -> None:
    model = convert(hugging_face("llama"), OfTwo())
    model.model.layers[0].group.check_data = False  # which is a message
    with pytest.raises(
        ModelError, match="layer 0: got 32 of the model's 32 columns, allowed are 16"
    ):
        model(inputs_embeds=torch.zeros(2, 9, 32))


def test_each_rank_uses_its_own_gpu_from_the_first_message(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.accelerator import get_accelerator

    from lowtide.tensor_parallel.adapters.deepspeed import layout

    done: list[str] = []
    new_group = dist.new_group

    def recorded(*args: Any, **kwargs: Any) -> Any:
        done.append("group")
        return new_group(*args, **kwargs)

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(get_accelerator(), "set_device", lambda index: done.append(f"GPU {index}"))
    monkeypatch.setattr(dist, "new_group", recorded)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        session: Any = None
        layout(Moment(Event.MODEL_BUILT, session, 0, model=hugging_face("llama")), 1)
    finally:
        dist.destroy_process_group()
    assert done[:2] == ["GPU 3", "group"]


def test_checkpointing_of_transformers_is_refused_after_the_conversion_too() -> None:
    model = convert(hugging_face("llama"))
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize("init", ["svd", "random"])
def test_a_conversion_frees_each_layer_before_it_makes_the_next(
    monkeypatch: pytest.MonkeyPatch, init: Literal["svd", "random"]
) -> None:
    alive: list[list[bool]] = []

    def watch(owner: Any, name: str) -> Any:
        made = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            alive.append([each() is not None for each in weights])
            return made(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    model = hugging_face("llama", num_hidden_layers=3)
    layers = model.model.layers
    weights = [weakref.ref(each.mlp.down_proj.weight) for each in layers]
    successors = Successors(model)
    foreign = torch.nn.Parameter(torch.ones(1))  # made while those are alive: they go by address
    watch(factorisation, "to_bottleneck")
    factorise(model, TensorParallelConfig(degree=1, rank=16, init=init))
    assert len(alive) == 3 * 7
    assert alive[7 * 1 + 1] == [False, True, True], "the second projection of the second layer"
    assert alive[7 * 2 + 1] == [False, False, True]
    alive.clear()
    weights = [weakref.ref(each.mlp.down_proj.down.weight) for each in layers]
    watch(Builder, "layer")
    shard(model, TensorGroup())
    assert alive[3:] == [[True, True, True], [False, True, True], [False, False, True]]
    assert alive[:3] == [[True, True, True]] * 3, "a rehearsal, which changes nothing"
    with pytest.raises(ModelError, match="is not one of the model's"):
        successors.of(foreign)
