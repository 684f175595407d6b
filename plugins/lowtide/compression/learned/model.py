"""A trained autoencoder: its file, its name, and what it gives (FORMAT section 8).

The file is safetensors, float16, without code in it. Its name is the SHA-256 of all its bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowtide.compression.elements import Array
from lowtide.compression.learned.layers import Architecture
from lowtide.compression.primitives import primitives
from lowtide.core.errors import CodecError

FORMAT = "lowtide.aesz/1"
MAX_MODEL_BYTES = 1 << 28
_PART_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Model:
    """An autoencoder for blocks of values, with what it was trained on.

    Attributes:
        architecture: Its shape.
        low: The least value of the training data: -1 for the network.
        high: The largest: 1 for the network.
        weights: By name, such as "decoder.3.weight": float32.
        facts: About the training, as JSON types.
        sha256: Of the file, 64 hexadecimal digits; empty for a model without a file.
        stored_bytes: Size of the file.
    """

    architecture: Architecture
    low: float
    high: float
    weights: Mapping[str, Array]
    facts: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    stored_bytes: int = 0

    @property
    def scale(self) -> float:
        """Half of what the training data ranged over."""
        return (self.high - self.low) / 2

    @property
    def offset(self) -> float:
        """The middle of the training data's range."""
        return (self.high + self.low) / 2

    def latents(self, blocks: Array) -> Array:
        """Return the latents of blocks: (n, elements) of any values -> float32 (n, latent)."""
        found = np.empty((len(blocks), self.architecture.latent), np.float32)
        for part in self._parts(len(blocks)):
            with np.errstate(all="ignore"):
                inputs = (blocks[part].astype(np.float64) - self.offset) / self.scale
                inputs = inputs.clip(-8, 8).astype(np.float32)  # far outside nothing was learned
            found[part] = self._run("encoder", inputs, self.architecture.latent)
        return found

    def outputs(self, latents: Array) -> Array:
        """Return the decoder's numbers for latents: float32 (n, latent) -> (n, elements).

        Every decoder gives the same bits. What is not finite becomes 0.
        """
        found = np.empty((len(latents), self.architecture.elements), np.float32)
        for part in self._parts(len(latents)):
            numbers = self._run("decoder", latents[part], self.architecture.elements)
            found[part] = np.where(np.isfinite(numbers), numbers, np.float32(0))
        return found

    def values(self, outputs: Array) -> Array:
        """Return in the unit of the data what the decoder's numbers stand for: float64."""
        return outputs.astype(np.float64) * self.scale + self.offset

    def _parts(self, count: int) -> list[slice]:
        """Return slices of `count` blocks that take little memory each."""
        size = max(1, _PART_ELEMENTS // self.architecture.elements)
        return [slice(begin, begin + size) for begin in range(0, count, size)]

    def _run(self, part: str, samples: Array, size_out: int) -> Array:
        """Return the sum of a network and of the dense layer beside it, float32."""
        samples, threads = np.ascontiguousarray(samples), torch.get_num_threads()
        deep, linear = (
            primitives().network_run(self._layers[name], samples, size_out, threads)
            for name in (part, f"linear_{part}")
        )
        with np.errstate(all="ignore"):
            found: Array = deep + linear
        return found

    @functools.cached_property
    def _layers(self) -> dict[str, list[tuple[Any, ...]]]:
        return {
            part: [
                (
                    layer.native_kind,
                    self.weights[f"{part}.{number}.weight"],
                    self.weights[f"{part}.{number}.bias"],
                    *layer.sums,
                )
                for number, layer in enumerate(layers)
            ]
            for part, layers in self.architecture.parts.items()
        }


def pack_model(model: Model) -> bytes:
    """Return the bytes of a model's file; the same model gives the same bytes."""
    from safetensors.numpy import save

    metadata = {
        "format": FORMAT,
        "block": _text(model.architecture.block),
        "latent": str(model.architecture.latent),
        "channels": _text(model.architecture.channels),
        "low": repr(model.low),
        "high": repr(model.high),
        "training": json.dumps(dict(model.facts), sort_keys=True),
    }
    tensors = {name: model.weights[name].astype(np.float16) for name in sorted(model.weights)}
    # safetensors writes metadata in an order of its own, which differs from run to run.
    raw = save(tensors)
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(raw[8:end])).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + raw[end:]


def parse_model(raw: bytes, where: str) -> Model:
    """Return the model in the bytes of a file.

    Args:
        raw: All of it.
        where: For messages: the file's path.

    Raises:
        CodecError: it is no model, or one that this release does not know.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        metadata = header.get("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise CodecError(
                f"{where}: has format {metadata.get('format')!r}, this release reads {FORMAT!r}; "
                "make models with `lowtide train-codec`"
            )
        architecture = Architecture(
            _numbers(metadata["block"]), int(metadata["latent"]), _numbers(metadata["channels"])
        )
        low, high = float(metadata["low"]), float(metadata["high"])
        facts = dict(json.loads(metadata["training"]))
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, CodecError):
            raise CodecError(f"{where}: {error}") from error
        raise CodecError(f"{where}: is no model of lowtide.aesz: {error!r}") from error
    if not (math.isfinite(low) and math.isfinite(high) and 0 < high - low < math.inf):
        raise CodecError(f"{where}: values from {low} to {high} are no range")
    weights = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    _check(weights, architecture, where)
    return Model(architecture, low, high, weights, facts, hashlib.sha256(raw).hexdigest(), len(raw))


def load_model(path: str | Path) -> Model:
    """Return the model in a file.

    Raises:
        CodecError: there is none, or it cannot be used.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_MODEL_BYTES + 1)
    except OSError as error:
        raise CodecError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_MODEL_BYTES:
        raise CodecError(f"{path}: is larger than {MAX_MODEL_BYTES} bytes, and so is no model")
    return parse_model(raw, str(path))


def _check(weights: Mapping[str, Array], architecture: Architecture, where: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in architecture.named_layers.items():
        shapes[f"{name}.weight"] = layer.weight_shape
        shapes[f"{name}.bias"] = (layer.channels_out,)
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != shapes:
        wrong = sorted(
            name for name in shapes.keys() | found if shapes.get(name) != found.get(name)
        )
        raise CodecError(
            f"{where}: {wrong[0]} has shape {found.get(wrong[0])}, for {architecture} it is "
            f"{shapes.get(wrong[0])}"
        )
    for name, tensor in weights.items():
        if not np.isfinite(tensor).all():
            raise CodecError(f"{where}: {name} holds numbers that are not finite")


def _text(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))
