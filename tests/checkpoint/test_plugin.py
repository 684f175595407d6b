"""The plugin in a plain loop, its settings, and the parts that decide when and what to save."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint import list_checkpoints, verify
from lowtide.checkpoint.adapters.deepspeed import DeepSpeedAdapter
from lowtide.checkpoint.board import Board
from lowtide.checkpoint.config import CheckpointConfig
from lowtide.checkpoint.costs import Costs
from lowtide.checkpoint.interval import FIRST_STEP, Interval, best_interval_s, level_interval_s
from lowtide.checkpoint.ledger import Ledger
from lowtide.checkpoint.saving import Level, Saving
from lowtide.checkpoint.stable import StableMemory
from lowtide.core.config import resolve
from lowtide.core.errors import CheckpointError, ConfigError
from lowtide.core.lifecycle import Event
from lowtide.core.state import Location
from lowtide.core.telemetry import Telemetry, TelemetryConfig
from lowtide.hosts import torch_loop
from tests.helpers.plugin_suite import check_plugin

MIB = 1 << 20
SMALL = {"host_buffer_bytes": 16 * MIB}


class Engine:
    """As much of a DeepSpeed engine as the adapter looks at."""

    optimizer: Any = None


class Loop:
    """A small model that trains itself."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        config = {"lowtide": {"checkpoint": {**SMALL, **settings}}}
        self.loop = torch_loop.attach(self.model, self.optimizer, config=config)

    @property
    def checkpoint(self) -> Any:
        return self.loop.session.checkpoint

    def steps(self, count: int) -> None:
        for _ in range(count):
            loss = self.model(torch.randn(4, 8)).square().mean()
            self.optimizer.zero_grad()
            self.loop.backward(loss)
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


@pytest.mark.parametrize("native", ["1", "0"])
def test_conformance(monkeypatch: Any, native: str) -> None:
    monkeypatch.setenv("LOWTIDE_NATIVE", native)
    check_plugin("checkpoint", SMALL, is_exact=True)


def test_state_of_the_save_is_kept_while_training_goes_on(tmp_path: Path) -> None:
    run = Loop()
    run.steps(3)
    weights = [p.detach().clone() for p in run.model.parameters()]
    moments = [s["exp_avg"].clone() for s in run.optimizer.state.values()]
    run.checkpoint.save(tmp_path, {"state.pt": run.state()})
    run.steps(3)
    assert run.checkpoint.wait("committed", 30)
    run.loop.close()
    loaded = torch.load(tmp_path / "step3" / "state.pt")
    for kept, expected in zip(loaded["model"].values(), weights, strict=True):
        assert torch.equal(kept, expected)
    for kept, expected in zip(loaded["optimizer"]["state"].values(), moments, strict=True):
        assert torch.equal(kept["exp_avg"], expected)
    assert verify(tmp_path / "step3").is_ok


def test_optimizer_state_and_weights_are_not_copied_at_the_save(tmp_path: Path) -> None:
    run = Loop()
    run.steps(2)
    run.checkpoint.save(tmp_path, {"state.pt": run.state()})
    run.loop.close()
    counters = run.loop.session.telemetry.snapshot()["counters"]
    # Adam's step counters are the only tensors that are small enough to be worth nothing lazy.
    state_bytes = sum(p.numel() * 12 for p in run.model.parameters())
    assert counters["lowtide.checkpoint.eager_bytes"] < state_bytes / 10
    assert counters["lowtide.checkpoint.written_bytes"] > state_bytes


def test_saves_by_itself(tmp_path: Path) -> None:
    run = Loop(every_n_steps=2, keep=2, tiers=[{"path": str(tmp_path)}])
    run.checkpoint.client_state = lambda: {"note": "mine"}
    run.steps(7)
    run.loop.close()
    assert [entry.tag for entry in list_checkpoints(tmp_path)] == ["step6", "step4"]
    loaded = torch.load(tmp_path / "step6" / "rank0.pt")
    assert (loaded["step"], loaded["extra"]) == (6, {"note": "mine"})


