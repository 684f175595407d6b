"""Names, spelling, rules of composition, and undoing, over all optimizations there are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from lowtide.core.errors import ConfigError, DataError, ModelError, UnknownNameError
from lowtide.evaluation.optimizations import Context, Stack, optimizations, read
from lowtide.evaluation.optimizations.base import weight_bytes
from lowtide.evaluation.optimizations.registry import parse
from tests.evaluation.optimizations.models import seeded_model, seeded_tokens

SPECIAL = {
    "quant.rtn": ":4,g16", "quant.gptq": ":4,g16", "quant.awq": ":4,g16", "quant.nf4": ":g16",
    "quant.w8a8": "", "quant.smoothquant": ":0.5", "kv.int8": ":g16", "kv.int4": ":g16",
}  # fmt: skip
SPELLED = [name + SPECIAL.get(name, ":0.5") for name in optimizations.names()]
CODES = "weights held as codes"


@pytest.fixture(scope="module")
def model() -> Any:
    return seeded_model(layers=3, width=16)


def context() -> Context:
    return Context(calibration=seeded_tokens(seed=9, rows=4, length=16))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=seeded_tokens(seed=4)).logits
    return found


def answer(model: Any, stack: Stack) -> tuple[torch.Tensor, Any]:
    """Return the logits behind a prompt that is read under `stack`, and its report."""
    with stack.apply(model, context()) as applied:
        question = seeded_tokens(seed=5, length=2)
        reading = read(model, applied.runtime, seeded_tokens(seed=4), question=question)
        first = reading.logits
        reading.generate(2)
        return torch.cat([first, reading.logits]), applied.bytes_report()


def test_there_are_the_methods_that_are_promised() -> None:
    families = [name.partition(".")[0] for name in optimizations.names()]
    assert {f: families.count(f) for f in set(families)} == {
        "prune": 8, "quant": 6, "kv": 9, "prefill": 1, "prompt": 2,
    }  # fmt: skip


@pytest.mark.parametrize("spelled", SPELLED)
def test_an_optimization_changes_something_and_undoing_leaves_no_bit_changed(
    model: Any, spelled: str
) -> None:
    before, hooks = logits(model), hooks_of(model)
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    dense, _ = answer(model, Stack([]))
    changed, report = answer(model, Stack([spelled]))
    assert changed.isfinite().all()
    assert not torch.equal(changed, dense)
    assert torch.equal(logits(model), before)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    assert hooks_of(model) == hooks
    assert report["before_bytes"] == weight_bytes(model)
    dense_weights = spelled.startswith(("kv.", "prefill.", "prompt."))
    is_mask = spelled.startswith("prune.") and not spelled.startswith(
        ("prune.heads", "prune.ffn", "prune.depth")
    )
    if dense_weights or is_mask:
        assert report["after_bytes"] == report["before_bytes"]
    else:
        assert report["after_bytes"] < report["before_bytes"]


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def pairs() -> tuple[list[Stack], dict[tuple[str, str], str]]:
    """Return the pairs that are accepted, and why the others are not."""
    accepted, refused = [], {}
    for first, second in itertools.product(SPELLED, repeat=2):
        try:
            accepted.append(Stack([first, second]))
        except ConfigError as error:
            _, found, reason = str(error).partition(f'"{second}" after "{first}": ')
            refused[first, second] = reason if found else ""
    return accepted, refused


@pytest.mark.slow
def test_every_pair_that_is_accepted_works(model: Any) -> None:
    before = logits(model)
    accepted, _ = pairs()
    assert len(accepted) > 450
    for stack in accepted:
        found, _ = answer(model, stack)
        assert found.isfinite().all(), stack.name
    assert torch.equal(logits(model), before)


def test_pairs_are_refused_with_a_reason_and_no_others() -> None:
    _, refused = pairs()
    names = {(a.partition(":")[0], b.partition(":")[0]): why for (a, b), why in refused.items()}
    expected = {(a, a) for a in optimizations.names()}
    masks = {f"prune.{name}" for name in ("magnitude", "random", "wanda", "ria", "sparsegpt")}
    codes = {name for name in optimizations.names() if name.startswith("quant.")}
    policies = {n for n in optimizations.names() if n.startswith("kv.") and "int" not in n}
    bits = {"kv.int8", "kv.int4"}
    prompts = {"prompt.bm25", "prompt.surprise"}
    for kind in (masks, codes, policies, bits, prompts):
        expected |= set(itertools.product(kind, repeat=2))
    expected |= set(itertools.product(codes, masks | {"prune.heads", "prune.ffn"}))
    expected |= set(itertools.product(bits, policies))
    assert set(names) == expected
    assert all(len(reason) > 15 for reason in names.values())
    assert names["quant.rtn", "prune.wanda"].startswith(CODES)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (["quant.rtn:4,simulated", "prune.sparsegpt:0.5"], "takes weights off the grid"),
        (["prefill.lazy:0.5", "kv.tova:0.5,positions=rerotated"], "different numbers of entries"),
        (["kv.tova:0.5,positions=rerotated", "prefill.lazy:0.5"], "different numbers of entries"),
        (["prune.magnitude:0.5", "kv.int8", "prune.wanda:0.2"], "two masks"),
    ],
)
def test_what_depends_on_parameters_is_refused(parts: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Stack(parts)


def test_order_matters_and_is_part_of_the_name(model: Any) -> None:
    one = Stack(["prune.magnitude:0.5", "quant.rtn:2,g16,simulated"])
    two = Stack(["quant.rtn:2,g16,simulated", "prune.magnitude:0.5"])
    assert one.name == "prune.magnitude:0.5 + quant.rtn:2,g16,simulated"
    assert one.name != two.name
    assert not torch.equal(answer(model, one)[0], answer(model, two)[0])


@pytest.mark.parametrize("amount", ["0.5", "2:4"])
@pytest.mark.parametrize("quantiser", [x for x in SPELLED if x.startswith("quant.")])
def test_a_mask_survives_quantisation(model: Any, amount: str, quantiser: str) -> None:
    attention = model.model.layers[0].self_attn
    with Stack([f"prune.wanda:{amount}", quantiser]).apply(model, context()):
        layer = attention.v_proj
        weight = layer.codes if hasattr(layer, "codes") else layer.decoded(torch.float32)
        zeros = weight == 0
    with Stack([f"prune.wanda:{amount}"]).apply(model, context()):
        mask = attention.v_proj.weight == 0
    assert mask.float().mean() == 0.5
    assert bool(zeros[mask].all())


def test_a_stack_that_fails_half_way_leaves_the_model_as_it_was(model: Any) -> None:
    before = logits(model)
    with pytest.raises(DataError, match=r"quant.gptq:4.*no calibration tokens"):
        Stack(["prune.magnitude:0.5", "quant.gptq:4"]).apply(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("prune.wnda:0.5", UnknownNameError, 'Did you mean "prune.wanda"'),
        ("quant.rtn:4,q128", ConfigError, 'unknown parameter "q128"'),
        ("quant.rtn:four", ConfigError, 'unknown parameter "four"'),
        ("quant.rtn", ConfigError, '"bits" missing; write "quant.rtn:<bits>"'),
        ("quant.rtn:3", ConfigError, "simulated is False; allowed is true with bits beside"),
        ("quant.rtn:9", ConfigError, "bits is 9; allowed is 2 to 8"),
        ("quant.rtn:4,simulated=perhaps", ConfigError, "a switch"),
        ("quant.rtn:4,group_size=x", ConfigError, "'x'; it is of type int"),
        ("quant.rtn:4,bits=8", ConfigError, '"bits" is given twice'),
        ("prune.magnitude:1.5", ConfigError, "a part from 0 to below 1"),
        ("prune.magnitude:4:2", ConfigError, '"N:M"'),
        ("prune.heads:1", ConfigError, "ratio is 1.0"),
        ("kv.tova:0.5,positions=new", ConfigError, "one of"),
        ("kv.snapkv:0.5,kernel=4", ConfigError, "odd"),
        ("kv.int8:g0", ConfigError, "group_size is 0"),
        ("prefill.lazy:0.5,layer=0", ConfigError, "1 or more"),
        ("prompt.bm25:0.5,unit=0", ConfigError, "above 0"),
        ("quant.smoothquant:2", ConfigError, "from 0 to 1"),
    ],
)
def test_wrong_spelling_is_refused_with_what_is_allowed(
    text: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as error:
        parse(text)
    assert words in str(error.value)


@pytest.mark.parametrize("spelled", SPELLED)
def test_what_is_spelled_is_read_back(spelled: str) -> None:
    part = parse(spelled)
    assert parse(part.spelled) == part
    assert part.family == spelled.partition(".")[0]
    assert part.stage in ("weights", "prompt", "prefill", "cache")


def test_models_of_another_layout_are_refused() -> None:
    with pytest.raises(ModelError, match="no module list named 'layers'"):
        Stack(["prune.magnitude:0.5"]).apply(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no transformers model"):
        Stack(["kv.tova:0.5"]).apply(torch.nn.Linear(2, 2))


def test_sliding_windows_are_refused(model: Any) -> None:
    kinds, model.config.layer_types = None, ["full_attention", "sliding_attention"]
    try:
        with pytest.raises(ModelError, match="sliding_attention"):
            Stack(["kv.tova:0.5"]).apply(model)
    finally:
        model.config.layer_types = kinds
