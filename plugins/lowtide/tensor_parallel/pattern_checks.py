"""Does a model have what its pattern says? Every message names the layer and the part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.layers import Sharded
from lowtide.tensor_parallel.patterns import LayerPattern, ModelPattern, ModelShape, Projection
from lowtide.tensor_parallel.recognise import activation_name, check_own_forward, factors_of


def check_model(pattern: ModelPattern, model: nn.Module) -> ModelShape:
    """Compare `model`, unsharded, with its pattern: every part is there and has the right size.

    Returns:
        The sizes of the model.

    Raises:
        ModelError: A part is missing, is of another kind, or its size is not the one that the
            pattern's `shape` says; or ZeRO 3 has partitioned the parameters.
    """
    name = f'{type(model).__name__} (pattern "{pattern.name}")'
    if any(isinstance(module, Sharded) for module in model.modules()):
        raise ModelError(
            f"{name}: is spread over ranks already; a model can be converted once, so build it "
            f"anew, and load_unsharded_state_dict into the new one to go on"
        )
    for parameter_name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):  # DeepSpeed's mark
            raise ModelError(
                f"{name}: {parameter_name} is already partitioned by DeepSpeed's ZeRO 3; build "
                f"the model outside of deepspeed.zero.Init, it is partitioned after it is sharded"
            )
    for path in (pattern.embedding, pattern.layers, pattern.final_norm, pattern.head):
        if _part(model, path) is None:
            raise ModelError(f"{name}: has no {path}; mend the model or the pattern's path")
    layers = list(model.get_submodule(pattern.layers).named_children())
    if not layers:
        raise ModelError(f"{name}: {pattern.layers} is empty, allowed is 1 decoder layer or more")
    for index, layer in layers:
        missing = missing_parts(pattern.layer, layer)
        if missing:
            raise ModelError(
                f"{pattern.layers}.{index} ({type(layer).__name__}): has no {', '.join(missing)}, "
                f'which pattern "{pattern.name}" names; mend the model or register a pattern '
                f"of its own"
            )
    shape = pattern.shape(model)
    _check_shape(pattern, shape)
    _expect(pattern.layers, "layers", len(layers), shape.layers)
    _check_ends(pattern, model, shape)
    for path in (pattern.embedding, pattern.final_norm, pattern.head):
        check_own_forward(model.get_submodule(path), path)
    for index, layer in layers:
        check_own_forward(layer, f"{pattern.layers}.{index}")
        _check_layer(pattern.layer, layer, f"{pattern.layers}.{index}", shape)
    return shape


def missing_parts(pattern: LayerPattern, layer: nn.Module) -> list[str]:
    """Return the paths of `pattern` that lead to no module in `layer`."""
    paths = [pattern.attention_norm, pattern.mlp_norm]
    paths += [projection.path for projection in pattern.projections]
    optional = (pattern.query_norm, pattern.key_norm, pattern.mlp_activation)
    paths += [path for path in optional if path is not None]
    return [path for path in paths if _part(layer, path) is None]


def nearest_misfit(patterns: Iterable[ModelPattern], model: nn.Module) -> str:
    """Return a sentence about the pattern that `model` misses by least, or an empty string."""
    best: tuple[int, str] | None = None
    for pattern in patterns:
        layers = _part(model, pattern.layers)
        first = next(iter(layers.named_children()), None) if layers is not None else None
        if first is None:
            continue
        place = f"{pattern.layers}.{first[0]} ({type(first[1]).__name__})"
        missing = missing_parts(pattern.layer, first[1])
        if len(missing) == len(pattern.layer.projections) + 2:
            continue  # nothing in common
        text = f'Nearest is "{pattern.name}", but {place} has no {", ".join(missing)}. '
        if not missing:
            text = (
                f'{place} has every part of "{pattern.name}", but the model is of another class, '
                f"whose forward may differ. "
            )
        if best is None or len(missing) < best[0]:
            best = (len(missing), text)
    return best[1] if best is not None else ""


def _part(root: nn.Module, path: str) -> Any:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _expect(where: str, what: str, found: Any, allowed: Any) -> None:
    if found != allowed:
        raise ModelError(
            f"{where}: {what} is {found}, allowed is {allowed} by the sizes of the model; mend "
            f"the model or the pattern"
        )


def _check_shape(pattern: ModelPattern, shape: ModelShape) -> None:
    where = f'pattern "{pattern.name}"'
    for name in ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "vocabulary"):
        if getattr(shape, name) < 1:
            raise ModelError(f"{where}: {name} is {getattr(shape, name)}, allowed is from 1")
    if shape.heads % shape.kv_heads:
        raise ModelError(
            f"{where}: kv_heads {shape.kv_heads} does not divide heads {shape.heads}; every key "
            f"and value head serves the same number of query heads"
        )
    if shape.head_width % 2:
        raise ModelError(
            f"{where}: head_width is {shape.head_width}, allowed are even numbers (the rotary "
            f"embedding turns pairs)"
        )
    if shape.norm not in ("rms", "layer"):
        raise ModelError(f'{where}: norm is "{shape.norm}", allowed are "rms" and "layer"')


def _check_ends(pattern: ModelPattern, model: nn.Module, shape: ModelShape) -> None:
    for path in (pattern.embedding, pattern.head):
        _expect(path, "weight", _weight_shape(model, path), (shape.vocabulary, shape.width))
    head, embedding = model.get_submodule(pattern.head), model.get_submodule(pattern.embedding)
    _expect(pattern.head, "is_tied", head.weight is embedding.weight, shape.is_tied)
    _check_norm(model, pattern.final_norm, "", shape.width, shape.norm)


def _check_layer(pattern: LayerPattern, layer: nn.Module, where: str, shape: ModelShape) -> None:
    for path in (pattern.attention_norm, pattern.mlp_norm):
        _check_norm(layer, path, where, shape.width, shape.norm)
    for inner in (pattern.query_norm, pattern.key_norm):
        if inner is not None:
            _check_norm(layer, inner, where, shape.head_width, "rms")
    if pattern.mlp_activation is not None:
        place = f"{where}.{pattern.mlp_activation}"
        found = activation_name(layer.get_submodule(pattern.mlp_activation), place)
        _expect(place, "activation", found, shape.mlp_activation)
    for projection in pattern.projections:
        _check_projection(layer, projection, f"{where}.{projection.path}", shape)


def _check_projection(
    layer: nn.Module, projection: Projection, where: str, shape: ModelShape
) -> None:
    module: Any = layer.get_submodule(projection.path)
    factors = factors_of(module, where)
    source: Any = module if factors is None else factors
    rows = sum(shape.rows(role) for role in projection.roles)
    roles = " then ".join(projection.roles)
    _expect(where, f"output width ({roles})", source.out_features, rows)
    _expect(where, "input width", source.in_features, shape.columns(projection.roles[0]))


def _check_norm(root: nn.Module, path: str, where: str, width: int, kind: str) -> None:
    place = f"{where}.{path}" if where else path
    module: Any = root.get_submodule(path)
    has_no_gain = getattr(module, "weight", None) is None
    if kind != "layer" or not has_no_gain:
        _expect(place, "weight", _weight_shape(root, path), (width,))
    has_bias = getattr(module, "bias", None) is not None
    is_layer_norm = isinstance(module, nn.LayerNorm) or has_bias or has_no_gain
    if kind == "layer" and not is_layer_norm:  # a LayerNorm of its own class, without a bias
        is_layer_norm = "LayerNorm" in type(module).__name__
    _expect(place, "norm", "layer" if is_layer_norm else "rms", kind)


def _weight_shape(root: nn.Module, path: str) -> Any:
    weight = getattr(root.get_submodule(path), "weight", None)
    return None if weight is None else tuple(weight.shape)
