"""Networks give the bits that FORMAT section 8 says, on every instruction set and by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lowtide.compression import reference
from lowtide.compression.learned.layers import NORMS, Architecture, Layer
from lowtide.core.native import native_or_none, status

SHAPES = [
    Architecture((8, 8, 8), 5, (3, 6)),
    Architecture((8, 16), 3, (9, 4, 2)),
    Architecture((16,), 7, (5,)),
    Architecture((2, 4, 2), 1, (1,)),
]


@pytest.fixture(scope="module")
def native() -> Any:
    module = native_or_none()
    if module is None or not hasattr(module.compression, "network_run"):
        pytest.skip(f"no native networks: {status().reason}")
    return module.compression


def arrays_of(layers: tuple[Layer, ...], rng: np.random.Generator) -> list[tuple[Any, ...]]:
    found = []
    for layer in layers:
        weight = rng.normal(size=layer.weight_shape).astype(np.float32) / np.float32(3)
        bias = rng.normal(size=layer.channels_out).astype(np.float32)
        if layer.kind in NORMS:
            weight, bias = np.abs(weight), np.abs(bias)
        found.append((layer.native_kind, weight, bias, *layer.sums))
    return found


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    """NaNs may differ in their payload, all else may not."""
    is_nan = np.isnan(expected)
    return bool(
        (np.isnan(found) == is_nan).all()
        and found[~is_nan].tobytes() == expected[~is_nan].tobytes()
    )


def by_hand(layer: Layer, weight: Any, bias: Any, sample: np.ndarray) -> list[float]:
    """One sample, one number at a time, as FORMAT section 8 reads: (position, channel)."""
    rank = len(layer.extents)
    half = tuple(extent // 2 for extent in layer.extents)
    one = (1,) * rank
    shape_in, shape_out = {
        "down": (layer.extents, half), "same": (layer.extents, layer.extents),
        "up": (half, layer.extents), "gather": (layer.extents, one), "spread": (one, layer.extents),
        "divide": (layer.extents, layer.extents), "multiply": (layer.extents, layer.extents),
    }[layer.kind]  # fmt: skip
    inputs = sample.reshape(*shape_in, layer.channels_in)
    outputs = []
    taps = list(np.ndindex((3,) * rank))
    for number, p in enumerate(np.ndindex(shape_out)):
        seen: list[tuple[int, tuple[int, ...]]] = []
        if layer.kind == "gather":
            seen = list(enumerate(np.ndindex(shape_in)))
        elif layer.kind == "spread":
            seen = [(number, (0,) * rank)]
        elif layer.kind in NORMS:
            seen = [(0, p)]
        else:
            for tap, k in enumerate(taps):
                twice = [
                    {"same": 2 * (a + b - 1), "down": 2 * (2 * a + b - 1), "up": a + 1 - b}[
                        layer.kind
                    ]
                    for a, b in zip(p, k, strict=True)
                ]
                if all(
                    t % 2 == 0 and 0 <= t // 2 < n for t, n in zip(twice, shape_in, strict=True)
                ):
                    seen.append((tap, tuple(t // 2 for t in twice)))
        for out in range(layer.channels_out):
            total = np.float32(bias[out])
            for tap, q in seen:
                for channel in range(layer.channels_in):
                    x = inputs[q][channel]
                    x = np.float32(x * x) if layer.kind in NORMS else x
                    total = np.float32(total + np.float32(weight[tap, channel, out] * x))
            if layer.kind in NORMS:
                x, root = inputs[p][out], np.sqrt(total)
                total = np.float32(x / root) if layer.kind == "divide" else np.float32(x * root)
            outputs.append(float(total))
    return outputs


@pytest.mark.parametrize("architecture", SHAPES[1:], ids=str)
def test_the_reference_is_the_format_read_aloud(architecture: Architecture) -> None:
    rng = np.random.default_rng(1)
    for layer in architecture.named_layers.values():
        (arrays,) = arrays_of((layer,), rng)
        half = 2 ** len(layer.extents)
        points = int(np.prod(layer.extents))
        size_in = {"up": points // half, "spread": 1}.get(layer.kind, points) * layer.channels_in
        size_out = {"down": points // half, "gather": 1}.get(
            layer.kind, points
        ) * layer.channels_out
        sample = rng.normal(size=(1, size_in)).astype(np.float32)
        found = reference.network_run([arrays], sample, size_out)
        assert found[0].tolist() == by_hand(layer, arrays[1], arrays[2], sample[0]), layer


@pytest.mark.parametrize("architecture", SHAPES, ids=str)
def test_all_levels_and_threads_have_the_reference_s_bits(
    native: Any, architecture: Architecture
) -> None:
    rng = np.random.default_rng(2)
    levels = ["auto", *native.network_levels()]
    assert "scalar" in levels
    for part, layers in architecture.parts.items():
        arrays = arrays_of(layers, rng)
        sizes = (architecture.elements, architecture.latent)
        size_in, size_out = sizes if "encoder" in part else sizes[::-1]
        for count in (1, 15, 16, 17, 70):
            samples = rng.normal(size=(count, size_in)).astype(np.float32)
            expected = reference.network_run(arrays, samples, size_out)
            for number, level in enumerate(levels):
                for threads in (1, 2, 4)[number % 3 :]:
                    found = native.network_run(arrays, samples, size_out, threads, level)
                    assert same_bits(found, expected), (part, count, level, threads)


def test_a_sample_does_not_see_the_others(native: Any) -> None:
    rng = np.random.default_rng(3)
    arrays = arrays_of(SHAPES[0].parts["decoder"], rng)
    samples = rng.normal(size=(37, 5)).astype(np.float32)
    samples[3] = np.nan
    samples[4] = np.inf
    samples[5] = 1e38
    samples[6] = 1e-42  # denormal
    together = native.network_run(arrays, samples, 512)
    assert not np.isfinite(together[3:6]).any()
    assert np.isfinite(together[[*range(3), *range(6, 37)]]).all()
    for number in range(37):
        alone = native.network_run(arrays, samples[number : number + 1], 512)
        assert same_bits(alone[0], together[number])
    with np.errstate(all="ignore"):
        assert same_bits(together, reference.network_run(arrays, samples, 512))


def test_denormal_numbers_count_whatever_the_thread_has_set(native: Any) -> None:
    weight = np.full((1, 1, 1), 0.5, np.float32)
    arrays = [("affine", weight, np.zeros(1, np.float32), *Layer("gather", 1, 1, (1,)).sums)]
    samples = np.full((1, 1), 1e-40, np.float32)
    expected = reference.network_run(arrays, samples, 1)
    assert expected[0, 0] > 0
    torch.set_flush_denormal(True)
    try:
        found = native.network_run(arrays, samples, 1)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(found, expected)


def test_what_does_not_fit_is_refused_by_both(native: Any) -> None:
    rng = np.random.default_rng(4)
    layer = Layer("same", 2, 3, (4,))
    (good,) = arrays_of((layer,), rng)
    kind, weight, bias, offsets, sources, taps = good
    samples = rng.normal(size=(2, 8)).astype(np.float32)

    def changed(array: Any, place: int, value: int) -> Any:
        copy = array.copy()
        copy[place] = value
        return copy

    norm = ("divide", weight[:1], bias, offsets, sources, taps)
    bad: list[tuple[Any, Any, int]] = [
        ([good], samples, 11),
        ([good], np.ascontiguousarray(samples[:, :7]), 12),
        ([], samples, 8),
        ([norm], samples, 8),
        ([("other", *good[1:])], samples, 12),
        ([(kind, weight, bias[:2], offsets, sources, taps)], samples, 12),
        ([(kind, weight, bias, changed(offsets, 0, 1), sources, taps)], samples, 12),
        ([(kind, weight, bias, changed(offsets, -1, 9), sources, taps)], samples, 12),
        ([(kind, weight, bias, changed(offsets, 1, 99), sources, taps)], samples, 12),
        ([(kind, weight, bias, offsets, changed(sources, 0, 4), taps)], samples, 12),
        ([(kind, weight, bias, offsets, changed(sources, 0, -1), taps)], samples, 12),
        ([(kind, weight, bias, offsets, sources, changed(taps, 0, 3))], samples, 12),
        ([(kind, weight, bias, offsets, sources, changed(taps, 0, -1))], samples, 12),
        ([(kind, weight, bias, offsets, sources[:-1], taps)], samples, 12),
        ([(kind, weight, bias, offsets[:0], sources, taps)], samples, 12),
        ([good], samples, 0),
    ]
    for primitives in (native, reference):
        assert primitives.network_run([good], samples, 12).shape == (2, 12)
        for layers, given, size_out in bad:
            with pytest.raises(ValueError, match=r"layers|samples|channels"):
                primitives.network_run(layers, given, size_out)
        with pytest.raises(ValueError, match="level"):
            primitives.network_run([good], samples, 12, 1, "avx1024")
        with pytest.raises(ValueError, match="threads"):
            primitives.network_run([good], samples, 12, 0)