@pytest.mark.parametrize(
    ("failures_s", "steps"), [(1e-9, [10, 20, 21, 22, 23, 24]), (1e12, [10, 20])]
)
def test_saves_by_itself_as_often_as_loses_least_time(
    tmp_path: Path, failures_s: float, steps: list[int]
) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    run = Loop(
        every_n_steps="auto",
        mean_time_between_failures_s=failures_s,
        tiers=[{"path": str(fast)}, {"path": str(slow), "every": "auto"}],
    )
    run.steps(12)
    assert run.checkpoint.wait("drained", 30)
    run.steps(12)
    run.loop.close()
    assert sorted(entry.step or 0 for entry in list_checkpoints(fast)) == steps
    assert "step10" in [entry.tag for entry in list_checkpoints(slow)]
    (interval_s,) = run.checkpoint.summary()["level_intervals_s"].values()
    assert interval_s > 0


def test_status_and_summary_tell_what_happened(tmp_path: Path) -> None:
    run = Loop()
    run.steps(1)
    assert run.checkpoint.status() == []
    run.checkpoint.save(tmp_path, {"state.pt": run.state()}, tag="first")
    run.checkpoint.wait("drained", 30)
    (status,) = run.checkpoint.status()
    assert (status["tag"], status["stage"], status["error"]) == ("first", "drained", None)
    assert status["bytes"] == status["written_bytes"] > 1000
    assert list(status["after_s"]) == ["requested", "captured", "durable", "committed", "drained"]
    summary = run.checkpoint.summary()
    assert (summary["requested"], summary["committed"], summary["failed"]) == (1, 1, 0)
    assert run.loop.session.report()["plugins"]["checkpoint"] == summary
    spans = run.loop.session.telemetry.snapshot()["spans"]
    assert spans["first"]["count"] == 4  # one on the lane of each stage
    run.loop.close()


def test_scrub_finds_damage_of_a_committed_checkpoint(tmp_path: Path, caplog: Any) -> None:
    run = Loop(scrub_every_s=0.02)
    run.steps(1)
    for tag in ("a", "b"):
        run.checkpoint.save(tmp_path, {"state.pt": run.state()}, tag=tag)
    run.checkpoint.wait("committed", 30)
    path = tmp_path / "a" / "state.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 16
    path.write_bytes(raw)
    end_s = time.monotonic() + 30
    while not run.checkpoint.summary()["damaged"] and time.monotonic() < end_s:
        time.sleep(0.02)
    found = run.checkpoint.summary()
    run.loop.close()
    assert list(found["damaged"]) == [str(tmp_path / "a")]
    assert "is damaged on its disk" in caplog.text
    assert not [t for t in threading.enumerate() if t.name.startswith("lowtide-checkpoint")]


def test_unknown_level_names_the_known_ones(tmp_path: Path) -> None:
    run = Loop()
    with pytest.raises(CheckpointError, match=r'level "stored".*captured, durable, committed'):
        run.checkpoint.wait("stored")
    run.loop.close()
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_elsewhere_is_brought_back_before_a_save(tmp_path: Path) -> None:
    run = Loop()
    run.steps(1)
    state, drained = run.loop.session.state, []

    def drain(keys: Any) -> None:
        drained.extend(keys)
        state.publish("moments", Location.HOST, 1)

    state.register("moments", drain=drain, location=Location.DEVICE, version=1)
    run.checkpoint.save(tmp_path, {"state.pt": run.state()})
    run.loop.close()
    assert drained == ["moments"]


@pytest.mark.parametrize("name", ["ZenFlowZeroOptimizer", "SuperOffloadOptimizer_Stage3"])
def test_nothing_is_lazy_with_optimizers_that_update_early(tmp_path: Path, name: str) -> None:
    run = Loop()
    run.steps(1)
    adapter = DeepSpeedAdapter(run.checkpoint, run.loop.session.state)
    engine = Engine()
    engine.optimizer = type(name, (), {})()
    adapter.after_engine(engine)
    run.checkpoint.save(tmp_path, {"state.pt": run.state()})
    run.loop.close()
    adapter.close()
    counters = run.loop.session.telemetry.snapshot()["counters"]
    state_bytes = sum(p.numel() * 12 for p in run.model.parameters())
    assert counters["lowtide.checkpoint.eager_bytes"] >= state_bytes


