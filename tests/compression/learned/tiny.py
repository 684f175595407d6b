"""A model of a few kilobytes, made and not trained, and arrays that it predicts well."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowtide.compression.learned.layers import NORMS, Architecture
from lowtide.compression.learned.library import register_model
from lowtide.compression.learned.model import Model, pack_model, parse_model

BLOCK = (4, 4)


def patterns(block: tuple[int, ...], latent: int) -> np.ndarray:
    """Return (latent, elements) orthonormal rows."""
    rng = np.random.default_rng(5)
    rows = np.linalg.qr(rng.normal(size=(int(np.prod(block)), latent)))[0].T
    return np.asarray(rows)


def weights_for(architecture: Architecture, *, seed: int = 0, deep: float = 0.02) -> dict[str, Any]:
    """Return weights: the linear ways are projections on `patterns`, the deep ones are noise."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for name, layer in architecture.named_layers.items():
        weight = rng.normal(size=layer.weight_shape) / np.sqrt(layer.channels_in * 9)
        bias = 0.1 * rng.normal(size=layer.channels_out)
        if layer.kind in NORMS:
            weight, bias = np.abs(weight), np.abs(bias) + 0.5
        found[f"{name}.weight"], found[f"{name}.bias"] = weight, bias
    last = max(n for n in architecture.named_layers if n.startswith("decoder."))
    first = [n for n in architecture.named_layers if n.startswith("encoder.")][-1]
    for name in (first, last):
        found[f"{name}.weight"] *= deep
        found[f"{name}.bias"] *= deep
    rows = patterns(architecture.block, architecture.latent)
    found["linear_encoder.0.weight"] = rows.T[:, None, :]
    found["linear_decoder.0.weight"] = rows.T[:, :, None]
    found["linear_encoder.0.bias"] = np.zeros(architecture.latent)
    found["linear_decoder.0.bias"] = np.zeros(1)
    return {name: value.astype(np.float16).astype(np.float32) for name, value in found.items()}


def model_of(block: tuple[int, ...] = BLOCK, latent: int = 3, **how: Any) -> Model:
    architecture = Architecture(block, latent, (2,))
    made = Model(architecture, -2.0, 2.0, weights_for(architecture, **how), {"made": True})
    return parse_model(pack_model(made), "made here")


def field(counts: tuple[int, ...], block: tuple[int, ...] = BLOCK, *, seed: int = 0) -> np.ndarray:
    """Return a float32 array of blocks, each a sum of `patterns`, and a little noise."""
    rng = np.random.default_rng(seed)
    amounts = rng.uniform(-3, 3, (int(np.prod(counts)), 3))
    blocks = amounts @ patterns(block, 3) + 1e-3 * rng.normal(
        size=(len(amounts), int(np.prod(block)))
    )
    rank = len(block)
    array = blocks.reshape(*counts, *block)
    array = array.transpose(
        [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
    )
    return np.ascontiguousarray(
        array.reshape([n * edge for n, edge in zip(counts, block, strict=True)]), np.float32
    )


MODEL = register_model(model_of())
