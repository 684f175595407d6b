"""The planner's table: bytes by formula, ratios, warnings."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lowtide.core.errors import ConfigError, ModelError
from lowtide.tensor_parallel.costs import machine
from lowtide.tensor_parallel.footprint import DecoderShape
from lowtide.tensor_parallel.outlook import (
    Outlook,
    is_full_rank_lighter,
    look_ahead,
)
from lowtide.tensor_parallel.presets import preset
from lowtide.tensor_parallel.timing import Batch
from lowtide.tensor_parallel.traffic import BOTTLENECK, FULL_RANK, NAIVE, NAIVE_SPLIT, Tier

TOKENS = 4 * 4096


def outlook_of(
    rank: int = 1024,
    ranks: int = 4,
    *,
    model: str = "llama-7b",
    gpu: str = "A100",
    sequences: int = 4,
    tier: Tier = "none",
    overlap: bool = False,
) -> Outlook:
    return look_ahead(
        preset(model).decoder(rank),
        ranks,
        machine=machine(gpu),
        batch=Batch(micro_batch=sequences, sequence=4096),
        tier=tier,
        overlap_forward=overlap,
    )


def warned(outlook: Outlook, start: str) -> list[str]:
    return [warning for warning in outlook.warnings if warning.startswith(start)]


def test_bytes_follow_from_the_formulas() -> None:
    found = outlook_of()
    assert [forecast.name for forecast in found.forecasts] == [
        FULL_RANK.name,
        NAIVE.name,
        NAIVE_SPLIT.name,
        BOTTLENECK.name,
    ]
    ring = 2 * 3 / 4 * 2 * TOKENS  # twice (p-1)/p of two bytes
    full, naive, split, ours = found.forecasts
    d, f, r, p = 4096, 11008, 1024, 4
    assert ours.block_bytes == pytest.approx(ring * (14 * r + 6 * p))
    assert naive.block_bytes == split.block_bytes == pytest.approx(ring * (8 * d + 3 * f))
    assert full.block_bytes == pytest.approx(ring * 5 * d)
    loss = 2 * ring * 3  # three numbers of four bytes
    assert ours.iteration_bytes == pytest.approx(32 * ours.block_bytes + ring * d + loss)
    assert naive.iteration_bytes == pytest.approx(32 * naive.block_bytes + ring * 2 * d + loss)
    assert (ours.forward_elements, ours.backward_elements) == (7 * r + 6 * p, 7 * r)


def test_iteration_is_blocks_and_ends_and_update() -> None:
    for forecast in outlook_of().forecasts:
        whole_s = 32 * forecast.block.total_s + forecast.ends.total_s + forecast.update_s
        assert forecast.iteration_s == pytest.approx(whole_s)
        assert min(forecast.ends.total_s, forecast.update_s) > 0


def test_overlap_is_shown_for_all_ways() -> None:
    plain, found = outlook_of(), outlook_of(overlap=True)
    names = [forecast.name for forecast in plain.forecasts]
    assert [forecast.name for forecast in found.forecasts] == [
        *names[:-1], *(f"{name} *" for name in names)
    ]  # fmt: skip
    assert found.forecasts[:3] == plain.forecasts[:3]
    ours = found.ours
    assert (ours.forward_messages, ours.backward_messages) == (8, 8)
    assert ours.block_bytes == plain.ours.block_bytes
    assert ours.block.total_s < plain.ours.block.total_s
    # Against naive low rank whose backward overlaps as ours does, and against one that takes turns.
    assert found.block_ratio(NAIVE.name) >= 2.6
    assert found.block_ratio(f"{NAIVE.name} *") >= 2.3
    assert found.block_ratio(FULL_RANK.name) >= 1.5
    with pytest.raises(ConfigError, match="got a micro-batch of 1 on 4 rank"):
        outlook_of(sequences=1, overlap=True)
    with pytest.raises(ConfigError, match='got "latents" with overlap_forward'):
        outlook_of(tier="latents", overlap=True)


def test_ratios_are_over_ours() -> None:
    found = outlook_of()
    full, naive = found.forecasts[:2]
    assert found.block_ratio(BOTTLENECK.name) == found.iteration_ratio(BOTTLENECK.name) == 1.0
    assert found.block_ratio(NAIVE.name) == naive.block.total_s / found.ours.block.total_s
    assert found.iteration_ratio(FULL_RANK.name) == full.iteration_s / found.ours.iteration_s
    # The case of the paper, modelled: full rank with sequence parallelism takes half as long again.
    assert found.block_ratio(FULL_RANK.name) >= 1.5
    assert found.block_ratio(NAIVE.name) > found.block_ratio(NAIVE_SPLIT.name) > 1.0


def test_warns_when_full_rank_sends_less() -> None:
    """7 r > 2 d: with d = 4096 from a rank of 1171 on; 1170.3 is the width's 2/7."""
    assert not is_full_rank_lighter(preset("llama-7b").decoder(1170))
    assert is_full_rank_lighter(preset("llama-7b").decoder(1171))
    assert not warned(outlook_of(1170), "rank")
    (warning,) = warned(outlook_of(1171), "rank: 1171")
    assert "above 2/7 of the width, 1170" in warning
    assert "8192 elements per token and block against 8197" in warning
    assert not warned(outlook_of(1171, 1), "rank")  # one rank sends nothing