class Copying(Engine):
    """Copies its scripts beside the checkpoints as DeepSpeed does."""

    text = "print(1)" * 100
    room_bytes = 10_000

    def _copy_recovery_script(self, save_path: str) -> None:
        for name in ("zero_to_fp32.py", "zero_to_torch.py"):
            path = Path(save_path) / name
            path.write_text(self.text[: self.room_bytes])
            if self.room_bytes < len(self.text):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            path.chmod(0o755)


def test_scripts_beside_the_checkpoints_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    run = Loop()
    adapter = DeepSpeedAdapter(run.checkpoint, run.loop.session.state)
    engine: Any = Copying()
    adapter.after_engine(engine)
    engine.room_bytes = 100
    with pytest.raises(OSError, match="No space left"):  # no save is under way: as stock
        engine._copy_recovery_script(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    engine.room_bytes = 10_000
    engine._copy_recovery_script(str(tmp_path))
    paths = [tmp_path / name for name in ("zero_to_fp32.py", "zero_to_torch.py")]
    assert sorted(tmp_path.iterdir()) == paths
    assert [path.read_text() for path in paths] == [engine.text] * 2
    assert all(os.access(path, os.X_OK) for path in paths)
    before, engine.text, engine.room_bytes = engine.text, "print(2)" * 100, 100
    with pytest.raises(OSError, match="No space left"):
        engine._copy_recovery_script(str(tmp_path))
    assert [path.read_text() for path in paths] == [before] * 2
    engine.room_bytes = 10_000
    engine._copy_recovery_script(str(tmp_path))
    assert [path.read_text() for path in paths] == [engine.text] * 2
    adapter.close()
    run.loop.close()


def test_a_script_that_saves_by_itself_is_left_alone(tmp_path: Path) -> None:
    run = Loop()
    run.steps(1)
    run.loop.save(tmp_path / "own.pt", note=1)
    run.loop.session.fire(Event.BEFORE_SAVE, path=str(tmp_path), tag="own")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "file").write_text("of the script")
    run.loop.session.fire(Event.AFTER_SAVE, path=str(tmp_path), tag="own")
    run.loop.close()
    assert (tmp_path / "own" / "file").read_text() == "of the script"
    assert run.checkpoint.status() == []


def test_failure_is_told_and_forgotten_or_raised_as_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for on_error in ("warn", "raise"):
        run = Loop(on_error=on_error)
        run.steps(1)
        run.checkpoint.save(tmp_path / "file", {"state.pt": run.state()})
        run.steps(2)
        if on_error == "raise":
            with pytest.raises(CheckpointError, match="cannot be made"):
                run.checkpoint.wait("committed", 30)
        assert run.checkpoint.wait("committed", 30) is False
        assert "cannot be made" in str(run.checkpoint.last_error)
        run.checkpoint.save(tmp_path / on_error, {"state.pt": run.state()})
        assert run.checkpoint.wait("committed", 30) is True
        assert run.checkpoint.summary()["failed"] == 1
        run.loop.close()


def test_a_failure_is_raised_once_also_where_another_rank_has_told_it_first(
    tmp_path: Path,
) -> None:
    level = Level(number=0, folder=tmp_path)
    ledger = Ledger(Telemetry(TelemetryConfig()), None)
    for count in (1, 2):
        saving = Saving([level], tag="t", attempt=f"ab{count:014x}", step=count, details={})
        ledger.open(saving)
        saving.fail(CheckpointError(f"failure {count}"))
        if count == 1:
            ledger.take_unraised([saving.attempt])  # rank 0 knew before this one did
            ledger.settle()
            assert ledger.unraised == {}
    ledger.settle()
    assert ledger.unraised == {saving.attempt: "failure 2"}
    ledger.take_unraised([saving.attempt])
    assert ledger.unraised == {}


