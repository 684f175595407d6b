"""What is sent, counted by a dispatch mode below `TensorGroup` (see traffic.py).

Source: BOOST (arXiv 2512.12131): 7r elements per token and block each way, in 4 messages.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.tensor_parallel.starts import of_each
from tests.tensor_parallel.traffic import BATCH, EQUAL_RANKS, LAYOUTS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600), pytest.mark.parametrize("nproc", [2, 4])]
TOKENS = BATCH[0] * BATCH[1]
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def per_block(case: dict[str, Any], way: str, kind: str, what: str) -> float:
    """The difference of 2 blocks, halved: nothing of the ends is in it."""
    one, three = (case[layers][way][what].get(kind, 0) for layers in ("1", "3"))
    return (three - one) / 2


def latents(layout: str) -> int:
    """7r where all ranks are equal; fused projections have one latent for two."""
    sizes = LAYOUTS[layout]
    if sizes.is_fused:
        return 3 * sizes.attention_rank + 2 * sizes.mlp_rank
    return 4 * sizes.attention_rank + 3 * sizes.mlp_rank


def test_the_formula_of_the_paper(nproc: int) -> None:
    assert latents("equal ranks") == 7 * EQUAL_RANKS.mlp_rank


def test_four_messages_per_block_each_way(nproc: int) -> None:
    for found in of_each(nproc, "messages"):
        assert len(found) == 9
        for name, case in found.items():
            for way in ("forward", "backward"):
                assert per_block(case, way, "all_reduce", "messages") == 4, (name, way)
                assert per_block(case, way, "reduce_scatter", "messages") == 0, (name, way)


def test_elements_and_bytes_per_token_and_block(nproc: int) -> None:
    for found in of_each(nproc, "messages"):
        for name, case in found.items():
            layout, dtype, _ = name.split(", ")
            statistic = 6 * nproc if dtype == "bfloat16" else 2
            wanted = latents(layout) + statistic
            assert per_block(case, "forward", "all_reduce", "elements") == TOKENS * wanted, name
            sent_as = 4 if dtype == "float16" else BYTES[dtype]  # see statistic.message_dtype
            assert per_block(case, "forward", "all_reduce", "nbytes") == TOKENS * wanted * sent_as
            wanted = latents(layout)
            assert per_block(case, "backward", "all_reduce", "elements") == TOKENS * wanted, name
            nbytes = TOKENS * wanted * BYTES[dtype]
            assert per_block(case, "backward", "all_reduce", "nbytes") == nbytes, name


def test_a_layer_norm_needs_no_message_of_its_own(nproc: int) -> None:
    """Each rank's mean travels too, and once in a message its A times gain and A times bias."""
    rank = EQUAL_RANKS.mlp_rank
    for found in of_each(nproc, "other_messages"):
        for dtype, columns in (("bfloat16", 6 * nproc), ("float32", 1 + nproc)):
            case = found[f"layer norm, {dtype}"]
            for way in WAYS:
                assert per_block(case, way, "all_reduce", "messages") == 4
            rows = 2 * nproc * (3 if dtype == "bfloat16" else 1)
            extra = 2 * TOKENS * columns + rows * (3 * rank + columns + 2 * rank + columns)
            elements = per_block(case, "forward", "all_reduce", "elements")
            assert elements == TOKENS * 7 * rank + extra
            assert per_block(case, "backward", "all_reduce", "elements") == TOKENS * 7 * rank
            forward, backward = (case["3"][way]["messages"] for way in WAYS)
            assert forward["all_gather"] == 1
            assert backward["reduce_scatter"] == 1


def test_overlap_sends_the_same_in_twice_as_many_messages(nproc: int) -> None:
    for found in of_each(nproc, "other_messages"):
        case = found["overlap, bfloat16"]
        plain = of_each(nproc, "messages")[0]["equal ranks, bfloat16, none"]
        for way in WAYS:
            assert per_block(case, way, "all_reduce", "messages") == 8
            for what in ("elements", "nbytes"):
                both = [per_block(each, way, "all_reduce", what) for each in (case, plain)]
                assert both[0] == both[1]


