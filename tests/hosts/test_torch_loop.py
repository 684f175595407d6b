"""The plain loop fires the same events, resumes, and leaves a model without hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.core.errors import ConfigError
from lowtide.hosts import torch_loop
from tests.helpers.plugin_suite import assert_no_hooks, check_plugin

BLOCK: dict[str, Any] = {"lowtide": {"probe": {}}}


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(loop: torch_loop.TorchLoop) -> float:
    loss: torch.Tensor = loop.model(torch.ones(3, 4)).square().mean()
    loop.optimizer.zero_grad()
    loop.backward(loss)
    loop.optimizer.step()
    return loss.item()


@pytest.mark.usefixtures("probe")
def test_events_come_in_order() -> None:
    loop = torch_loop.attach(*build(), config=BLOCK)
    step(loop)
    loop.close()
    assert [name for name, _ in loop.session.plugins["probe"].seen] == [  # type: ignore[attr-defined]
        "configured", "model_built", "optimizer_built", "before_forward", "after_forward",
        "after_backward", "before_update", "after_update", "after_step", "closed",
    ]  # fmt: skip
    spans = loop.session.telemetry.snapshot()["spans"]
    assert {name: span["count"] for name, span in spans.items()} == {
        "forward": 1,
        "backward": 1,
        "update": 1,
    }
    assert_no_hooks(loop.model, loop.optimizer)


@pytest.mark.usefixtures("probe")
def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    loop = torch_loop.attach(*build(), config=BLOCK)
    losses = [step(loop) for _ in range(6)]
    loop.close()
    loop = torch_loop.attach(*build(), config=BLOCK)
    first = [step(loop) for _ in range(3)]
    loop.save(tmp_path / "state.pt", note="half")
    loop.close()
    loop = torch_loop.attach(*build(), config=BLOCK)
    assert loop.load(tmp_path / "state.pt") == {"note": "half"}
    assert loop.session.step == 3
    assert first + [step(loop) for _ in range(3)] == losses
    loop.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "state.pt"]


def test_missing_block_is_an_error_that_says_what_to_add() -> None:
    with pytest.raises(ConfigError, match='no "lowtide" block; add one'):
        torch_loop.attach(*build(), config={})


@pytest.mark.usefixtures("probe")
def test_probe_passes_the_plugin_conformance_suite() -> None:
    check_plugin("probe", {"order": 3, "has_thread": True}, is_exact=True)


def test_conformance_suite_catches_a_plugin_that_leaks(
    probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "detach", lambda self: None)
    leaked: list[Any] = []
    monkeypatch.setattr(probe, "__del__", lambda self: None, raising=False)
    original = probe.attach

    def attach(self: Any, session: Any) -> None:
        leaked.append(self)
        original(self, session)

    monkeypatch.setattr(probe, "attach", attach)
    with pytest.raises(AssertionError, match="left a thread"):
        check_plugin("probe", {"has_thread": True}, is_exact=True)
    for plugin in leaked:
        plugin._stop.set()