def test_a_failure_is_raised_also_when_that_of_a_newer_one_came_first(tmp_path: Path) -> None:
    run = Loop(on_error="raise")
    ledger = run.checkpoint._ledger
    level = Level(number=0, folder=tmp_path)
    savings = [
        Saving([level], tag="t", attempt=f"ab{count:014x}", step=count, details={})
        for count in range(4)
    ]
    for count in (3, 1, 0, 2):
        ledger.open(savings[count])
        savings[count].fail(CheckpointError(f"failure {count}"))
        if count != 1:
            with pytest.raises(CheckpointError) as caught:
                run.checkpoint.wait("committed", 1)
            told = [f"failure {each}" for each in ((1, 0) if count == 0 else (count,))]
            assert str(caught.value).splitlines() == told
    run.checkpoint.wait("committed", 1)
    run.loop.close()


def test_loop_that_is_dropped_ends_its_threads_and_its_model(tmp_path: Path) -> None:
    before = threading.active_count()
    run = Loop()
    run.steps(1)
    run.checkpoint.save(tmp_path, {"state.pt": run.state()})
    run.checkpoint.wait("committed", 30)
    model = weakref.ref(run.model)
    del run
    gc.collect()
    assert model() is None
    assert threading.active_count() == before


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"every_n_steps": 5}, r'"every_n_steps" needs to know where to save; add "tiers"'),
    ({"every_n_steps": 0, "tiers": [{"path": "a"}]}, "at least 1"),
    ({"every_n_steps": "always", "tiers": [{"path": "a"}]}, "every_n_steps"),
    ({"host_buffer_bytes": 1000}, r"16777216 \(16 MiB\)"),
    ({"tiers": [{"path": "a"}, {"path": "a/"}]}, "names one folder twice"),
    ({"tiers": [{"path": "a"}, {"path": "./b/../a"}]}, r"twice: a and ./b/../a are /.*/a"),
    ({"tiers": [{"path": ""}]}, r"tiers.0.path: got \"\""),
    ({"tiers": [{"path": "a", "keep": 0}]}, r"tiers.*keep.*got 0"),
    ({"tiers": [{"folder": "a"}]}, "folder"),
    ({"tiers": [{"path": "a", "every": 0}]}, '"every" is 0 at a; at least 1, or "auto"'),
    ({"tiers": [{"path": "a", "every": "auto"}]}, 'the first of "tiers", .* set "every_n_steps"'),
    ({"tier": []}, 'mean "tiers"'),
    ({"keep": 0}, "keep"),
    ({"on_error": "exit"}, "'warn' or 'raise'"),
    ({"verify": "half"}, "'full', 'fast' or 'off'"),
    ({"max_wait_s": 0}, "max_wait_s"),
]