def test_checkpointing_sends_nothing_more_or_only_its_gathers(nproc: int) -> None:
    for found in of_each(nproc, "messages"):
        none, kept, shared = (
            found[f"different ranks, bfloat16, {tier}"]
            for tier in ("none", "latents", "sharded_latents")
        )
        for layers in ("1", "3"):
            for what in ("messages", "elements", "nbytes"):
                for way in ("forward", "backward"):
                    assert kept[layers][way][what] == none[layers][way][what]
                    rest = dict(shared[layers][way][what])
                    if way == "backward":
                        rest.pop("all_gather")
                    assert rest == none[layers][way][what]
        for name in ("bfloat16", "float32"):
            case = found[f"different ranks, {name}, sharded_latents"]
            assert per_block(case, "backward", "all_gather", "messages") == 4
            padded = -(-TOKENS // nproc) * nproc
            elements = per_block(case, "backward", "all_gather", "elements")
            assert elements == padded * latents("different ranks"), name


def test_products_whose_sum_was_kept_are_not_computed_again(nproc: int) -> None:
    """q, the pair k and v, o, the pair gate and up: 4 products; none with A, nor the last B."""
    for found in of_each(nproc, "messages"):
        none, *others = (
            found[f"different ranks, bfloat16, {tier}"]
            for tier in ("none", "latents", "sharded_latents")
        )
        for layers in (1, 3):
            for case in others:
                extra = [
                    each[str(layers)]["backward"]["products"] for each in (case, none)
                ]  # fmt: skip
                assert extra[0] - extra[1] == 4 * layers


def test_ends_of_an_untied_model(nproc: int) -> None:
    width, token_bytes = EQUAL_RANKS.width, TOKENS * 2
    for found in of_each(nproc, "message_ends"):
        assert found["untied, embedding, check False"]["messages"] == {}
        assert found["untied, embedding, backward"]["messages"] == {}
        check = found["untied, embedding, check True"]
        assert check["messages"] == {"all_reduce": 1}
        assert check["nbytes"]["all_reduce"] <= 256  # whatever the number of tokens
        for kind in ("untied", "tied"):
            forward, backward = (found[f"{kind}, norm{way}"] for way in ("", ", backward"))
            assert forward["messages"] == {"all_gather": 1}
            # A float32 sum of squares of each rank, as two bfloat16.
            assert forward["nbytes"]["all_gather"] == token_bytes * (width + 2 * nproc)
            assert backward["messages"] == {"reduce_scatter": 1}
            columns = 3 * nproc  # for each of the parts that are scattered
            nbytes = token_bytes * (width + columns * nproc)
            assert backward["nbytes"]["reduce_scatter"] == nbytes


def test_ends_of_a_tied_model(nproc: int) -> None:
    nbytes = TOKENS * 2 * EQUAL_RANKS.width
    for found in of_each(nproc, "message_ends"):
        forward = found["tied, embedding, check False"]
        assert forward["messages"] == {"reduce_scatter": 1}
        assert forward["nbytes"] == {"reduce_scatter": nbytes}
        backward = found["tied, embedding, backward"]
        assert backward["messages"] == {"all_gather": 1}
        assert backward["nbytes"] == {"all_gather": nbytes}


def test_a_model_gathers_and_scatters_once(nproc: int) -> None:
    for found in of_each(nproc, "messages"):
        for name, case in found.items():
            for layers in ("1", "3"):
                forward, backward = (case[layers][way]["messages"] for way in WAYS)
                # The check of the data, the largest logit, and the loss's two sums in one.
                assert forward == {"all_reduce": 4 * int(layers) + 3, "all_gather": 1}, name
                assert backward["reduce_scatter"] == 1, name
                assert backward["all_reduce"] == 4 * int(layers), name


WAYS = ("forward", "backward")
_PHASES = {"forward": ("forward", "check"), "backward": ("backward", "recompute")}


def test_counters_agree_with_what_was_seen(nproc: int) -> None:
    for found in of_each(nproc, "messages"):
        for name, case in found.items():
            for layers in ("1", "3"):
                counted = case[layers]["traffic"]
                assert {key.split("/")[0] for key in counted["messages"]} <= {
                    phase for phases in _PHASES.values() for phase in phases
                }
                for way, phases in _PHASES.items():
                    for ours, seen in (("messages", "messages"), ("payload_bytes", "nbytes")):
                        total: Counter[str] = Counter()
                        for key, value in counted[ours].items():
                            phase, kind = key.split("/")
                            if phase in phases:
                                total[kind] += value
                        assert dict(total) == case[layers][way][seen], (name, way)


def test_gathers_for_a_second_run_are_counted_as_such(nproc: int) -> None:
    for found in of_each(nproc, "messages"):
        for name, case in found.items():
            counted = case["3"]["traffic"]["messages"]
            assert counted.get("recompute/all_gather", 0) == 12 * name.endswith("sharded_latents")
            assert counted["check/all_reduce"] == 1


def test_nothing_is_sent_back_to_frozen_blocks(nproc: int) -> None:
    """Only the last block's last projection is trained: one latent's gradient is needed."""
    for found in of_each(nproc, "frozen_messages"):
        assert found["none"]["messages"] == {"reduce_scatter": 1, "all_reduce": 1}
        # Its A is in the segment of gate and up, which a checkpoint takes as a whole.
        assert found["latents"]["messages"] == {"reduce_scatter": 1, "all_reduce": 2}
        assert found["sharded_latents"]["messages"]["all_reduce"] == 2
