"""The evaluation key in a plain loop: schedule, scalars, and a run that is as without it."""

from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.core.config import resolve
from lowtide.core.errors import ConfigError, DataError
from lowtide.core.lifecycle import Session
from lowtide.evaluation import RowFile, figures, load_suite, read_rows, run
from lowtide.evaluation.training.preserving import as_it_was
from lowtide.evaluation.training.schedule import Schedule
from lowtide.hosts import torch_loop
from tests.evaluation.fakes import byte_model
from tests.evaluation.training.models import Bytes, batch, decode, encode, write_suite
from tests.helpers.plugin_suite import check_plugin


def attached(block: dict[str, Any] | None, model: Any = None, **lowtide: Any) -> Any:
    torch.manual_seed(0)
    model = model or Bytes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    blocks = {} if block is None else {"evaluation": block}
    return torch_loop.attach(model, optimizer, config={"lowtide": {**blocks, **lowtide}})


def train(loop: Any, steps: int) -> list[Any]:
    seen = []
    for step in range(steps):
        loss = loop.model(*batch(step))
        loop.optimizer.zero_grad()
        loop.backward(loss)
        loop.optimizer.step()
        seen.append((loss.item(), random.random(), float(np.random.rand()), float(torch.rand(1))))
    return seen


def test_conformance(tmp_path: Path) -> None:
    suite = str(write_suite(tmp_path))
    check_plugin("evaluation", {"suite": suite, "every_n_steps": 1000}, is_exact=True)


def test_a_run_is_bit_for_bit_as_without(tmp_path: Path) -> None:
    def seeded(block: dict[str, Any] | None) -> tuple[list[Any], list[bool], int]:
        random.seed(1)
        np.random.seed(2)
        loop = attached(block)
        found = train(loop, 9)
        modes = [each.training for each in loop.model.modules()]
        count = 0 if block is None else loop.session.evaluation.summary()["evaluations"]
        loop.close()
        return found, modes, count

    stock, modes, _ = seeded(None)
    suite = str(write_suite(tmp_path))
    found, same_modes, count = seeded({"suite": suite, "every_n_steps": 2})
    assert found == stock
    assert same_modes == modes
    assert False in modes
    assert True in modes
    assert count == 4


def test_figures_are_those_of_a_run_by_hand(tmp_path: Path) -> None:
    suite = write_suite(tmp_path, with_texts=True)
    loop = attached({"suite": str(suite), "every_n_steps": 3, "best_metric": "held_out/loss"})
    loop.session.evaluation.use(encode=encode, decode=decode)
    train(loop, 6)
    said = loop.session.evaluation.summary()
    loop.model.eval()
    with RowFile(tmp_path / "rows.jsonl") as rows:
        run(load_suite(suite), byte_model(loop.model), rows)
    expected = {
        f"{each.task}/{each.metric}": each.interval.estimate
        for each in figures(read_rows(tmp_path / "rows.jsonl"), resamples=100)
    }
    assert said["last"] == pytest.approx(expected)
    assert {"held_out/bits_per_byte", "mcq/accuracy", "open/correct"} <= set(expected)
    assert said["best"]["metric"] == "held_out/loss"
    assert said["best"]["step"] == 6  # it learns
    assert said["best"]["value"] == said["last"]["held_out/loss"]
    assert said["evaluations"] == 2
    assert said["spent_s"] > 0
    loop.close()


