"""The quality key: settings, what is looked at, what is told, and that a run is not changed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.core.config import resolve
from lowtide.core.errors import CodecError, ConfigError
from lowtide.core.state import Location
from lowtide.hosts import torch_loop
from lowtide.quality import plugin as plugin_module
from lowtide.quality import select
from lowtide.quality.ledger import Ledger
from tests.helpers.plugin_suite import assert_no_hooks, check_plugin
from tests.quality.models import TARGET, Net, block_of


def _train(block: dict[str, Any] | None, steps: int = 6, stop: Any = None) -> Any:
    """Return losses, state of random numbers and the closed loop."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loop = torch_loop.attach(model, optimizer, config={"lowtide": block or {}})
    losses = []
    for _ in range(steps):
        loss = loop.model(torch.randn(64, 64))
        optimizer.zero_grad()
        loop.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        if stop is not None:
            stop(loop)
    loop.close()
    assert_no_hooks(model, optimizer)
    return losses, torch.get_rng_state(), loop


def _kinds(loop: Any) -> dict[str, Any]:
    found: dict[str, Any] = loop.session.report()["plugins"]["quality"]["kinds"]
    return found


def test_conformance() -> None:
    sample = {"every_n_steps": 1, "min_bytes": 1}
    check_plugin("quality", {"target": {"psnr_db": 60}, "sample": sample}, is_exact=True)


def test_a_run_is_the_same_with_and_without_it() -> None:
    stock = _train(None)
    found = _train(block_of(sample={"every_n_steps": 1}))
    assert found[0] == stock[0]
    assert torch.equal(found[1], stock[1])
    assert set(_kinds(found[2])) == {"parameters", "gradients", "moments", "activations"}


def test_every_kind_is_looked_at_and_meets_the_target(tmp_path: Path) -> None:
    block = block_of() | {"telemetry": {"dir": str(tmp_path)}}
    _, _, loop = _train(block)
    kinds = _kinds(loop)
    # Steps 2, 4 and 6; two of each kind.
    assert {kind: totals["tensors"] for kind, totals in kinds.items()} == dict.fromkeys(kinds, 6)
    lines = map(json.loads, (tmp_path / "rank0.jsonl").read_text().splitlines())
    records = [line for line in lines if line["kind"] == "decision"]
    assert len(records) == 24
    assert {record["step"] for record in records} == {2, 4, 6}
    for record in records:
        assert record["plugin"] == "quality"
        assert record["compression_ratio"] >= 1
        if record["measured"] is not None:
            psnr = record["measured"]["metrics"]["psnr_db"]
            assert psnr is None or psnr >= 50
    for kind, totals in kinds.items():
        assert totals["compression_ratio"] == totals["raw_bytes"] / totals["stored_bytes"] > 1.5
        assert totals["lowest_ratio"] <= totals["compression_ratio"] <= totals["highest_ratio"]
        assert totals["newest_step"] == 6, kind
    telemetry = loop.session.telemetry.snapshot()
    assert telemetry["counters"]["lowtide.quality.decisions_count"] == 24
    measured = sum(totals["measurements"] for totals in kinds.values())
    assert telemetry["counters"]["lowtide.quality.measurements_count"] == measured
    gauge = telemetry["gauges"]["lowtide.quality.moments_ratio"]
    assert gauge == kinds["moments"]["compression_ratio"]


def test_what_is_found_is_what_select_finds() -> None:
    kept = {}

    def keep(loop: Any) -> None:
        if loop.session.step == 2:
            kept.update({n: p.detach().clone() for n, p in loop.model.named_parameters()})

    block = block_of(applies_to=["parameters"], predictor=None)
    _, _, loop = _train(block, 2, keep)
    newest = loop.session.quality.newest("parameters")
    assert set(newest) == {"layers.#.weight"}  # biases and the norm are too small
    record = newest["layers.#.weight"]
    found = select(kept[record["tensor"]], TARGET)
    assert record["codec"] == found.candidate.config()
    assert record["compression_ratio"] == found.ratio


def test_later_looks_take_fewer_measurements() -> None:
    block = block_of(applies_to=["parameters"], sample={"every_n_steps": 1}, target={"ssim": 0.99})
    _, _, loop = _train(block, 5)
    later = _kinds(loop)["parameters"]
    # Noise: of tensors of one role, about every second needs a slightly tighter bound.
    assert later["decisions"]["predicted"] + later["decisions"].get("tightened", 0) >= 8
    _, _, loop = _train(block_of(applies_to=["parameters"], sample={"every_n_steps": 1},
                                 target={"ssim": 0.99}, predictor=None), 5)  # fmt: skip
    assert _kinds(loop)["parameters"]["measurements"] > 1.5 * later["measurements"]


def test_nothing_is_looked_at_between(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(plugin_module.sampling, "host_part", lambda *a: calls.append(a))
    _train(block_of(sample={"every_n_steps": 50}))
    assert calls == []


def test_only_the_first_forward_of_a_step_in_training_is_looked_at() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    block = block_of(applies_to=["activations"], sample={"every_n_steps": 1})
    loop = torch_loop.attach(model, optimizer, config={"lowtide": block})
    x = torch.randn(64, 64)
    model.eval()
    model(x)
    model.train()
    with torch.no_grad():
        model(x)
    assert loop.session.quality._waiting == []
    for _ in range(3):
        loop.backward(model(x))
    assert not model.layers[0]._forward_hooks
    names = [record["tensor"] for record in loop.session.quality._waiting]
    assert sorted(names) == ["layers.0", "layers.1", "norm"]
    optimizer.step()
    assert _kinds(loop)["activations"]["tensors"] == 3
    loop.close()


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_forward_that_raises_leaves_no_hook(goes_on: bool) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    block = block_of(applies_to=["activations"], sample={"every_n_steps": 1})
    loop = torch_loop.attach(model, optimizer, config={"lowtide": block})
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(4, 5))
    if goes_on:
        model(torch.randn(64, 64))  # of the same step, which was looked at
        assert loop.session.quality._waiting == []
    loop.close()
    assert_no_hooks(model, optimizer)


