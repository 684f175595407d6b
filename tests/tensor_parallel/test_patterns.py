"""Patterns: the right one is found, models that do not fit are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.patterns import (
    LayerInputs,
    LayerPattern,
    ModelShape,
    Projection,
    find_pattern,
    known_patterns,
    register_pattern,
    unregister_pattern,
)
from tests.tensor_parallel.models import (
    FAMILIES,
    SMALL,
    VOCABULARY,
    SmallDecoder,
    hugging_face,
    in_float64,
    tokens,
)


@pytest.fixture
def small() -> Iterator[Any]:
    register_pattern(SMALL)
    yield SMALL
    unregister_pattern("small")


def refused(message: str) -> Any:
    return pytest.raises(ModelError, match=message)


def own_layer(pattern: Any, layer: Any, shape: ModelShape, inputs: LayerInputs) -> Tensor:
    """Compute one layer from nothing but pattern, shape and bound inputs."""
    parts = pattern.layer

    def norm(path: str, x: Tensor) -> Tensor:
        module = layer.get_submodule(path)
        weight = getattr(module, "weight", None)
        if shape.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.epsilon)
            return x if weight is None else x * weight + module.bias
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.epsilon) * weight

    def project(projections: Any, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for each in projections:
            sizes = [shape.rows(role) for role in each.roles]
            y = layer.get_submodule(each.path)(x)
            found |= dict(zip(each.roles, y.split(sizes, dim=-1), strict=True))
        return found

    def turn(x: Tensor) -> Tensor:
        cos, sin = (t if t.dim() == 2 else t[:, None] for t in (inputs.cos, inputs.sin))
        x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        low, high = x.chunk(2, dim=-1)
        return torch.cat((x * cos + torch.cat((-high, low), dim=-1) * sin, rest), -1)

    x = inputs.hidden
    batch, length, _ = x.shape
    heads = {
        role: y.view(batch, length, -1, shape.head_width).transpose(1, 2)
        for role, y in project(parts.attention_inputs, norm(parts.attention_norm, x)).items()
    }
    if parts.query_norm is not None:
        heads["q"] = norm(parts.query_norm, heads["q"])
        heads["k"] = norm(parts.key_norm, heads["k"])
    y = F.scaled_dot_product_attention(
        turn(heads["q"]), turn(heads["k"]), heads["v"], inputs.attention_mask,
        is_causal=inputs.attention_mask is None, scale=shape.attention_scale, enable_gqa=True,
    )  # fmt: skip
    y = y.transpose(1, 2).reshape(batch, length, -1)
    x = x + layer.get_submodule(parts.attention_output.path)(y)
    up = project(parts.mlp_inputs, norm(parts.mlp_norm, x))
    assert shape.mlp_activation == "silu"
    return x + layer.get_submodule(parts.mlp_output.path)(F.silu(up["gate"]) * up["up"])


def compare_layers(
    pattern: Any, model: Any, ids: Tensor, tolerance: float = 1e-12, **more: Any
) -> list[LayerInputs]:
    """Hold `own_layer` to the output of every layer of `model`; return what was bound."""
    shape, bound = pattern.shape(model), []

    def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        bound.append(pattern.bind(args, kwargs))
        expected = own_layer(pattern, layer, shape, bound[-1])
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)

    layers = model.get_submodule(pattern.layers)
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        model(ids, **more)
    for handle in handles:
        handle.remove()
    assert len(bound) == shape.layers
    return bound


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_layer_is_what_its_pattern_says(family: str) -> None:
    model = in_float64(hugging_face(family))
    pattern = find_pattern(model)
    assert pattern.name == family
    bound = compare_layers(pattern, model, tokens())
    assert all(each.attention_mask is None for each in bound)
    padding = torch.ones(2, 9, dtype=torch.int64)
    padding[0, :3] = 0
    bound = compare_layers(pattern, model, tokens(), attention_mask=padding)
    assert all(each.attention_mask is not None for each in bound)
    shape = pattern.shape(model)
    config = model.config
    norm, epsilon = {
        "olmo": ("layer", 1e-5), "stablelm": ("layer", getattr(config, "layer_norm_eps", 0.0)),
    }.get(family, ("rms", getattr(config, "rms_norm_eps", 0.0)))  # fmt: skip
    assert shape == ModelShape(
        width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=56,
        vocabulary=VOCABULARY, norm=norm, epsilon=epsilon,  # type: ignore[arg-type]
        mlp_activation="silu", is_tied=False, attention_scale=8**-0.5,
    )  # fmt: skip


@pytest.mark.parametrize(("implementation", "tolerance"), [("sdpa", 1e-12), ("eager", 1e-6)])
def test_a_sliding_window_is_in_the_mask(implementation: str, tolerance: float) -> None:
    model = hugging_face("mistral", sliding_window=4, attn_implementation=implementation)
    model = in_float64(model)
    # The eager implementation has its softmax in float32.
    bound = compare_layers(find_pattern(model), model, tokens(), tolerance)
    assert bound[0].attention_mask is not None
    long = model(tokens()).logits
    model.config.sliding_window = None
    # The window mattered, so the mask that was compared above carried it.
    assert not torch.allclose(long, model(tokens()).logits)


def test_scaled_rotary_embeddings_come_from_the_model() -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    model = in_float64(hugging_face("llama", rope_parameters=rope))
    compare_layers(find_pattern(model), model, tokens())


def test_head_width_and_ties_are_read_from_the_model() -> None:
    model = hugging_face("qwen3", head_dim=6, tie_word_embeddings=True)
    shape = find_pattern(model).shape(model)
    assert (shape.head_width, shape.is_tied, shape.attention_scale) == (6, True, 6**-0.5)
    model.resize_token_embeddings(80)
    assert find_pattern(model).shape(model).vocabulary == 80


def test_a_cache_is_passed_on() -> None:
    model = hugging_face("llama")
    bound = compare_layers_in_float64(model)
    cache = bound[0].cache
    assert cache is bound[1].cache
    assert cache.get_seq_length() == 9


def compare_layers_in_float64(model: Any) -> list[LayerInputs]:
    model = in_float64(model)
    return compare_layers(find_pattern(model), model, tokens(), use_cache=True)


def test_a_subclass_is_matched_and_another_class_is_not() -> None:
    model = hugging_face("llama")
    model.__class__ = type("Mine", (type(model),), {})
    assert find_pattern(model).name == "llama"
    model.__class__ = type("Unknown", (nn.Module,), {})
    with refused(r"Unknown: no pattern matches.*model.layers.0 \(LlamaDecoderLayer\) has every"):
        find_pattern(model)


@torch.no_grad()
def test_the_loss_function_is_set_and_put_back() -> None:
    model = hugging_face("llama")
    pattern = find_pattern(model)
    ids = tokens()
    before = model(ids, labels=ids).loss
    seen: dict[str, Any] = {}

    def own(**given: Any) -> Tensor:
        seen.update(given)
        return given["logits"].sum() * 0 + 7

    undo = pattern.set_loss(model, own)
    assert model(ids, labels=ids).loss.item() == 7
    assert torch.equal(seen["labels"], ids)
    assert seen["logits"].shape == (2, 9, VOCABULARY)
    assert undo is not None
    undo()
    assert torch.equal(model(ids, labels=ids).loss, before)
    model.loss_function = lambda **_: torch.tensor(5.0)
    again = pattern.set_loss(model, own)
    assert again is not None
    again()
    assert model(ids, labels=ids).loss.item() == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "config.attention_dropout is 0.1, allowed is 0"),
        ({"pretraining_tp": 2}, "config.pretraining_tp is 2, allowed is 1"),
        ({"hidden_act": "quick_gelu"}, "model.layers.0.mlp.act_fn: the activation is QuickGELU"),
    ],
)
def test_features_without_a_shape_are_refused(changes: dict[str, Any], message: str) -> None:
    with refused(message):
        find_pattern(hugging_face("llama", **changes))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmo", {"clip_qkv": 3.0}, "config.clip_qkv is 3.0, and clamped queries"),
        (
            "stablelm",
            {"qk_layernorm": True},
            "config.qk_layernorm is True, and a LayerNorm of each head",
        ),
        ("stablelm", {"hidden_dropout": 0.1}, "config.hidden_dropout is 0.1, allowed is 0"),
    ],
)
def test_features_of_other_families_are_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with refused(message):
        find_pattern(hugging_face(family, **changes))


def test_attention_without_dense_masks_is_refused() -> None:
    model = hugging_face("llama")
    model.config._attn_implementation = "flex_attention"
    with refused('attn_implementation is "flex_attention".*load the model with attn_impl'):
        find_pattern(model)
    pattern = known_patterns()[0]
    with refused("got an attention mask of type Tensor, allowed are None and"):
        pattern.bind(
            (torch.ones(1),), {"attention_mask": torch.ones(2, 9), "position_embeddings": 0}
        )
    with refused("without position_embeddings"):
        pattern.bind((torch.ones(1),), {})


def test_a_mixture_of_experts_is_refused_by_the_missing_part() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with refused(
        r'MixtralForCausalLM: no pattern matches.*Known: "llama".*Nearest is "llama", but '
        r"model.layers.0 \(MixtralDecoderLayer\) has no mlp.gate_proj, .*register_pattern"
    ):
        find_pattern(transformers.MixtralForCausalLM(config))


def without(path: str) -> Any:
    def change(model: Any) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, None)

    return change


def with_part(path: str, part: nn.Module) -> Any:
    return lambda model: model.set_submodule(path, copy.deepcopy(part))


def mark_partitioned(model: Any) -> None:
    model.model.norm.weight.ds_id = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head"), r'\(pattern "llama"\): has no lm_head'),
        (without("model.layers.1.input_layernorm"), r"model.layers.1 \(.*\): has no input_layern"),
        (without("model.layers.1.mlp.act_fn"), "model.layers.1 .*has no mlp.act_fn"),
        (with_part("model.layers", nn.ModuleList()), "model.layers is empty"),
        (
            with_part("model.layers.1.input_layernorm", nn.Identity()),
            r"model.layers.1.input_layernorm: weight is None, allowed is \(32,\)",
        ),
        (
            with_part("model.layers.0.input_layernorm", nn.RMSNorm(31)),
            r"model.layers.0.input_layernorm: weight is \(31,\), allowed is \(32,\)",
        ),
        (with_part("model.norm", nn.LayerNorm(32)), "model.norm: norm is layer, allowed is rms"),
        (
            with_part("model.layers.1.self_attn.q_proj", nn.Linear(32, 24)),
            r"model.layers.1.self_attn.q_proj: output width \(q\) is 24, allowed is 32",
        ),
        (
            with_part("model.layers.1.mlp.down_proj", nn.Linear(32, 32)),
            "model.layers.1.mlp.down_proj: input width is 32, allowed is 56",
        ),
        (
            with_part("model.layers.1.mlp.up_proj", nn.Conv1d(1, 1, 1)),
            "model.layers.1.mlp.up_proj: is torch.nn.modules.conv.Conv1d",
        ),
        (
            with_part("model.layers.1.mlp.act_fn", nn.ReLU()),
            "model.layers.1.mlp.act_fn: activation is relu, allowed is silu",
        ),
        (with_part("lm_head", nn.Linear(32, 60)), r"lm_head: weight is \(60, 32\), allowed is"),
        (mark_partitioned, "model.norm.weight is already partitioned by DeepSpeed's ZeRO 3"),
    ],
)
def test_a_model_that_differs_from_its_pattern_is_refused_by_place(
    change: Any, message: str
) -> None:
    model = hugging_face("llama")
    change(model)
    with refused(message):
        find_pattern(model)


def test_key_norms_have_the_width_of_a_head() -> None:
    model = hugging_face("qwen3")
    model.model.layers[0].self_attn.k_norm = nn.RMSNorm(16)
    with refused(r"self_attn.k_norm: weight is \(16,\), allowed is \(8,\)"):
        find_pattern(model)


def test_a_model_of_ones_own_needs_a_pattern_and_nothing_else(small: Any) -> None:
    torch.manual_seed(0)
    model = SmallDecoder().double()
    assert find_pattern(model) is small
    compare_layers(small, model, tokens())
    assert small.set_loss(model, lambda **_: torch.zeros(())) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3, "kv_heads": 2}, "kv_heads 2 does not divide heads 3"),
        ({"head_width": 7}, "head_width is 7, allowed are even numbers"),
        ({"kv_heads": 0}, "kv_heads is 0, allowed is from 1"),
        ({"norm": "batch"}, 'norm is "batch", allowed are'),
        ({"layers": 3}, "blocks: layers is 2, allowed is 3"),
        ({"kv_heads": 1}, r"attention.key_value: output width \(k then v\) is 32, allowed is 16"),
        ({"mlp_width": 80}, r"feed_forward.gate_up: output width \(gate then up\) is 80, allowed"),
        ({"is_tied": False}, "unembedding: is_tied is True, allowed is False"),
        ({"vocabulary": 60}, r"embedding: weight is \(61, 32\), allowed is \(60, 32\)"),
    ],
)
def test_a_pattern_that_says_other_sizes_is_refused(changes: dict[str, Any], message: str) -> None:
    class Wrong(type(SMALL)):  # type: ignore[misc]
        def shape(self, model: Any) -> ModelShape:
            return replace(SMALL.shape(model), **changes)

    wrong = Wrong(**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__})
    register_pattern(wrong)
    try:
        with refused(message):
            find_pattern(SmallDecoder())
    finally:
        unregister_pattern("small")


def test_a_wrong_path_is_refused() -> None:
    register_pattern(replace(SMALL, layer=replace(SMALL.layer, mlp_norm="norm2")))
    try:
        with refused(r'blocks.0 \(Block\): has no norm2, which pattern "small" names'):
            find_pattern(SmallDecoder())
    finally:
        unregister_pattern("small")


def test_names_are_taken_once(small: Any) -> None:
    register_pattern(small)
    assert [each.name for each in known_patterns()].count("small") == 1
    with refused('the name "small" is taken by another pattern'):
        register_pattern(replace(small, embedding="other"))
    with refused('the name "llama" is taken'):
        register_pattern(replace(small, name="llama"))


def test_the_newest_pattern_comes_first_and_the_built_in_ones_last() -> None:
    model = hugging_face("llama")
    mine = replace(find_pattern(model), name="mine")
    newer = replace(mine, name="newer")
    try:
        for pattern in (mine, newer):
            register_pattern(pattern)
            assert find_pattern(model) is pattern
    finally:
        unregister_pattern("mine")
        unregister_pattern("newer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_inputs": (Projection("a", ("q", "k")),)}, r"attention_inputs: got roles \['q"),
        ({"mlp_inputs": (Projection("a", ("gate", "up", "up")),)}, "mlp_inputs: got roles"),
        ({"mlp_output": Projection("a", ("o",))}, r"mlp_output: got .*each of \['down'\] once"),
    ],
)
def test_roles_are_complete(changes: dict[str, Any], message: str) -> None:
    fields = {name: getattr(SMALL.layer, name) for name in SMALL.layer.__dataclass_fields__}
    with refused(message):
        LayerPattern(**(fields | changes))
