"""The compression key: its settings, and when autograd's hooks are set and taken away."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lowtide.compression.activations.saving import Saving
from lowtide.compression.config import ActivationsConfig, CompressionConfig
from lowtide.compression.plugin import _Watched
from lowtide.core.config import resolve
from lowtide.core.errors import ConfigError, PluginError
from lowtide.core.lifecycle import Event
from tests.compression.activations import models
from tests.compression.activations.models import Transformer, batch, block_of, train
from tests.helpers.plugin_suite import check_plugin


def test_conformance() -> None:
    check_plugin("compression", {"activations": {"min_bytes": 0}}, is_exact=False)
    check_plugin("compression", {"activations": {"enabled": False}}, is_exact=True)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({}, 'nothing is named that is to be compressed; add "activations": {}'),
        ({"activation": {}}, 'Did you mean "activations"'),
        ({"activations": {"bit": 4}}, 'Did you mean "bits"'),
        ({"activations": {"bits": 3}}, "lowtide.compression.activations.bits"),
        ({"activations": {"bits": 4, "bound": 0.1}}, '"bits" and "bound" exclude each other'),
        ({"activations": {"bound": 0.001}}, "less than what 8 bits keep with stochastic rounding"),
        ({"activations": {"bound": 0.0}}, "lowtide.compression.activations.bound"),
        ({"activations": {"bound": 1.0}}, "lowtide.compression.activations.bound"),
        ({"activations": {"group_size": 100}}, "lowtide.compression.activations.group_size"),
        ({"activations": {"group_size": 8}}, "lowtide.compression.activations.group_size"),
        ({"activations": {"rounding": "up"}}, "lowtide.compression.activations.rounding"),
        ({"activations": {"min_bytes": -1}}, "lowtide.compression.activations.min_bytes"),
        ({"activations": {"exclude": "lm_head"}}, "lowtide.compression.activations.exclude"),
        ({"activations": {"seed": -1}}, "lowtide.compression.activations.seed"),
        ({"activations": True}, "lowtide.compression.activations"),
    ],
)
def test_wrong_settings_are_named(block: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"compression": block})
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({}, 8), ({"bits": 2}, 2), ({"bound": 0.6}, 2), ({"bound": 0.3}, 4), ({"bound": 0.05}, 8),
        ({"bound": 0.3, "rounding": "nearest"}, 2), ({"bound": 0.05, "rounding": "nearest"}, 4),
        ({"bound": 0.002, "rounding": "nearest"}, 8),
    ],
)  # fmt: skip
def test_bits_follow_from_bound_and_rounding(settings: dict[str, Any], bits: int) -> None:
    config = resolve({"compression": {"activations": settings}}).plugins["compression"]
    assert isinstance(config, CompressionConfig)
    assert config.activations is not None
    assert config.activations.quantiser().bits == bits
    assert resolve({"compression": {"enabled": False}}).plugins == {}


def test_what_is_chosen_is_written_down() -> None:
    loop = models.attached(Transformer(), block_of())
    assert loop.session.report()["config"]["compression"]["activations"]["bits"] == 8
    loop.close()


def test_losses_fall_as_in_stock_and_random_numbers_are_its_own() -> None:
    states, losses = {}, {}
    for name, lowtide in {"stock": {}, "8": block_of(), "4": block_of(bits=4)}.items():
        torch.manual_seed(0)
        loop = models.attached(Transformer(dropout=0.1), lowtide)
        losses[name] = train(loop, 40)
        states[name] = torch.get_rng_state()
        if name == "4":
            summary = loop.session.report()["plugins"]["compression"]["activations"]
            assert summary["bits"] == 4
            assert summary["packed"] > 10
            assert summary["saved_bytes"] > 3 * summary["held_bytes"]
            assert summary["ratio"] == summary["saved_bytes"] / summary["held_bytes"]
            assert summary["raw"]["parameter"] > 0
            assert summary["raw"]["exact"] > 0
            gauges = loop.session.telemetry.snapshot()["gauges"]
            held = gauges["lowtide.compression.activations_held_bytes"]
            assert held == summary["held_bytes"]
        loop.close()
    for name in ("8", "4"):
        assert torch.equal(states[name], states["stock"])
        assert losses[name][0] == losses["stock"][0]
        assert losses[name] != losses["stock"]
        assert losses[name][-1] < 0.7 * losses[name][0]
        assert losses[name][-1] == pytest.approx(losses["stock"][-1], rel=0.05)


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = models.attached(Transformer(), block_of(bits=2))
    train(loop, 5)
    loop.save(tmp_path / "state.pt")
    expected = train(loop, 5, begin=5)
    loop.close()
    loop = models.attached(Transformer(), block_of(bits=2))
    loop.load(tmp_path / "state.pt")
    assert train(loop, 5, begin=5) == expected
    loop.close()
    loop = models.attached(Transformer(), block_of(bits=2, seed=1))
    loop.load(tmp_path / "state.pt")
    assert train(loop, 5, begin=5) != expected
    loop.close()


def test_micro_batches_of_a_step_draw_differently() -> None:
    torch.manual_seed(0)
    loop = models.attached(Transformer(), block_of(bits=2))
    found = []
    for _ in range(2):
        loop.model.zero_grad()
        loop.backward(loop.model(*batch(0)))
        found.append(loop.model.blocks[0].up.weight.grad.clone())
    assert not torch.equal(*found)
    loop.close()


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.fails = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).sin()
        if self.fails:
            raise KeyError("data")
        return x


def hooks_are_set() -> bool:
    """Whether a tensor saved now comes back as another one than it is."""
    with torch.enable_grad():
        y = torch.randn(64, 64, requires_grad=True).exp()
    assert y.grad_fn is not None
    return not torch.equal(y.grad_fn._saved_result, y)  # type: ignore[attr-defined]


def test_hooks_are_taken_away_when_a_forward_raises() -> None:
    model = Failing()
    loop = models.attached(model, block_of(exclude=["inner"]))
    plugin = loop.session.compression
    for _ in range(2):
        with pytest.raises(KeyError):
            model(torch.randn(8, 64))
        assert not hooks_are_set()
    model.fails = False
    y = model(torch.randn(8, 64))
    assert plugin.summary()["activations"]["packed"] == 1
    assert plugin._saving.excluded == 0
    assert not hooks_are_set()
    y.sum().backward()
    loop.close()
    assert not model._forward_hooks
    assert not model.inner._forward_hooks


def test_a_listener_that_fails_leaves_no_hooks_behind() -> None:
    model = Transformer()
    loop = models.attached(model, block_of())

    def fail(_moment: Any) -> None:
        raise ValueError("another plugin")

    loop.session.hooks.on(Event.BEFORE_FORWARD, fail, plugin="other", order=5)
    with pytest.raises(PluginError):
        model(*batch(0))
    assert not hooks_are_set()
    with pytest.raises(PluginError):  # as DeepSpeed's host does it, before the model is called
        loop.session.fire(Event.BEFORE_FORWARD, model=model, training=True)
    assert not hooks_are_set()
    loop.close()


def test_only_training_is_compressed() -> None:
    model = Transformer()
    loop = models.attached(model, block_of())
    seen: list[bool] = []
    model.norm.register_forward_hook(lambda *_: seen.append(hooks_are_set()))
    model.eval()
    model(*batch(0)).backward()
    model.train()
    with torch.no_grad():
        model(*batch(0))
    assert "packed" not in loop.session.compression.summary()["activations"]
    model(*batch(0)).backward()
    packed = loop.session.compression.summary()["activations"]["packed"]
    assert packed > 10
    assert seen == [False, False, True]
    with torch.no_grad():
        model(*batch(0))
    assert loop.session.compression.summary()["activations"]["packed"] == packed
    loop.close()


def test_an_evaluation_inside_a_forward_does_not_end_it() -> None:
    model = Transformer()
    loop = models.attached(model, block_of())
    fire = loop.session.fire
    seen: list[bool] = []

    def evaluate(*_: Any) -> None:
        fire(Event.BEFORE_FORWARD, model=model, training=False)
        fire(Event.AFTER_FORWARD, model=model, training=False)
        seen.append(hooks_are_set())

    model.norm.register_forward_hook(evaluate)
    model(*batch(0)).backward()
    assert seen == [True]
    assert not hooks_are_set()
    loop.close()


def test_copies_of_a_watched_model_are_not_watched() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    failed: list[int] = []
    saving = Saving(ActivationsConfig().quantiser(), 0)
    watched = _Watched(model, ("0",), saving, lambda: failed.append(1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(torch.ones(2, 8)), model(torch.ones(2, 8)))
        with pytest.raises(RuntimeError, match="shapes"):
            other(torch.ones(2, 9))
    assert saving.excluded == 0
    assert not failed
    watched.close()


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = self.layer(x).tanh()
        return self(x, depth - 1).sin() if depth else x


def test_a_model_may_call_itself() -> None:
    model = Recursive()
    loop = models.attached(model, block_of())
    y = model(torch.randn(16, 64, requires_grad=True))
    assert loop.session.compression.summary()["activations"]["packed"] == 5
    assert not hooks_are_set()
    loop.backward(y.sum())
    loop.close()


def test_modules_can_be_excluded(caplog: pytest.LogCaptureFixture) -> None:
    model = Transformer()
    loop = models.attached(model, block_of(exclude=["blocks.*.up", "blocks.1", "no.such*"]))
    with caplog.at_level(logging.WARNING, logger="lowtide"):
        loop.backward(model(*batch(0)))
    assert 'no module here is named "no.such*"' in caplog.text
    assert "blocks.1" not in caplog.text
    facts = loop.session.compression.summary()["activations"]
    # All of one block; and of the other the input of `up`.
    assert facts["raw_bytes"]["excluded"] > facts["saved_bytes"] / 3
    loop.close()
    alone = models.attached(model, block_of(exclude=["blocks.0.up"]))
    alone.backward(model(*batch(0)))
    facts = alone.session.compression.summary()["activations"]
    assert facts["raw"]["excluded"] == 1
    assert facts["raw_bytes"]["excluded"] == 8 * models.LENGTH * 32 * 4
    alone.close()


def test_two_sessions_take_turns() -> None:
    loops = [models.attached(Transformer(), block_of(bits=bits)) for bits in (2, 8)]
    losses = [loop.model(*batch(0)) for loop in loops]
    for loop, loss in zip(loops, losses, strict=True):
        loop.backward(loss)
        assert loop.session.compression.summary()["activations"]["live_bytes"] == 0
        loop.close()
    assert not hooks_are_set()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["inside", "whole"])
def test_what_compiled_code_saves_is_left_alone(way: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Compiled()
    x = torch.randn(16, 64)
    model(x).sum().backward()
    expected = [each.grad for each in model.compiled.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    if way == "inside":
        model.compiled.compile(backend="aot_eager", fullgraph=True)
    else:
        model.compile(backend="aot_eager")
    loop = models.attached(model, block_of(bits=2))
    with caplog.at_level(logging.WARNING, logger="lowtide"):
        for _ in range(2):
            model.zero_grad()
            loop.backward(model(x).sum())
    found = [each.grad for each in model.compiled.parameters()]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert caplog.text.count("compiled code") == 1
    assert loop.session.compression.summary()["activations"]["raw"]["compiled"] > 0
    assert not hooks_are_set()
    loop.close()


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.compiled = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        self.plain = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x) + F.gelu(self.plain(x))


def test_saved_tensor_hooks_of_a_script_around_the_model_are_restored() -> None:
    model = Transformer()
    loop = models.attached(model, block_of())
    theirs: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        theirs.append(1)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*batch(0))
        assert not theirs
        (loss * torch.ones(3, requires_grad=True)).sum().backward()
    assert theirs
    loop.close()