def test_scalars_go_to_telemetry(tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    loop = attached(
        {"suite": str(suite), "every_n_steps": 2, "max_items": 5},
        telemetry={"dir": str(tmp_path / "telemetry")},
    )
    train(loop, 5)
    loop.close()
    lines = (tmp_path / "telemetry" / "rank0.jsonl").read_text().splitlines()
    scalars = [r for r in map(json.loads, lines) if r["kind"] == "scalar"]
    names = {"bits_per_byte", "loss", "perplexity"}
    assert {r["name"] for r in scalars} == {f"evaluation/held_out/{name}" for name in names}
    assert sorted({r["step"] for r in scalars}) == [2, 4]
    losses = [r["value"] for r in scalars if r["name"] == "evaluation/held_out/loss"]
    assert losses[1] < losses[0] < math.log(256) + 0.1


def draw_and_fail(model: Bytes, seen: list[bool]) -> None:
    seen += [each.training for each in model.modules()]
    seen.append(torch.is_grad_enabled())
    torch.rand(3)
    random.random()
    raise KeyError


def test_gradients_modes_and_random_numbers_come_back_after_an_error() -> None:
    model = Bytes()
    modes = [each.training for each in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    seen: list[bool] = []
    with pytest.raises(KeyError), as_it_was(model):
        draw_and_fail(model, seen)
    assert seen
    assert not any(seen)
    assert [each.training for each in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_the_schedule_keeps_its_budget() -> None:
    now = [0.0]
    schedule = Schedule(10, 0.1, clock=lambda: now[0])
    taken = []
    for step in range(1, 101):
        now[0] += 1.0
        if schedule.is_due(step) and schedule.has_time():
            taken.append(step)
            now[0] += 4.0
            schedule.took(4.0)
            assert schedule.spent_s <= 0.1 * now[0] + 4.0 * (len(taken) == 1)
    assert taken[0] == 10
    assert 2 <= len(taken) < 10
    assert schedule.spent_s <= 0.1 * now[0]
    free = Schedule(10, None, clock=lambda: now[0])
    assert [step for step in range(31) if free.is_due(step) and free.has_time()] == [10, 20, 30]


def test_evaluations_without_time_are_left_out_and_counted(tmp_path: Path) -> None:
    suite = str(write_suite(tmp_path))
    loop = attached({"suite": suite, "every_n_steps": 1, "budget_fraction": 1e-6})
    train(loop, 4)
    said = loop.session.evaluation.summary()
    assert (said["evaluations"], said["left_out"]) == (1, 3)
    assert set(loop.session.evaluation.evaluate()) >= {"held_out/loss"}
    loop.close()


def test_what_cannot_be_evaluated_is_said_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suite = str(write_suite(tmp_path, with_texts=True))
    loop = attached({"suite": suite, "every_n_steps": 2})
    with caplog.at_level(logging.WARNING, logger="lowtide"):
        train(loop, 4)
    assert caplog.text.count('task "mcq": model "training": has no encode') == 1
    said = loop.session.evaluation.summary()
    assert said["failures"] == 2
    assert "held_out/loss" in said["last"]
    loop.close()
    loop = attached({"suite": suite, "every_n_steps": 2, "on_error": "raise"})
    with pytest.raises(DataError, match="has no encode"):
        train(loop, 2)
    loop.close()


class Scalar(Bytes):
    def forward(self, tokens_BT: Any, targets_BT: Any = None) -> Any:
        if targets_BT is None:
            raise TypeError("targets, please")
        return super().forward(tokens_BT, targets_BT)


def test_a_model_that_is_called_otherwise_is_registered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suite = str(write_suite(tmp_path))
    loop = attached({"suite": suite, "every_n_steps": 1}, Scalar())
    with caplog.at_level(logging.WARNING, logger="lowtide"):
        train(loop, 1)
    assert "use(logits=...)" in caplog.text
    model = loop.model
    loop.session.evaluation.use(logits=lambda tokens: Bytes.forward(model, tokens))
    assert loop.session.evaluation.evaluate()["held_out/loss"] > 0
    loop.session.evaluation.use(logits=lambda tokens: model(tokens, tokens))
    with caplog.at_level(logging.WARNING, logger="lowtide"):
        assert loop.session.evaluation.evaluate() == {}
    assert "logits: got ()" in caplog.text
    loop.close()


def test_a_best_metric_that_is_none_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suite = str(write_suite(tmp_path))
    loop = attached({"suite": suite, "every_n_steps": 1, "best_metric": "held_out/los"})
    with caplog.at_level(logging.WARNING, logger="lowtide"):
        train(loop, 1)
    assert 'Did you mean "held_out/loss"' in caplog.text
    assert loop.session.evaluation.summary()["best"] is None
    loop.close()


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({}, "lowtide.evaluation.suite: missing"),
        ({"suite": "s", "every_steps": 2}, 'Did you mean "every_n_steps"'),
        ({"suite": "s", "every_n_steps": 0}, "lowtide.evaluation.every_n_steps"),
        ({"suite": "s", "max_items": 0}, "lowtide.evaluation.max_items"),
        ({"suite": "s", "budget_fraction": 1.5}, "lowtide.evaluation.budget_fraction"),
        ({"suite": "s", "best_metric": "loss"}, "lowtide.evaluation.best_metric"),
        ({"suite": "s", "on_error": "ignore"}, "lowtide.evaluation.on_error"),
        ({"suite": "s", "seed": -1}, "lowtide.evaluation.seed"),
    ],
)
def test_wrong_settings_are_named(block: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"evaluation": block})
    assert said in str(caught.value)


def test_suites_that_cannot_be_used_end_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lowtide.evaluation.suite: .*cannot be read"):
        attached({"suite": str(tmp_path / "none.json")})
    suite = write_suite(tmp_path)
    with pytest.raises(ConfigError, match=r'best_metric: .*no task "held"'):
        attached({"suite": str(suite), "best_metric": "held/loss"})
    (tmp_path / "held_out.txt").unlink()
    with pytest.raises(ConfigError, match=r"lowtide.evaluation.suite: .*held_out.txt"):
        attached({"suite": str(suite)})
    assert resolve({"evaluation": {"enabled": False}}).plugins == {}


def test_hosts_that_call_models_otherwise_are_refused(tmp_path: Path) -> None:
    block = {"evaluation": {"suite": str(write_suite(tmp_path))}}
    with pytest.raises(ConfigError, match='host "megatron" calls models in a way of its own'):
        Session.open(block, host="megatron")
