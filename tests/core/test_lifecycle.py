"""Events reach plugins in an explicit order; failures are named; closing leaves nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lowtide.core.config import PluginConfig
from lowtide.core.errors import ConfigError, LowtideError, PluginError
from lowtide.core.lifecycle import Event, Hooks, Moment, Plugin, Session
from lowtide.core.registry import plugins


class Silent(Plugin):
    """A plugin that listens to nothing."""

    name = "silent"
    Config = PluginConfig

    def attach(self, session: Session) -> None:
        del session


def test_listeners_run_by_order_then_by_subscription() -> None:
    hooks = Hooks()
    for plugin, order in [("late", 10), ("first", 0), ("second", 0), ("early", -5)]:
        hooks.on(Event.BEFORE_UPDATE, lambda moment: None, plugin=plugin, order=order)
    names = [s.plugin for s in hooks.listeners(Event.BEFORE_UPDATE)]
    assert names == ["early", "first", "second", "late"]
    assert hooks.describe() == ["before_update: early(-5), first(0), second(0), late(10)"]
    hooks.off("first")
    assert hooks.describe() == ["before_update: early(-5), second(0), late(10)"]
    for plugin in ("early", "second", "late"):
        hooks.off(plugin)
    assert hooks.describe() == []


def test_closed_runs_in_reverse_order_even_when_one_fails() -> None:
    session = Session.open({}, host="test")
    calls: list[str] = []

    def listen(name: str, *, fails: bool = False) -> None:
        def listener(moment: Moment) -> None:
            calls.append(name)
            if fails:
                raise ValueError("broken pipe")

        session.hooks.on(Event.CLOSED, listener, plugin=name)

    listen("a")
    listen("b", fails=True)
    listen("c")
    with pytest.raises(PluginError, match='plugin "b" failed in closed: broken pipe') as caught:
        session.close()
    assert calls == ["c", "b", "a"]
    assert isinstance(caught.value.__cause__, ValueError)
    session.close()
    assert calls == ["c", "b", "a"]


def test_model_built_may_replace_the_model() -> None:
    session = Session.open({}, host="test")

    def replace(moment: Moment) -> None:
        moment.model = f"sharded {moment.model}"

    session.hooks.on(Event.MODEL_BUILT, replace, plugin="tp")
    assert session.fire(Event.MODEL_BUILT, model="model").model == "sharded model"


def test_failing_listener_is_named_with_its_event(probe: Any) -> None:
    session = Session.open({"probe": {"fail_in": "before_update"}}, host="test")
    with pytest.raises(PluginError, match='plugin "probe" failed in before_update: asked to fail'):
        session.before_update()


def test_step_is_counted_and_skips_are_told(probe: Any) -> None:
    session = Session.open({"probe": {}}, host="test")
    for applied in (True, False):
        session.before_update()
        session.after_update(applied=applied)
    assert session.step == 2
    assert session.probe.seen == [
        ("configured", 0),
        ("before_update", 0),
        ("after_update", 1),
        ("before_update", 1),
        ("after_update", 2),
    ]
    assert [d["applied"] for d in session.probe.data if d] == [True, False]
    assert session.report()["telemetry"]["counters"] == {"lowtide.core.skipped_updates_count": 1}
    assert session.report()["plugins"] == {"probe": {"events_count": 5}}


def test_attach_failure_detaches_what_was_attached(probe: Any) -> None:
    class Broken(Silent):
        name = "broken"

        def attach(self, session: Session) -> None:
            raise RuntimeError("no memory")

    plugins.register("broken", Broken)
    try:
        with pytest.raises(PluginError, match='plugin "broken" failed in attach: no memory'):
            Session.open({"probe": {"has_thread": True}, "broken": {}}, host="test")
    finally:
        plugins.unregister("broken")
    assert "lowtide-probe" not in [thread.name for thread in threading.enumerate()]


def test_active_plugins_and_order_are_told_once_at_start(
    probe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    Session.open({"probe": {"order": 7}}, host="test").close()
    Session.open({"probe": {"order": 7}}, host="test", rank=1, world_size=2).close()
    lines = [r.message for r in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("host test, active: probe; order: configured: probe(7); ")


def test_close_leaves_no_listener_and_no_thread(probe: Any) -> None:
    before = threading.active_count()
    session = Session.open({"probe": {"has_thread": True}}, host="test")
    assert threading.active_count() == before + 1
    session.close()
    assert threading.active_count() == before
    assert session.hooks.describe() == []


def test_asking_for_an_inactive_plugin_says_how_to_switch_it_on(probe: Any) -> None:
    session = Session.open({"probe": {}}, host="test")
    with pytest.raises(AttributeError, match=r'"checkpoint"; active in this run: "probe"'):
        _ = session.checkpoint


def test_plugin_without_a_config_model_is_refused() -> None:
    class Bare(Silent):
        name = "bare"
        Config = dict  # type: ignore[assignment]

    plugins.register("bare", Bare)
    try:
        with pytest.raises((ConfigError, LowtideError), match="no attribute Config"):
            Session.open({"bare": {}}, host="test")
    finally:
        plugins.unregister("bare")