def test_moments_that_another_plugin_holds_are_left_alone() -> None:
    def own(loop: Any) -> None:
        if not loop.session.state.keys():
            loop.session.state.register("subgroup/0", location=Location.DEVICE)

    _, _, loop = _train(block_of(applies_to=["moments"]), 4, own)
    assert _kinds(loop) == {}


def test_a_tensor_that_cannot_be_looked_at_is_counted_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise CodecError("no such type")

    monkeypatch.setattr(plugin_module, "select", fails)
    with caplog.at_level(logging.WARNING, "lowtide"):
        _, _, loop = _train(block_of(applies_to=["parameters"]))
    assert loop.session.report()["plugins"]["quality"]["failed"] == 6
    assert "quality: parameters layers" in caplog.text


def test_the_ledger_adds_up() -> None:
    ledger = Ledger()
    base = {"tensor_kind": "moments", "role": "a", "decision": "predicted", "measurements": 1,
            "elapsed_s": 0.5, "step": 3, "codec": {"id": "lowtide.sz", "bound": 0.1}}  # fmt: skip
    ledger.add(base | {"raw_bytes": 100, "stored_bytes": 10, "compression_ratio": 10.0})
    ledger.add(
        base | {"raw_bytes": 100, "stored_bytes": 100, "compression_ratio": 1.0, "codec": None,
                "decision": "uncompressed", "step": 6}
    )  # fmt: skip
    found = ledger.as_dict()["moments"]
    assert found["compression_ratio"] == 200 / 110
    assert (found["lowest_ratio"], found["highest_ratio"]) == (1.0, 10.0)
    assert found["codecs"] == {"lowtide.sz": 1, "none": 1}
    assert (found["median_bound"], found["elapsed_s"], found["newest_step"]) == (0.1, 1.0, 6)
    assert ledger.newest("moments")["a"]["decision"] == "uncompressed"
    assert ledger.newest("gradients") == {}


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({}, "lowtide.quality.target: missing"),
        ({"target": {}}, "target: is empty"),
        ({"target": {"psnr": 60}}, 'target.psnr: unknown metric "psnr". Did you mean "psnr_db"'),
        ({"target": {"ssim": 2}}, "target.ssim.value: got 2 for ssim, which is 1 at most"),
        ({"target": [{"metric": "ssim", "value": 0.9}, {"metric": "ssim", "value": 0.8}]},
         "target[1]: ssim >= 0.8 and ssim >= 0.9 contradict each other"),
        ({"target": [{"metric": "psnr_db", "op": "<=", "value": 60}]}, "asks for a worse result"),
        ({"target": {"compression_ratio": 5}}, "needs a target for the quality"),
        ({"target": {"psnr_db": 60}, "objective": "psnr_db"}, "needs a target for the size"),
        ({"target": {"psnr_db": 60}, "candidates": []}, "candidates: is empty"),
        ({"target": {"psnr_db": 60}, "candidates": [{"codec": "lowtide.zs"}]},
         'candidates[0]: unknown codec "lowtide.zs". Did you mean "lowtide.zstd"'),
        ({"target": {"psnr_db": 60}, "candidates": [
            {"codec": "lowtide.sz", "mode": "rel", "bounds": [0.0]}]},
         "candidates[0].bounds: got 0.0, allowed are positive"),
        ({"target": {"psnr_db": 60}, "applies_to": []}, "lowtide.quality.applies_to"),
        ({"target": {"psnr_db": 60}, "applies_to": ["datasets"]}, "lowtide.quality.applies_to"),
        ({"target": {"psnr_db": 60}, "sample": {"every_n_step": 1}}, 'mean "every_n_steps"'),
        ({"target": {"psnr_db": 60}, "sample": {"every_n_steps": 0}}, "quality.sample.every_n"),
        ({"target": {"psnr_db": 60}, "predictor": "tree"}, "lowtide.quality.predictor"),
        ({"target": {"psnr_db": 60}, "seed": -1}, "lowtide.quality.seed"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(block: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"quality": block})
    assert expected in str(caught.value)


def test_listed_targets_and_candidates_are_taken() -> None:
    listed = [{"codec": "lowtide.sz", "mode": "rel", "bounds": [1e-3, 1e-2]}]
    target = [{"metric": "psnr_db", "op": ">=", "value": 50}]
    block = block_of(applies_to=["parameters"], candidates=listed, target=target)
    _, _, loop = _train(block, 2)
    (record,) = loop.session.quality.newest("parameters").values()
    assert record["codec"] == {"id": "lowtide.sz", "mode": "rel", "bound": 1e-3}
    assert loop.session.report()["plugins"]["quality"]["target"] == ["psnr_db >= 50"]
    assert resolve({"quality": {"enabled": False, "target": {"no": 1}}}).plugins == {}