@pytest.mark.parametrize(("settings", "text"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_settings_are_explained(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        resolve({"checkpoint": settings})


def test_tilde_in_a_level_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    (tier,) = CheckpointConfig.model_validate_json('{"tiers": [{"path": "~/ckpt"}]}').tiers
    assert tier.path == "/home/someone/ckpt"


@pytest.mark.parametrize(
    "rival", [{"checkpoint": {"writer": {"type": "fast"}}}, {"datastates_ckpt": {}}]
)
def test_deepspeeds_own_writers_are_refused(rival: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="only one can write checkpoints; remove one"):
        resolve({"checkpoint": {}}, host_config=rival)


# -- when ---------------------------------------------------------------------------------------


def test_best_interval_loses_least_time() -> None:
    cost_s, failures_s = 0.5, 3600.0

    def loss(interval_s: float) -> float:
        return cost_s / interval_s + interval_s / (2 * failures_s)

    best = best_interval_s(cost_s, failures_s)
    assert all(loss(best) <= loss(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def interval_of(every: int | str, costs: Costs, shares: dict[int, float]) -> Interval:
    """Return an interval with failures every hour."""
    return Interval(
        Board(), every_n_steps=every, between_failures_s=3600.0, costs=costs, shares=shares
    )


def measure(costs: Costs, level: int, duration_s: float, steps: int, took_s: float) -> None:
    """Let a checkpoint be on its way to `level` for some steps."""
    costs.begin(level)
    for step in range(steps):
        if step == steps - 1:
            costs.end(level, took_s)
        costs.add_step(duration_s)


def test_fixed_interval() -> None:
    interval = interval_of(3, Costs(), {})
    assert [step for step in range(1, 10) if interval.is_due(step)] == [3, 6, 9]


def test_auto_interval_follows_the_measured_cost() -> None:
    costs = Costs()
    interval = interval_of("auto", costs, {0: 1.0, 1: 0.25})
    due = next(step for step in range(1, 50) if interval.is_due(step))
    assert due == FIRST_STEP
    for _ in range(9):
        costs.add_step(0.1)
    interval.plan_next(due, [])
    measure(costs, 0, 0.3, 2, took_s=0.5)  # 0.4 s of stretch, to be added to what was blocked
    measure(costs, 1, 0.2, 4, took_s=0.9)  # 0.4 s, but only for every fourth one
    measure(costs, 2, 0.9, 1, took_s=0.9)  # has an interval of its own
    expected = round(best_interval_s(0.05 + 0.4 + 0.1, 3600.0) / 0.1)
    assert interval.best_steps([0.05]) == pytest.approx(expected, abs=1)
    interval.plan_next(20, [0.05])
    following = 20 + interval.best_steps([0.05])
    assert not interval.is_due(following - 1)
    assert interval.is_due(following)


def test_interval_of_a_level_follows_its_cost_and_waits_for_the_last_one() -> None:
    costs = Costs()
    assert level_interval_s(costs, 1, 100.0) == 0.0
    measure(costs, 1, 0.9, 1, took_s=3.0)
    assert level_interval_s(costs, 1, 100.0) == 3.0, "no step without it to compare with"
    costs.add_step(0.1)
    assert level_interval_s(costs, 1, 100.0) == pytest.approx(best_interval_s(0.8, 100.0))
    assert level_interval_s(costs, 1, 1.0) == 3.0
    assert level_interval_s(costs, 2, 100.0) == 0.0


def test_a_step_counts_for_the_slowest_level_that_was_worked_for_in_it() -> None:
    costs = Costs()
    costs.add_step(1.0)
    costs.begin(0)
    costs.end(0)  # within one step
    costs.add_step(1.5)
    costs.begin(0)
    costs.begin(1)
    costs.end(0)
    costs.add_step(3.0)
    costs.end(1)
    costs.add_step(3.0)
    costs.add_step(1.0)
    assert costs.stretch_s(0) == pytest.approx(0.25), "half a second at one of two saves"
    assert costs.stretch_s(1) == pytest.approx(4.0)
    assert costs.step_s() == 1.0


# -- what ---------------------------------------------------------------------------------------


def test_only_what_updates_change_is_stable() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    stable = StableMemory()
    stable.look_at(model, optimizer)
    for parameter in model.parameters():
        assert stable.covers(parameter)
        assert stable.covers(parameter.detach())
        assert stable.covers(optimizer.state[parameter]["exp_avg"])
        assert not stable.covers(parameter.detach().clone())
    for buffer in model.buffers():
        assert not stable.covers(buffer)
    size = sum(4 * p.numel() for p in model.parameters())
    assert 3 * size <= stable.expected_bytes() <= 3 * size + 100


def test_size_is_foreseen_before_adam_has_its_moments() -> None:
    model = torch.nn.Linear(100, 100)
    stable = StableMemory()
    stable.look_at(model, torch.optim.Adam(model.parameters()))
    assert stable.expected_bytes() >= 3 * 4 * 100 * 100