def test_warns_of_the_two_ranks_together() -> None:
    decoder = preset("llama-7b").decoder(1024)
    block = dataclasses.replace(decoder.block, attention_rank=1024, mlp_rank=1368)
    mixed = dataclasses.replace(decoder, block=block)
    assert is_full_rank_lighter(mixed)  # 4 * 1024 + 3 * 1368 = 8200
    found = look_ahead(mixed, 4, machine=machine("A100"), batch=Batch(micro_batch=1, sequence=4096))
    (warning,) = warned(found, "rank")
    assert "1024 (attention) and 1368 (MLP)" in warning


def test_warns_when_ours_is_modelled_slower() -> None:
    found = outlook_of(2048, 8, sequences=1)
    (warning,) = warned(found, "modelled slower than full rank")
    full = found.forecasts[0]
    assert f"{found.ours.iteration_s:.3f} s against {full.iteration_s:.3f} s" in warning
    assert not warned(outlook_of(), "modelled slower")


def test_warns_when_factors_outweigh_the_layers() -> None:
    assert len(warned(outlook_of(4096), "rank: the factors have more parameters")) == 1
    assert not warned(outlook_of(1171), "rank: the factors")


def test_warns_when_memory_or_a_node_is_too_small() -> None:
    (warning,) = warned(outlook_of(gpu="A100-40GB", sequences=8), "memory")
    assert "40 GB of A100-40GB" in warning
    assert not warned(outlook_of(), "memory")
    assert len(warned(outlook_of(ranks=16), "ranks: 16")) == 1
    assert not warned(outlook_of(ranks=8, model="llama3-8b"), "ranks")


def test_warns_of_whole_latents_on_every_rank() -> None:
    (warning,) = warned(outlook_of(), "activations")
    assert "1.50 times" in warning  # 21568 over 14400 elements
    assert "sharded_latents" in warning
    (warning,) = warned(outlook_of(tier="latents"), "activations")
    assert "8.00 times" in warning  # 8192 over 1024
    assert "1.12 times" in warned(outlook_of(512, 2), "activations")[0]  # 32384 over 28800


def test_tiers_trade_memory_for_time() -> None:
    none, latents, parts = (
        outlook_of(tier=tier).ours for tier in ("none", "latents", "sharded_latents")
    )
    kept = [f.footprint.block_activation_bytes for f in (none, latents, parts)]
    assert kept == [2 * TOKENS * elements for elements in (21568, 8192, 2816)]
    assert none.iteration_s < latents.iteration_s < parts.iteration_s
    assert none.block_bytes == latents.block_bytes < parts.block_bytes
    assert (none.recompute_messages, latents.recompute_messages) == (0, 0)
    assert parts.recompute_messages == 4
    assert parts.footprint.total_bytes < latents.footprint.total_bytes < none.footprint.total_bytes


def test_json_says_that_times_are_modelled() -> None:
    found = outlook_of().as_dict()
    again: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    assert again["modelled_machine"]["name"] == "A100-80GB"
    assert again["model"]["block"]["width"] == 4096
    assert [scheme["name"] for scheme in again["schemes"]][-1] == BOTTLENECK.name
    ours = again["schemes"][-1]
    block = ours["block"]
    parts = [block[name] for name in ("forward", "recompute", "backward")]
    busy_s = sum(
        part["gemm_s"]
        + part["attention_s"]
        + part["sweep_s"]
        + part["message_s"]
        - part["hidden_s"]
        for part in parts
    )
    assert ours["block_s"] == pytest.approx(busy_s)
    assert ours["footprint"]["total_bytes"] > ours["footprint"]["activation_bytes"]


def test_every_preset_can_be_planned() -> None:
    for name in ("llama-1b", "llama-3b", "llama-13b", "llama-30b", "llama3-8b", "qwen3-8b"):
        rank = preset(name).width // 4
        for ranks in (1, 2, 4):
            found = outlook_of(rank, ranks, model=name)
            assert all(f.iteration_s > 0 for f in found.forecasts)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tier": "latent"}, ConfigError, "tier: got 'latent'. Did you mean \"latents\""),
        ({"sequences": 0}, ConfigError, "micro_batch: got 0"),
        ({"ranks": 5}, ModelError, "width: got 4096, which 5 ranks"),
        ({"ranks": 0}, ConfigError, "ranks: got 0"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message.replace(".", r"\.")):
        outlook_of(**changes)


def test_shapes_of_models_are_checked() -> None:
    block = preset("llama-7b").decoder(8).block
    with pytest.raises(ConfigError, match="layers: got 0"):
        DecoderShape(block=block, layers=0, vocabulary=8)
    with pytest.raises(ConfigError, match="vocabulary: got 0"):
        DecoderShape(block=block, layers=1, vocabulary=0)
