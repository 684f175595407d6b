"""The compressed cache: against kvpress, transformers' own cache, and slow versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from lowtide.core.errors import DataError, ModelError
from lowtide.evaluation.optimizations import Context, Stack, read
from lowtide.evaluation.optimizations.adapters.attention import new_cache
from lowtide.evaluation.optimizations.cache.policies import Prompt
from lowtide.evaluation.optimizations.cache.quantised import CacheInt4, CacheInt8, quantise
from lowtide.evaluation.optimizations.cache.rope import Rope
from lowtide.evaluation.optimizations.cache.scores import accumulated_attention, attention_weights
from lowtide.evaluation.optimizations.registry import parse
from tests.evaluation.optimizations.models import CASES, seeded_model, seeded_tokens

GOLDEN = json.loads((Path(__file__).parent / "golden_kept.json").read_text())
POLICIES = [
    "kv.random",
    "kv.streaming",
    "kv.h2o",
    "kv.snapkv",
    "kv.tova",
    "kv.knorm",
    "kv.expected",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return seeded_model()


def kept_by(model: Any, spelled: str, tokens: torch.Tensor) -> list[torch.Tensor]:
    with Stack([spelled]).apply(model) as applied:
        reading = read(model, applied.runtime, tokens, records=True)
    return [layer.chosen for layer in reading.cache.layers]


@pytest.mark.parametrize("case", CASES)
def test_the_entries_kept_are_those_that_kvpress_keeps(case: str) -> None:
    """golden_kept.json: entries kept by kvpress 0.5.5 for these models and tokens.

    Made with transformers 5.2.0, by finding each key of kvpress's cache in that of the same prompt
    without a press.
    """
    model = seeded_model(**CASES[case]["model"])
    tokens = seeded_tokens(**CASES[case]["tokens"])
    checked = 0
    for name, expected in GOLDEN["kept"].items():
        if not name.startswith(case + " kv."):
            continue
        found = kept_by(model, name.removeprefix(case + " "), tokens)
        assert [layer.tolist() for layer in found] == expected, name
        checked += 1
    assert checked == 15


@pytest.mark.parametrize("spelled", [f"{name}:0" for name in POLICIES] + [""])
def test_a_cache_that_keeps_all_answers_as_transformers_own(model: Any, spelled: str) -> None:
    tokens, question = seeded_tokens(length=40), seeded_tokens(seed=8, length=5)
    with Stack([spelled] if spelled else []).apply(model) as applied:
        reading = read(model, applied.runtime, tokens)
        first = reading.logits
        reading.ask(question)
        asked = reading.logits
        generated, _ = reading.generate(6)
    whole = model.generate(
        torch.cat([tokens, question], 1), max_new_tokens=6, do_sample=False, eos_token_id=None,
        attention_mask=torch.ones(2, 45),
    )  # fmt: skip
    with torch.no_grad():
        expected = model(input_ids=torch.cat([tokens, question], 1)).logits
    assert torch.allclose(first, expected[:, 39], atol=1e-4)
    assert torch.allclose(asked, expected[:, -1], atol=1e-4)
    assert torch.equal(generated, whole[:, 45:])


def test_the_prompt_itself_is_read_with_all_entries(model: Any) -> None:
    tokens = seeded_tokens()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits[:, -1]
    with Stack(["kv.streaming:0.75"]).apply(model) as applied:
        reading = read(model, applied.runtime, tokens)
    assert torch.allclose(reading.logits, expected, atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_entries_kept_are_counted_and_the_rest_is_given_back(model: Any, name: str) -> None:
    tokens = seeded_tokens(length=60)
    with Stack([f"{name}:0.5"]).apply(model) as applied:
        reading = read(model, applied.runtime, tokens, records=True)
    meter = reading.meter
    entry = 2 * 8 * 4  # key and value of 8 float32
    # 2 layers, 2 sequences, 2 heads, 30 of 60 entries
    assert meter.held_bytes() == 2 * 2 * 2 * 30 * entry
    assert meter.kept_entries / meter.prompt_entries == 0.5
    # The first layer has dropped its half when the second holds its whole.
    assert meter.peak_bytes == 2 * 2 * (60 + 30) * entry
    for layer in reading.cache.layers:
        assert layer.chosen.shape == (2, 2, 30)
        assert (layer.chosen.diff(dim=2) > 0).all()


def test_new_tokens_see_what_is_kept_at_its_old_positions(model: Any) -> None:
    tokens, question = seeded_tokens(length=40), seeded_tokens(seed=8, length=3)
    with Stack(["kv.streaming:0.5"]).apply(model) as applied:
        reading = read(model, applied.runtime, tokens)
        reading.ask(question)
    # The same, with a mask over the whole sequence: new tokens do not see 4 .. 23.
    length = 43
    mask = torch.ones(length, length).tril().bool()
    mask[40:, 4:24] = False
    with torch.no_grad():
        hidden = model(
            input_ids=torch.cat([tokens, question], 1),
            attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None],
        ).logits
    assert torch.allclose(reading.logits, hidden[:, -1], atol=1e-4)


def test_rerotated_keys_are_those_of_a_prompt_without_the_others() -> None:
    # Keys of the first layer depend on nothing but their token and its position.
    model, tokens = seeded_model(layers=1), seeded_tokens(length=40)
    kept = torch.cat([torch.arange(4), torch.arange(24, 40)])
    with Stack(["kv.streaming:0.5,positions=rerotated"]).apply(model) as applied:
        reading = read(model, applied.runtime, tokens)
        short = new_cache(model, applied.runtime)[0]
        held = reading.cache.layers[0].keys.clone()
        assert reading.cache.get_seq_length() == 20
        reading.ask(seeded_tokens(seed=8, length=1))
    del short
    plain, _ = new_cache(model, Context().runtime)
    with torch.no_grad():
        model(input_ids=tokens[:, kept], past_key_values=plain)
        question = seeded_tokens(seed=8, length=1)
        values = reading.cache.layers[0].values
        expected = model(input_ids=question, past_key_values=plain).logits[:, -1]
    assert torch.allclose(held, plain.layers[0].keys[:, :, :20], atol=1e-4)
    # One layer: values are also the same, and so is the answer.
    assert torch.allclose(values, plain.layers[0].values, atol=1e-5)
    assert torch.allclose(reading.logits, expected, atol=1e-3)
    original = Stack(["kv.streaming:0.5"])
    with original.apply(model) as applied:
        reading = read(model, applied.runtime, tokens)
        assert reading.cache.get_seq_length() == 40


def naive_weights(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    rows, heads, asked, _ = queries.shape
    held = keys.shape[2]
    found = torch.zeros(rows, heads, asked, held)
    for b in range(rows):
        for h in range(heads):
            key_head = h * keys.shape[1] // heads
            for q in range(asked):
                seen = held - asked + q + 1
                products = keys[b, key_head, :seen] @ queries[b, h, q] * scaling
                found[b, h, q, :seen] = products.softmax(0)
    return found


@pytest.fixture
def prompt() -> Prompt:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, heads, 150, 8, generator=generator) for heads in (4, 2, 2)]
    return Prompt(
        queries=drawn[0], keys=drawn[1], values=drawn[2], positions=torch.arange(150)[None],
        scaling=0.5, layer=0, rope=None, seed=0,
    )  # fmt: skip


def test_attention_weights_are_those_of_single_products(prompt: Prompt) -> None:
    few = prompt.queries[:, :, -3:]
    expected = naive_weights(few, prompt.keys, 0.5)
    assert torch.allclose(attention_weights(few, prompt.keys, 0.5), expected, atol=1e-6)
    whole = naive_weights(prompt.queries, prompt.keys, 0.5).sum(2)
    # 150 queries are more than are computed at once.
    assert torch.allclose(accumulated_attention(prompt.queries, prompt.keys, 0.5), whole, atol=1e-4)


def test_h2o_keeps_the_last_ones_and_those_that_drew_most(prompt: Prompt) -> None:
    kept = parse("kv.h2o:0.6").kept(prompt)  # type: ignore[attr-defined]
    total = naive_weights(prompt.queries, prompt.keys, 0.5).sum(2)
    for b in range(2):
        for head in range(2):
            shared = total[b, 2 * head] + total[b, 2 * head + 1]
            heavy = shared[:120].topk(30).indices.tolist()
            assert kept[b, head].tolist() == sorted(heavy) + list(range(120, 150))


def test_heads_choose_for_themselves_but_those_of_tova_together(prompt: Prompt) -> None:
    snap = parse("kv.snapkv:0.5").kept(prompt)  # type: ignore[attr-defined]
    tova = parse("kv.tova:0.5").kept(prompt)  # type: ignore[attr-defined]
    assert not torch.equal(snap[:, 0], snap[:, 1])
    assert torch.equal(tova[:, 0], tova[:, 1])
    assert (tova[..., -1] == 149).all()


def test_random_entries_are_repeatable_and_differ_between_layers_and_seeds(model: Any) -> None:
    tokens = seeded_tokens()
    with Stack(["kv.random:0.5"]).apply(model) as applied:
        runs = [read(model, applied.runtime, tokens, records=True, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([layer.chosen for layer in run.cache.layers] for run in runs)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_turning_forth_and_back_changes_nothing_and_agrees_with_the_model(model: Any) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rope = Rope.of(model, asked_by="a test")
    x = torch.randn(1, 2, 9, 8)
    positions = torch.arange(5, 14)[None]
    cos, sin = model.model.rotary_emb(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    turned = rope.turn(x, positions[:, None])
    assert torch.allclose(turned, expected, atol=1e-5)
    assert torch.allclose(rope.turn(turned, -positions[:, None]), x, atol=1e-5)


def test_a_rotation_that_changes_with_the_length_is_refused(model: Any) -> None:
    model.model.rotary_emb.rope_type = "dynamic"
    try:
        with pytest.raises(ModelError, match=r"kv.expected:0.5.*'dynamic'; allowed are"):
            Stack(["kv.expected:0.5"]).apply(model)
        Stack(["kv.tova:0.5"]).apply(model).undo()  # turns nothing
    finally:
        model.model.rotary_emb.rope_type = "default"


@pytest.mark.parametrize(("bits", "steps"), [(8, 255), (4, 15)])
def test_quantised_values_are_half_a_step_off_at_most(bits: int, steps: int) -> None:
    x = torch.randn(2, 2, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, :, 0] = 1.5  # no range at all
    for dimension in (3, 4):
        found = quantise(x, bits, dimension)
        ranges = x.amax(dimension, keepdim=True) - x.amin(dimension, keepdim=True)
        # Lows and steps are rounded to float16 (2^-11 of themselves).
        slack = 2.0**-11 * (x.abs().amax(dimension, keepdim=True) + ranges) * 2
        assert ((found.values(x.dtype) - x).abs() <= ranges / steps / 2 + slack).all()


@pytest.mark.parametrize("kind", [CacheInt8, CacheInt4])
def test_keys_share_steps_along_tokens_and_values_along_channels(kind: Any) -> None:
    quantiser = kind(group_size=16)
    keys = torch.randn(1, 2, 32, 8, generator=torch.Generator().manual_seed(0))
    values = keys.clone()
    keys[..., 3] *= 50  # a channel that is large for all tokens
    values[:, :, 5] *= 50  # a token that is large in all channels
    decoded = quantiser.decode(*quantiser.encode(keys, values), torch.float32)
    others = [c for c in range(8) if c != 3]
    step = 4.5 * 2 / (2**quantiser.bits - 1)
    assert (decoded[0] - keys)[..., others].abs().max() < step
    rest = [t for t in range(32) if t != 5]
    assert (decoded[1] - values)[:, :, rest].abs().max() < step


@pytest.mark.parametrize(("spelled", "least"), [("kv.int8:g16", 2.5), ("kv.int4:g16", 4.0)])
def test_a_quantised_cache_holds_fewer_bytes_and_grows(
    model: Any, spelled: str, least: float
) -> None:
    tokens = seeded_tokens(length=160)
    reports = {}
    for parts in ([], [spelled]):
        with Stack(parts).apply(model) as applied:
            reading = read(model, applied.runtime, tokens)
            reports[bool(parts)] = reading.meter.held_bytes()
            if parts:
                layer = reading.cache.layers[0]
                assert layer.keys.shape[2] == 0
                for length in (5, 11, 3):  # 19 more: one more group, 3 left over
                    reading.ask(seeded_tokens(seed=length, length=length))
                assert layer.keys.shape[2] == 3
                assert layer.get_mask_sizes(1) == (180, 0)
                assert reading.cache.get_seq_length() == 179
    assert reports[False] / reports[True] > least


def test_a_quantised_cache_answers_nearly_as_a_dense_one(model: Any) -> None:
    tokens, question = seeded_tokens(length=50), seeded_tokens(seed=3, length=20)
    found = {}
    for parts in ("", "kv.int8:g16", "kv.int4:g16"):
        with Stack([parts] if parts else []).apply(model) as applied:
            reading = read(model, applied.runtime, tokens)
            reading.ask(question)
            reading.ask(question)
            found[parts] = reading.logits
    errors = [(found[k] - found[""]).abs().max() for k in ("kv.int8:g16", "kv.int4:g16")]
    assert 0 < errors[0] < errors[1] / 5
    assert errors[0] < 0.05 * found[""].abs().max()


@pytest.mark.parametrize("parts", [[], ["kv.tova:0.5"], ["kv.tova:0.5", "kv.int4:g8"]])
def test_copies_of_a_cache_answer_each_for_itself(model: Any, parts: list[str]) -> None:
    tokens, questions = seeded_tokens(rows=2), seeded_tokens(seed=6, rows=6, length=2)
    with Stack(parts).apply(model) as applied:
        reading = read(model, applied.runtime, tokens)
        reading.repeat(3)
        reading.ask(questions)
        for row in range(6):
            alone = read(model, applied.runtime, tokens[row // 3 : row // 3 + 1])
            alone.ask(questions[row : row + 1])
            assert torch.allclose(reading.logits[row], alone.logits[0], atol=1e-4)


def test_padding_is_refused(model: Any) -> None:
    mask = torch.ones(2, 64, dtype=torch.int64)
    with Stack(["kv.tova:0.5"]).apply(model):
        model(input_ids=seeded_tokens(), attention_mask=mask)
        mask[0, :3] = 0
        with pytest.raises(DataError, match=r"hides tokens \(padding\)"):
            model(input_ids=seeded_tokens(), attention_mask=mask)


def test_other_precisions_keep_their_dtype() -> None:
    model = seeded_model().bfloat16()
    for name in POLICIES:
        with Stack([f"{name}:0.5", "kv.int8:g8"]).apply(model) as applied:
            reading = read(model, applied.runtime, seeded_tokens())
            reading.ask(seeded_tokens(length=2))
            assert reading.logits.dtype == torch.bfloat16
            assert reading.logits.isfinite().all()


def test_an_empty_cache_cannot_be_repeated(model: Any) -> None:
    cache, _ = new_cache(model, Context().runtime)
    with pytest.raises(DataError, match="read a prompt first"):
        cache.batch_repeat_interleave(2)
