"""Scores and answers of torch models against look-ups and against one row at a time."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from lowtide.core.errors import DataError, ModelError
from lowtide.evaluation.models.protocol import (
    Continuation,
    Generation,
    Model,
    TokenModel,
    TokenRow,
)
from lowtide.evaluation.models.torch_model import TorchModel, module_fingerprint
from tests.evaluation.fakes import Bigram, Prefix, byte_model


def by_hand(module: Bigram, context: str, text: str) -> float:
    ids = (context + text).encode()
    begin = len(context.encode())
    return sum(module.log_probability(ids[t - 1], ids[t]) for t in range(max(1, begin), len(ids)))


def test_likelihoods_are_those_of_the_table() -> None:
    module = Bigram()
    model = byte_model(module, batch_size=2)
    requests = [
        Continuation("The sky is", " blue"), Continuation("a", "b"), Continuation("é", "ü" * 9),
    ]  # fmt: skip
    found = model.loglikelihood(requests)
    for request, each in zip(requests, found, strict=True):
        assert each.total == pytest.approx(by_hand(module, *request), rel=1e-5)
        assert each.tokens == len(request.text.encode())
    assert isinstance(model, TokenModel)
    assert isinstance(model, Model)


def test_batches_and_padding_change_nothing() -> None:
    requests = [Continuation("x" * n, "abc"[: 1 + n % 3]) for n in range(1, 12)]
    alone = [byte_model(Prefix()).loglikelihood([each])[0] for each in requests]
    together = byte_model(Prefix(), batch_size=4).loglikelihood(requests)
    for one, other in zip(alone, together, strict=True):
        assert other.total == pytest.approx(one.total, rel=1e-5)
        assert other[1:] == one[1:]


def test_greedy_is_said_when_every_token_is_the_likeliest() -> None:
    module = Bigram()
    best = int(module.table[ord("a")].argmax())
    model = TorchModel(module)
    rows = [TokenRow((97, best), 1), TokenRow((97, (best + 1) % 256), 1)]
    assert [each.is_greedy for each in model.score_tokens(rows)] == [True, False]


def test_a_text_without_context_needs_a_token_before_it() -> None:
    module = Bigram(257)
    found = byte_model(module, bos=256).loglikelihood([Continuation("", "ab")])[0]
    expected = module.log_probability(256, 97) + module.log_probability(97, 98)
    assert found.total == pytest.approx(expected, rel=1e-5)
    assert found.tokens == 2
    without = byte_model(module).loglikelihood([Continuation("", "ab")])[0]
    assert without.total == pytest.approx(module.log_probability(97, 98), rel=1e-5)
    assert without.tokens == 1
    with pytest.raises(DataError, match="a text needs a context"):
        byte_model(module).loglikelihood([Continuation("", "a")])


def test_a_token_over_the_border_is_scored() -> None:
    def encode(text: str) -> list[int]:  # "ab" is one token, number 1
        return [1 if part == "ab" else ord(part) for part in re.findall("ab|.", text)]

    module = Bigram()
    model = TorchModel(module, encode=encode)
    found = model.loglikelihood([Continuation("xa", "bc")])[0]
    assert found.tokens == 2  # "ab", "c"
    expected = module.log_probability(ord("x"), 1) + module.log_probability(1, ord("c"))
    assert found.total == pytest.approx(expected, rel=1e-5)


def test_long_contexts_lose_their_beginning_and_long_texts_are_refused() -> None:
    module = Prefix()
    model = byte_model(module, max_length=6)
    found = model.loglikelihood([Continuation("0123456789", "ab")])[0]
    kept = byte_model(module).loglikelihood([Continuation("56789", "ab")])[0]
    assert found.total == pytest.approx(kept.total, rel=1e-5)
    with pytest.raises(DataError, match="take shorter windows"):
        model.loglikelihood([Continuation("x", "abcdefg")])
    whole = model.loglikelihood([Continuation("x", "abcdef")])[0]  # reads "xabcde"
    assert whole.total == byte_model(module).loglikelihood([Continuation("x", "abcdef")])[0].total


def greedy(module: Any, prompt: str, steps: int) -> str:
    ids = list(prompt.encode())
    for _ in range(steps):
        ids.append(int(module(torch.tensor([ids]))[0, -1].argmax()))
    return bytes(ids[len(prompt) :]).decode(errors="replace")


def test_answers_are_greedy_and_independent_of_the_batch() -> None:
    module = Prefix()
    prompts = ["a", "hello", "xyz"]
    found = byte_model(module, batch_size=2).generate(prompts, Generation(max_tokens=5))
    assert found == [greedy(module, prompt, 5) for prompt in prompts]
    full = found[1]
    if full[2] not in full[:2]:
        cut = byte_model(module).generate(["hello"], Generation(max_tokens=5, stop=(full[2],)))
        assert cut == [full[:2]]


def test_an_end_token_ends_an_answer() -> None:
    module = Bigram()
    with torch.no_grad():
        module.table[97, 98] = 50.0
        module.table[98, 0] = 50.0
    assert byte_model(module, eos=0).generate(["a"], Generation(max_tokens=9)) == ["b"]


def test_drawn_answers_belong_to_prompt_and_seed() -> None:
    module = Bigram()

    def answers(prompts: list[str], seed: int, batch: int) -> list[str]:
        options = Generation(max_tokens=8, temperature=1.0, seed=seed)
        return byte_model(module, batch_size=batch).generate(prompts, options)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = answers(["a", "b", "c"], 0, 3)
    assert answers(["c"], 0, 1) == first[2:]
    assert answers(["a", "b", "c"], 1, 3) != first
    assert torch.equal(torch.get_rng_state(), before)
    cold = Generation(max_tokens=8, temperature=1e-4)
    assert byte_model(module).generate(["a"], cold) == [greedy(module, "a", 8)]


def test_the_last_token_is_not_read() -> None:
    read = []

    def watched(tokens: torch.Tensor) -> torch.Tensor:
        read.append(tokens.tolist())
        return Bigram()(tokens)

    TorchModel(watched).score_tokens([TokenRow((5, 6, 7), 1)])
    assert read == [[[5, 6]]]


def test_ranks_do_as_many_forward_passes_as_they_agreed() -> None:
    calls = []

    def counted(tokens: torch.Tensor) -> torch.Tensor:
        calls.append(tokens.shape)
        return module(tokens)

    module = Bigram()
    model = byte_model(counted, batch_size=2, agree=lambda own: (own or 0) + 3)
    plain = byte_model(module)
    requests = [Continuation("a", "bc"), Continuation("b", "c"), Continuation("c", "d")]
    found = [each.total for each in model.loglikelihood(requests)]
    assert found == pytest.approx([each.total for each in plain.loglikelihood(requests)])
    assert len(calls) == 2 + 3
    calls.clear()
    options = Generation(max_tokens=4)
    assert model.generate(["a", "b", "c"], options) == plain.generate(["a", "b", "c"], options)
    assert len(calls) == (2 + 3) * 4


def test_what_is_not_given_is_asked_for() -> None:
    tokens_only = TorchModel(Bigram())
    with pytest.raises(DataError, match="has no encode"):
        tokens_only.loglikelihood([Continuation("a", "b")])
    with pytest.raises(DataError, match="has no decode"):
        tokens_only.generate(["a"], Generation())
    with pytest.raises(DataError, match=r"logits: got \(\)"):
        TorchModel(lambda tokens: tokens.float().mean()).score_tokens([TokenRow((1, 2), 1)])
    with pytest.raises(DataError, match="less than what the model reads"):
        byte_model(Bigram(), max_length=4).generate(["a"], Generation(max_tokens=4))
    with pytest.raises(DataError, match="max_tokens of 1 or more"):
        Generation(max_tokens=0)
    with pytest.raises(DataError, match="batch_size"):
        TorchModel(Bigram(), batch_size=0)


def test_fingerprints_see_every_bit() -> None:
    one, same, other = Bigram(seed=0), Bigram(seed=0), Bigram(seed=0)
    with torch.no_grad():
        other.table[3, 4] = math.nextafter(float(other.table[3, 4]), 9.0) + 1e-6
    assert module_fingerprint(one) == module_fingerprint(same)
    assert module_fingerprint(one) != module_fingerprint(other)
    assert module_fingerprint(one) != module_fingerprint(one.bfloat16())


def test_a_model_of_transformers_is_read_from_a_folder(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from lowtide.evaluation.adapters import hf

    alphabet = {chr(code): code - 32 for code in range(32, 127)} | {"<s>": 95}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(alphabet, unk_token="?"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    raw.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(config)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = hf.load(tmp_path, batch_size=2)
    requests = [Continuation("The sky is", " blue"), Continuation("", "hi"), Continuation("a", "b")]
    found = model.loglikelihood(requests)
    for request, each in zip(requests, found, strict=True):
        before = [95] if not request.context else [alphabet[c] for c in request.context]
        after = [alphabet[c] for c in request.text]
        with torch.no_grad():
            logits = network.eval()(torch.tensor([before + after])).logits[0]
        scores = logits.log_softmax(dim=-1)[len(before) - 1 : -1]
        expected = scores[range(len(after)), after].sum()
        assert each.total == pytest.approx(float(expected), rel=1e-4)
    answer = model.generate(["ab"], Generation(max_tokens=5))[0]
    ids = [alphabet["a"], alphabet["b"]]
    with torch.no_grad():
        theirs = network.generate(
            torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones(1, 2),
        )  # fmt: skip
    assert answer == tokenizer.decode(theirs[0, 2:], skip_special_tokens=True)
    with pytest.raises(ModelError, match="no causal model"):
        hf.load(tmp_path / "none")
