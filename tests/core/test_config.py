"""The block is found, validated and explained; every error text is one line that helps."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from lowtide.core import config
from lowtide.core.errors import ConfigError
from lowtide.core.schema import json_schema, key_table

WRONG_BLOCKS: list[tuple[str, Any, list[str]]] = [
    ("misspelt plugin", {"prob": {}}, ["lowtide.prob: unknown key", 'mean "probe"?']),
    ("misspelt core key", {"telemetri": {}}, ["lowtide.telemetri", 'mean "telemetry"?']),
    ("unknown key", {"warp_drive": {}}, ["lowtide.warp_drive: unknown key", "Known: "]),
    ("misspelt setting", {"telemetry": {"every_n_step": 1}}, ['mean "every_n_steps"?']),
    ("unit in name", {"telemetry": {"flush_interval_ms": 5}}, ['mean "flush_interval_s"?']),
    ("text for number", {"telemetry": {"every_n_steps": "2"}}, ['got "2"', "valid integer"]),
    ("float for integer", {"telemetry": {"every_n_steps": 1.5}}, ["got 1.5", "integer"]),
    ("true for integer", {"telemetry": {"every_n_steps": True}}, ["got true", "integer"]),
    ("zero steps", {"telemetry": {"every_n_steps": 0}}, ["got 0", "greater than or equal to 1"]),
    ("negative time", {"telemetry": {"flush_interval_s": -1}}, ["got -1", "greater than 0"]),
    ("number for folder", {"telemetry": {"dir": 3}}, ["lowtide.telemetry.dir", "got 3", "string"]),
    ("misspelt auto", {"telemetry": {"trace": "atuo"}}, ['got "atuo"', "boolean or 'auto'"]),
    ("list for object", {"telemetry": []}, ["lowtide.telemetry", "an array", "JSON object"]),
    ("true for object", {"probe": True}, ["lowtide.probe", "true/false", "JSON object"]),
    ("null for object", {"probe": None}, ["lowtide.probe: got null"]),
    ("missing folder", {"stop": {}}, ['"then": "exit" needs "save_dir"']),
    ("misspelt signal", {"stop": {"signals": ["USR3"]}}, ["stop.signals.0", '"USR3"', "'USR1'"]),
    ("conflicting keys", {"telemetry": {"trace": True}}, ['"trace": true needs "dir"']),
    ("size with unit", {"probe": {"buffer_bytes": "4GiB"}}, ["write 4294967296"]),
    ("size with decimal unit", {"probe": {"buffer_bytes": "1.5 MB"}}, ["write 1500000"]),
    ("time with unit", {"probe": {"interval_s": "250ms"}}, ["write 0.25"]),
    ("enabled not a bool", {"probe": {"enabled": "yes"}}, ["lowtide.probe.enabled", "boolean"]),
    ("two problems", {"probe": {"ordr": 1}, "telemetri": {}}, ["probe.ordr", "; ", "telemetri"]),
    ("not JSON", {"probe": {"order": {1, 2}}}, ["lowtide.probe", "JSON cannot express"]),
]


@pytest.mark.parametrize(
    ("block", "expected"), [case[1:] for case in WRONG_BLOCKS], ids=[c[0] for c in WRONG_BLOCKS]
)
@pytest.mark.usefixtures("probe")
def test_wrong_block_gives_one_clear_line(block: Any, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.resolve(block)
    text = str(caught.value)
    assert "\n" not in text
    for part in expected:
        assert part in text


WRONG_FILES = [
    ("misspelt lowtide", '{"lowtde": {}}', 'Did you mean "lowtide"?'),
    ("block is a list", '{"lowtide": []}', "an array"),
    ("block is null", '{"lowtide": null}', "got null"),
    ("cut off", '{"lowtide": {', "line 1, column"),
    ("array at top", "[1]", "an array"),
    ("twice the same key", '{"lowtide": {}, "lowtide": {}}', "twice"),
]


@pytest.mark.parametrize(
    ("text", "expected"), [case[1:] for case in WRONG_FILES], ids=[c[0] for c in WRONG_FILES]
)
def test_wrong_file_names_file_or_key(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r".") as caught:
        config.load_block(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_names_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not exist") as caught:
        config.load_block(tmp_path / "ds_confg.json")
    assert 'Did you mean "ds_config.json"?' in str(caught.value)
    with pytest.raises(ConfigError, match="is a folder"):
        config.load_block(tmp_path)


def test_all_sources_of_deepspeed_are_read(tmp_path: Path) -> None:
    whole = {"train_batch_size": 8, "lowtide": {"telemetry": {}}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(whole))
    encoded = base64.urlsafe_b64encode(json.dumps(whole).encode()).decode()
    for source in (whole, path, str(path), encoded):
        assert config.load_block(source) == {"telemetry": {}}
    assert config.load_block({"train_batch_size": 8}) is None
    with pytest.raises(ConfigError, match="got int"):
        config.load_block(5)


def test_comments_are_accepted_where_deepspeed_accepts_them(tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "ds.json"
    path.write_text('{\n  # a comment\n  "lowtide": {},\n}')
    assert config.load_block(path) == {}


def test_unreadable_values_do_not_reach_other_plugins(probe: Any) -> None:
    resolved = config.resolve({"probe": {"enabled": False, "nonsense": 1}})
    assert resolved.plugins == {}


def test_auto_is_decided_and_kept() -> None:
    assert config.resolve({}).as_dict()["telemetry"]["trace"] is False
    resolved = config.resolve({"telemetry": {"dir": "somewhere"}})
    assert resolved.as_dict()["telemetry"]["trace"] is True
    resolved.decide("telemetry.every_n_steps", 7)
    assert resolved.as_dict()["telemetry"]["every_n_steps"] == 7
    with pytest.raises(ConfigError, match="not a setting"):
        resolved.decide("telemetry.nothing", 1)
    with pytest.raises(ConfigError, match="not a setting"):
        resolved.decide("probe.order", 1)


def test_host_conflict_is_refused(monkeypatch: pytest.MonkeyPatch, probe: Any) -> None:
    def refuse(self: Any, host_config: Any) -> None:
        if host_config.get("zero_optimization", {}).get("stage") == 3:
            raise ConfigError("lowtide.probe and zero_optimization.stage 3 cannot be combined")

    monkeypatch.setattr(probe.Config, "check_host", refuse)
    config.resolve({"probe": {}}, host_config={})
    with pytest.raises(ConfigError, match="cannot be combined"):
        config.resolve({"probe": {}}, host_config={"zero_optimization": {"stage": 3}})


def test_schema_accepts_and_refuses_what_resolve_does(probe: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"lowtide": {"telemetry": {"trace": "auto"}, "probe": {"order": 1}}})
    assert validator.is_valid({"anything": 1, "lowtide": {}})
    assert not validator.is_valid({"lowtide": {"prob": {}}})
    assert not validator.is_valid({"lowtide": {"probe": {"ordr": 1}}})
    assert not validator.is_valid({"lowtide": {"telemetry": {"every_n_steps": "2"}}})


def test_key_table_lists_every_key_with_type_and_default(probe: Any) -> None:
    rows = {row.path: row for row in key_table()}
    assert rows["lowtide.telemetry.trace"].type == 'boolean or "auto"'
    assert rows["lowtide.telemetry.trace"].default == '"auto"'
    assert rows["lowtide.probe.buffer_bytes"].type == "integer"
    assert all(row.description for row in rows.values())
    fields = set(config.TelemetryConfig.model_fields)
    assert {p.rsplit(".", 1)[1] for p in rows if p.startswith("lowtide.telemetry.")} == fields
