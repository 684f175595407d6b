"""What each scheme sends and holds, against published volumes and counts made in other ways."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lowtide.core.errors import ConfigError, ModelError
from lowtide.tensor_parallel.footprint import (
    DecoderShape,
    block_parameters,
    end_parameters,
    footprint,
)
from lowtide.tensor_parallel.presets import PRESETS, preset, rank_of
from lowtide.tensor_parallel.traffic import (
    BOTTLENECK,
    FULL_RANK,
    NAIVE,
    NAIVE_SPLIT,
    SCHEMES,
    BlockShape,
    Kind,
    Message,
    Scheme,
    block_messages,
    check_ranks,
    end_messages,
    hops,
    local_widths,
    recompute_messages,
    reduced_elements,
    wire_bytes,
)
from lowtide.tensor_parallel.work import (
    Linear,
    attention_flops,
    block_linears,
    recomputed_linears,
    saved_elements,
)

REPLICATED = dataclasses.replace(FULL_RANK, has_sequence_parallel=False)
STATISTIC = 2 * 3  # two norms, three numbers for each rank
# Model: full, vanilla, bottleneck elements per token forward; GiB a block with 4 x 4096 tokens.
FORWARD = {
    "llama-1b": ((4096, 21184, 3584), (0.125, 0.646, 0.109)),
    "llama-3b": ((6144, 31744, 5376), (0.188, 0.969, 0.164)),
    "llama-7b": ((8192, 42496, 7168), (0.250, 1.297, 0.219)),
    "llama-13b": ((10240, 53248, 8960), (0.312, 1.625, 0.273)),
}
GROUPED = BlockShape(  # grouped-query attention, heads wider than the stream, two ranks
    width=48, mlp_width=80, heads=8, kv_heads=2, head_width=10, attention_rank=12, mlp_rank=20
)


def block_of(name: str) -> BlockShape:
    return preset(name).decoder(preset(name).width // 4).block


def volumes(shape: BlockShape, ranks: int, scheme: Scheme) -> tuple[float, float]:
    forward, backward = block_messages(shape, ranks, scheme)
    return reduced_elements(forward), reduced_elements(backward)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_forward_sends_what_is_published(name: str, ranks: int) -> None:
    shape = block_of(name)
    if shape.heads % ranks or shape.mlp_width % ranks:
        pytest.skip("does not divide")
    elements, gib = FORWARD[name]
    found = [volumes(shape, ranks, scheme)[0] for scheme in (FULL_RANK, NAIVE, BOTTLENECK)]
    found[-1] -= STATISTIC * ranks
    assert tuple(found) == elements
    assert volumes(shape, ranks, REPLICATED)[0] == elements[0]
    for sent, published in zip(found, gib, strict=True):
        assert sent * 2 * 4 * 4096 / 2**30 == pytest.approx(published, abs=6e-4)


def test_backward_sends_what_was_derived() -> None:
    d, f, r = 4096, 11008, 1024
    shape = block_of("llama-7b")
    assert volumes(shape, 4, NAIVE)[1] == 3 * d + f
    assert volumes(shape, 4, BOTTLENECK)[1] == 7 * r
    assert volumes(shape, 4, REPLICATED)[1] == 2 * d
    assert volumes(shape, 4, FULL_RANK)[1] == 3 * d  # the inputs are gathered once more
    # Splitting the heads moves bytes between the passes and sends as many.
    assert sum(volumes(shape, 4, NAIVE_SPLIT)) == sum(volumes(shape, 4, NAIVE)) == 8 * d + 3 * f


def test_messages_are_as_many_as_counted_on_running_code() -> None:
    counts = {
        scheme.name: tuple(map(len, block_messages(block_of("llama-7b"), 4, scheme)))
        for scheme in SCHEMES
    }
    assert counts[BOTTLENECK.name] == (4, 4)
    assert counts[NAIVE.name] == (4, 4)
    assert counts[FULL_RANK.name] == (4, 6)
    assert counts[NAIVE_SPLIT.name] == (5, 5)
    apart = dataclasses.replace(NAIVE, has_joint_outputs=False)
    assert tuple(map(len, block_messages(block_of("llama-7b"), 4, apart))) == (7, 4)
    assert volumes(block_of("llama-7b"), 4, apart)[0] == 42496


def test_sequence_parallelism_gathers_and_scatters_in_megatrons_order() -> None:
    forward, backward = block_messages(GROUPED, 2, FULL_RANK)
    pairs = [("all_gather", "qkv"), ("reduce_scatter", "o")]
    pairs += [("all_gather", "gate_up"), ("reduce_scatter", "down")]
    assert [(message.kind, message.where) for message in forward] == pairs
    assert [(m.kind, m.where, m.under and m.under[1]) for m in backward] == [
        ("all_gather", "down", None),
        ("all_gather", "gate_up", "input_gradient"),
        ("reduce_scatter", "gate_up", "weight_gradient"),
        ("all_gather", "o", None),
        ("all_gather", "qkv", "input_gradient"),
        ("reduce_scatter", "qkv", "weight_gradient"),
    ]
    assert {message.elements for message in forward + backward} == {GROUPED.width}


def test_each_group_sends_its_own_width() -> None:
    forward, backward = block_messages(GROUPED, 2, BOTTLENECK)
    widths = {message.where: message.elements for message in forward}
    assert widths == {"qkv": 36 + 6, "o": 12, "gate_up": 40 + 6, "down": 20}
    assert [(m.where, m.elements) for m in backward] == [
        ("down", 20),
        ("gate_up", 40),
        ("o", 12),
        ("qkv", 36),
    ]
    naive = {m.where: m.elements for m in block_messages(GROUPED, 2, NAIVE)[0]}
    assert naive == {"qkv": 80 + 20 + 20, "o": 48, "gate_up": 160, "down": 48}
    of_heads = [(m.kind, m.elements) for m in block_messages(GROUPED, 2, NAIVE_SPLIT)[0]][:2]
    assert of_heads == [("reduce_scatter", 120), ("all_gather", 80)]


def test_one_rank_sends_nothing() -> None:
    for scheme in SCHEMES:
        assert block_messages(GROUPED, 1, scheme) == ([], [])
        assert end_messages(48, 1, scheme) == ([], [])
        assert recompute_messages(GROUPED, 1, scheme, "sharded_latents") == []


def test_only_overlapped_schemes_hide_messages() -> None:
    for scheme in SCHEMES:
        forward, backward = block_messages(GROUPED, 2, scheme)
        assert all(message.under is None for message in forward)
        assert any(message.under is not None for message in backward)
        exposed = dataclasses.replace(scheme, is_overlapped=False)
        _, backward = block_messages(GROUPED, 2, exposed)
        assert all(message.under is None for message in backward)
        _, backward = end_messages(48, 2, exposed)
        assert all(message.under is None for message in backward)


def test_messages_hide_under_work_that_exists() -> None:
    for scheme in SCHEMES:
        linears = {(layer.where, layer.part) for layer in block_linears(GROUPED, 2, scheme)}
        for message in block_messages(GROUPED, 2, scheme)[1]:
            if message.under is not None:
                assert (message.where, message.under[0]) in linears


def test_ends_send_little_and_ours_least() -> None:
    d = 4096

    def sent(scheme: Scheme, *, is_tied: bool) -> tuple[list[tuple[str, str]], float]:
        forward, backward = end_messages(d, 4, scheme, is_tied=is_tied)
        both = [message for message in forward + backward if message.where != "loss"]
        assert sum(m.elements * m.element_bytes for m in forward if m.where == "loss") == 12
        return [(m.where, m.kind) for m in both], reduced_elements(both)

    gather, scatter = ("head", "all_gather"), ("head", "reduce_scatter")
    assert sent(BOTTLENECK, is_tied=False) == ([gather, scatter], d)
    assert sent(BOTTLENECK, is_tied=True) == (
        [("embedding", "reduce_scatter"), gather, scatter, ("embedding", "all_gather")],
        2 * d,
    )
    assert sent(NAIVE, is_tied=False) == (
        [("embedding", "all_reduce"), ("head", "all_reduce")],
        2 * d,
    )
    assert sent(FULL_RANK, is_tied=False)[1] == sent(FULL_RANK, is_tied=True)[1] == 2.5 * d


def test_recomputation_sends_only_gathers_of_kept_latents() -> None:
    shape = block_of("llama-7b")
    assert recompute_messages(shape, 4, BOTTLENECK, "none") == []
    assert recompute_messages(shape, 4, BOTTLENECK, "latents") == []
    gathers = recompute_messages(shape, 4, BOTTLENECK, "sharded_latents")
    assert {message.kind for message in gathers} == {"all_gather"}
    assert reduced_elements(gathers) == 7168 / 2  # half an all-reduce's bytes
    again = recompute_messages(shape, 4, NAIVE, "latents")
    assert again == block_messages(shape, 4, NAIVE)[0]


def ring_bytes(kind: Kind, payload: int, ranks: int) -> tuple[float, int]:
    """Pass chunks around a ring until all is done; return bytes and steps of one rank."""
    held = np.random.default_rng(0).integers(1, 9, (ranks, ranks))  # [rank, chunk]
    total, parts = held.sum(axis=0), held.copy()
    sent, steps = 0.0, 0
    if kind != "all_gather":
        for step in range(ranks - 1):
            chunks = [(rank - step) % ranks for rank in range(ranks)]
            moving = [parts[rank, chunk] for rank, chunk in enumerate(chunks)]
            for rank, chunk in enumerate(chunks):
                parts[(rank + 1) % ranks, chunk] += moving[rank]
            sent, steps = sent + payload / ranks, steps + 1
        for rank in range(ranks):
            assert parts[rank, (rank + 1) % ranks] == total[(rank + 1) % ranks]
    if kind != "reduce_scatter":
        for _ in range(ranks - 1):
            sent, steps = sent + payload / ranks, steps + 1
    return sent, steps


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_bytes_and_hops_are_those_of_a_ring(kind: Kind, ranks: int) -> None:
    sent, steps = ring_bytes(kind, 24 * ranks, ranks)
    assert wire_bytes(kind, 24 * ranks, ranks) == pytest.approx(sent)
    assert hops(kind, ranks) == steps
    message = Message(kind=kind, where="o", elements=6 * ranks, element_bytes=4)
    assert message.wire_bytes(1, ranks) == pytest.approx(sent)
    assert message.wire_bytes(5, ranks) == pytest.approx(5 * sent)


@pytest.mark.parametrize("name", FORWARD)
def test_low_rank_has_two_and_a_half_times_fewer_parameters(name: str) -> None:
    shape = block_of(name)
    d, f, r = shape.width, shape.mlp_width, shape.attention_rank
    full, low = (block_parameters(shape, 1, scheme) for scheme in (FULL_RANK, BOTTLENECK))
    assert full == 4 * d * d + 3 * d * f + 2 * d
    assert low == r * (11 * d + 3 * f) + 2 * d
    if name == "llama-7b":
        assert full / low == pytest.approx(2.53, abs=5e-3)


def test_ranks_share_parameters_and_work() -> None:
    both_norms = 2 * GROUPED.width
    for scheme in SCHEMES:
        one = block_linears(GROUPED, 1, scheme)
        two = block_linears(GROUPED, 2, scheme)
        assert [layer.macs(3) for layer in one] == [2 * layer.macs(3) for layer in two]
        is_ours = scheme is BOTTLENECK
        norms = both_norms // 2 if is_ours else both_norms
        held = block_parameters(GROUPED, 2, scheme) - norms
        assert 2 * held == block_parameters(GROUPED, 1, scheme) - both_norms


def test_scarce_keys_and_values_are_held_twice() -> None:
    assert local_widths(GROUPED, 4, BOTTLENECK).kv == GROUPED.head_width
    assert local_widths(GROUPED, 2, BOTTLENECK).kv == GROUPED.head_width
    held = 4 * sum(layer.parameters for layer in block_linears(GROUPED, 4, BOTTLENECK))
    whole = sum(layer.parameters for layer in block_linears(GROUPED, 1, BOTTLENECK))
    assert held - whole == 2 * GROUPED.kv_width * GROUPED.attention_rank


def test_gemms_have_the_shapes_of_the_matrix_calculus() -> None:
    layer, tokens = Linear(where="o", part="B", inputs=3, outputs=5, count=2), 7
    x, w = np.ones((tokens, 3)), np.ones((5, 3))
    dy = x @ w.T
    pairs: dict[Any, tuple[np.ndarray, np.ndarray]] = {
        "forward": (x, w.T),
        "input_gradient": (dy, w),
        "weight_gradient": (dy.T, x),
    }
    for which, (left, right) in pairs.items():
        assert layer.gemm(tokens, which) == (*left.shape, right.shape[1])
        m, k, n = layer.gemm(tokens, which)
        assert layer.macs(tokens) == 2 * m * k * n
    assert dy.T @ x @ np.ones((3, 1)) == pytest.approx(np.full((5, 1), 7 * 9))


def test_arithmetic_intensity_is_what_the_brief_counts() -> None:
    """Multiply-adds per element touched, in the pair of one MLP projection of 7B on four ranks."""
    tokens = 4 * 4096

    def intensity(scheme: Scheme) -> float:
        macs = elements = 0
        for layer in block_linears(block_of("llama-7b"), 4, scheme):
            if layer.where == "gate_up":
                # One of the two projections that this layer holds side by side.
                halved = layer.count == 1
                outputs = layer.outputs // 2 if halved else layer.outputs
                m, k, n = tokens, layer.inputs, outputs
                macs, elements = macs + m * k * n, elements + m * k + k * n + m * n
        return macs / elements

    found = [round(intensity(scheme)) for scheme in (FULL_RANK, NAIVE, BOTTLENECK)]
    assert found == [1496, 244, 638]


def test_attention_runs_on_all_heads_only_where_they_are_not_split() -> None:
    shape = block_of("llama-7b")
    own = attention_flops(shape, 4, BOTTLENECK, sequence=4096)
    assert own == 4 * 4096 * (4096 // 4) // 2  # two products, half of them masked
    assert attention_flops(shape, 4, FULL_RANK, sequence=4096) == own
    assert attention_flops(shape, 4, NAIVE_SPLIT, sequence=4096) == own
    assert attention_flops(shape, 4, NAIVE, sequence=4096) == 4 * own


def test_kept_activations_of_seven_billion() -> None:
    shape = block_of("llama-7b")
    d, f, r, p = 4096, 11008, 1024, 4
    assert saved_elements(shape, p, BOTTLENECK) == (6 * d + 3 * f) / p + 7 * r == 21568
    assert saved_elements(shape, p, BOTTLENECK, "latents") == d / p + 7 * r == 8192
    assert saved_elements(shape, p, BOTTLENECK, "sharded_latents") == (d + 7 * r) / p == 2816
    assert saved_elements(shape, p, FULL_RANK) == (6 * d + 3 * f) / p
    assert saved_elements(shape, p, FULL_RANK, "latents") == d / p
    assert saved_elements(shape, p, REPLICATED) == 2 * d + (4 * d + 3 * f) / p
    assert saved_elements(shape, p, NAIVE) == 6 * d + 3 * f + 7 * r / p
    assert saved_elements(shape, p, NAIVE_SPLIT) == 3 * d + 3 * d / p + 3 * f + 7 * r / p
    assert saved_elements(shape, p, NAIVE, "latents") == d


def test_kept_activations_count_grouped_heads_and_both_ranks() -> None:
    d, f, q, kv, latents = 48, 80, 80, 20, 4 * 12 + 3 * 20
    found = saved_elements(GROUPED, 2, BOTTLENECK)
    assert found == (2 * d + 2 * q + 2 * kv + 3 * f) / 2 + latents
    assert saved_elements(GROUPED, 2, BOTTLENECK, "sharded_latents") == (d + latents) / 2


def test_recomputation_skips_every_a_and_the_last_b() -> None:
    again = recomputed_linears(block_linears(GROUPED, 2, BOTTLENECK))
    assert {layer.part for layer in again} == {"B"}
    assert [layer.where for layer in again] == ["qkv", "qkv", "o", "gate_up"]


def test_footprint_adds_up() -> None:
    decoder = DecoderShape(block=GROUPED, layers=3, vocabulary=101)
    found = footprint(decoder, 2, BOTTLENECK, tokens=10)
    parameters = 3 * block_parameters(GROUPED, 2, BOTTLENECK) + 2 * 51 * 48 + 48
    assert found.parameters == parameters
    assert found.parameter_bytes + found.gradient_bytes + found.optimizer_bytes == 16 * parameters
    kept = saved_elements(GROUPED, 2, BOTTLENECK)
    assert found.block_activation_bytes == 2 * kept * 10
    assert found.activation_bytes == (2 * (3 * kept + 48) + 6 * 51) * 10
    assert found.total_bytes == 16 * parameters + found.activation_bytes
    latents = footprint(decoder, 2, BOTTLENECK, tokens=10, tier="latents")
    kept_less = saved_elements(GROUPED, 2, BOTTLENECK, "latents")
    assert latents.activation_bytes == (2 * (3 * kept_less + kept + 48) + 6 * 51) * 10
    tied = dataclasses.replace(decoder, is_tied=True)
    assert end_parameters(decoder, 2) - end_parameters(tied, 2) == 51 * 48


def test_presets_have_the_sizes_of_their_names() -> None:
    billions = {"llama-1b": 1.34, "llama-3b": 3.4, "llama-7b": 6.74, "llama-13b": 13.0}
    billions |= {"llama-30b": 32.5, "llama3-8b": 8.03, "qwen3-8b": 8.19}
    assert billions.keys() == PRESETS.keys()
    for name, size in billions.items():
        decoder = preset(name).decoder(64)
        blocks = decoder.layers * block_parameters(decoder.block, 1, FULL_RANK)
        assert (blocks + end_parameters(decoder, 1)) / 1e9 == pytest.approx(size, rel=0.02), name
    assert preset("LLaMA-7B") is PRESETS["llama-7b"]


def test_rank_is_rounded_up_to_a_multiple_of_eight() -> None:
    assert rank_of(0.25, 4096) == 1024
    assert 0.07 * 800 > 56
    assert rank_of(0.07, 800) == 56  # what is above it is an error of binary
    assert rank_of(0.0701, 800) == 64


def shape_of(**changes: Any) -> BlockShape:
    return dataclasses.replace(GROUPED, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width: got 0"),
        ({"heads": 8.0}, r"heads: got 8\.0"),
        ({"mlp_rank": True}, "mlp_rank: got True"),
        ({"kv_heads": 3}, "kv_heads: got 3, allowed is a divisor of the 8 heads"),
        ({"attention_rank": 49}, "attention_rank: got 49, allowed is at most the width 48"),
        ({"mlp_rank": 49}, "mlp_rank: got 49"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_of(**changes)


@pytest.mark.parametrize(
    ("changes", "ranks", "error", "message"),
    [
        ({}, 0, ConfigError, "ranks: got 0"),
        ({}, 5, ModelError, "width: got 48, which 5 ranks"),
        ({}, 3, ModelError, "mlp_width: got 80, which 3 ranks .* 2, 4, 5, 8, 10"),
        ({"mlp_width": 96}, 16, ModelError, "heads: got 8, which 16 ranks"),
        (
            {"heads": 24, "kv_heads": 4, "mlp_width": 96},
            6,
            ModelError,
            "kv_heads: got 4, allowed for 6 ranks",
        ),
        ({"width": 67, "attention_rank": 8}, 2, ModelError, "none up to 64"),
    ],
)
def test_ranks_that_cannot_share_are_refused(
    changes: dict[str, Any], ranks: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_ranks(shape_of(**changes), ranks)
