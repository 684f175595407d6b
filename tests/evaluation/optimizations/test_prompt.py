"""Tokens that are left out before, or in the middle of, reading."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from lowtide.core.errors import ConfigError, DataError
from lowtide.evaluation.optimizations import Context, Stack, read
from lowtide.evaluation.optimizations.registry import parse
from tests.evaluation.optimizations.models import seeded_model, seeded_tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return seeded_model(layers=3)


def kept(spelled: str, model: Any, prompt: Any, question: Any = None) -> Any:
    return parse(spelled).kept(model, prompt, question)  # type: ignore[attr-defined]


def test_bm25_keeps_units_with_rare_words_of_the_question(model: Any) -> None:
    prompt = torch.tensor([[1, 2, 3, 4, 1, 5, 6, 7, 9]])  # units 12 34 15 67, and 9 is left over
    question = torch.tensor([[1, 7]])
    assert kept("prompt.bm25:0.75,unit=2", model, prompt, question).tolist() == [[6, 7, 8]]
    assert kept("prompt.bm25:0.5,unit=2", model, prompt, question).tolist() == [[0, 1, 6, 7, 8]]


def test_bm25_scores_as_the_formula_says(model: Any) -> None:
    prompt, question = torch.tensor([[1, 1, 3, 4]]), torch.tensor([[1]])
    score = parse("prompt.bm25:0.5,unit=2").scores(model, prompt, question)  # type: ignore[attr-defined]
    rarity = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    assert score.tolist() == [[pytest.approx(rarity * 2 * 2.2 / (2 + 1.2)), 0.0]]


def test_bm25_needs_the_question(model: Any) -> None:
    with pytest.raises(DataError, match="before the question is known"):
        kept("prompt.bm25:0.5", model, seeded_tokens())


def test_surprise_keeps_what_the_model_did_not_expect(model: Any) -> None:
    prompt = seeded_tokens(rows=1, length=9)
    with torch.no_grad():
        logits = model(input_ids=prompt).logits
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], prompt[0, 1:], reduction="none")
    losses = torch.cat([losses.mean()[None], losses])
    pairs = losses[:8].view(4, 2).mean(1)
    best = int(pairs.argmax())
    found = kept("prompt.surprise:0.75,unit=2", model, prompt)
    assert found.tolist() == [[2 * best, 2 * best + 1, 8]]


def test_a_shortened_prompt_is_read_as_that_text(model: Any) -> None:
    prompt, question = seeded_tokens(), seeded_tokens(seed=3, length=2)
    with Stack(["prompt.bm25:0.5"]).apply(model) as applied:
        reading = read(model, applied.runtime, prompt, question=question)
    index = kept("prompt.bm25:0.5", model, prompt, question)
    text = torch.cat([prompt.gather(1, index), question], 1)
    with torch.no_grad():
        expected = model(input_ids=text).logits[:, -1]
    assert torch.allclose(reading.logits, expected, atol=1e-5)
    assert (reading.prompt_tokens, reading.read_tokens) == (66, 34)
    assert reading.compress_s > 0


def test_a_prompt_shorter_than_a_unit_stays(model: Any) -> None:
    prompt = seeded_tokens(length=5)
    assert kept("prompt.surprise:0.9", model, prompt).tolist() == [list(range(5))] * 2


def test_skipping_reads_fewer_tokens_from_its_layer_on(model: Any) -> None:
    prompt = seeded_tokens(length=40)
    full, _ = dense_caches(model, prompt)
    with Stack(["prefill.lazy:0.5,layer=1"]).apply(model) as applied:
        reading = read(model, applied.runtime, prompt)
    layers = reading.cache.layers
    assert [layer.keys.shape[2] for layer in layers] == [40, 20, 20]
    # Independently: the attention of the last token in layer 0, from eager attention.
    eager = seeded_model(layers=3)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(input_ids=prompt, output_attentions=True).attentions[0][:, :, -1].mean(1)
    weights[:, -1] = 2
    expected = weights.topk(20, 1).indices.sort(1).values
    assert torch.equal(layers[0].skipped_to, expected)
    # What enters layer 1 is not changed yet, so its keys are those of the full prompt.
    index = expected[:, None, :, None].expand(-1, 2, -1, 8)
    assert torch.allclose(layers[1].keys, full.layers[1].keys.gather(2, index), atol=1e-5)
    assert not torch.allclose(layers[2].keys, full.layers[2].keys.gather(2, index), atol=1e-3)


def dense_caches(model: Any, prompt: torch.Tensor) -> tuple[Any, torch.Tensor]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(input_ids=prompt, past_key_values=cache).logits
    return cache, logits


def test_skipping_nothing_changes_nothing_and_answers_go_on(model: Any) -> None:
    prompt, question = seeded_tokens(length=40), seeded_tokens(seed=3, length=4)
    found = {}
    for parts in ([], ["prefill.lazy:0"], ["prefill.lazy:0.5,layer=2"]):
        with Stack(parts).apply(model) as applied:
            reading = read(model, applied.runtime, prompt)
            reading.ask(question)
            reading.generate(3)
            found["".join(parts)] = reading.logits
            if parts:
                lengths = [layer.keys.shape[2] for layer in reading.cache.layers]
    assert torch.allclose(found[""], found["prefill.lazy:0"], atol=1e-4)
    assert not torch.allclose(found[""], found["prefill.lazy:0.5,layer=2"], atol=1e-3)
    assert lengths == [46, 46, 26]


def test_skipping_needs_a_layer_that_is_there(model: Any) -> None:
    with pytest.raises(ConfigError, match="layer is 3; allowed is below the 3 layers"):
        Stack(["prefill.lazy:0.5,layer=3"]).apply(model, Context())
