"""What is recorded, what reaches the files, and that broken files never stop a run."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lowtide.core.config import TelemetryConfig
from lowtide.core.errors import TelemetryError
from lowtide.core.lifecycle import Session
from lowtide.core.telemetry import Span, Telemetry, chrome_trace


def records(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    lines = (folder / f"rank{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line]


def test_run_of_two_steps_is_written_as_documented(tmp_path: Path) -> None:
    block = {"telemetry": {"dir": str(tmp_path / "t")}}
    session = Session.open(block, host="test", host_config={"lowtide": block})
    for step in (1, 2):
        with session.telemetry.span("forward"):
            pass
        with session.telemetry.span("forward", lane="gpu", bytes=7):
            pass
        session.telemetry.count("lowtide.x.y_bytes", 5)
        session.before_update()
        session.after_update()
        session.telemetry.scalar("train/loss", 1.0 / step, step)
    session.telemetry.reference("validation/bits_per_byte", "xz -9", 1.9)
    session.close()
    found = records(tmp_path / "t")
    assert [r["kind"] for r in found] == [
        "run", "step", "scalar", "step", "scalar", "reference", "end",
    ]  # fmt: skip
    run = found[0]
    assert run["format"] == 1
    assert run["attempt"] == 1
    assert run["host"] == "test"
    assert run["config"]["telemetry"]["trace"] is True
    assert run["environment"]["python"]
    second = found[3]
    assert second["step"] == 2
    assert second["steps"] == 1
    assert second["spans"]["forward"]["count"] == 2
    assert second["spans"]["update"]["count"] == 1
    assert second["counters"] == {"lowtide.x.y_bytes": 10}
    assert second["gauges"]["memory.rss_bytes"] > 1_000_000
    assert found[4]["value"] == 0.5
    trace = json.loads((tmp_path / "t" / "trace.rank0.json").read_text())["traceEvents"]
    lanes = {e["args"]["name"]: e["tid"] for e in trace if e["name"] == "thread_name"}
    assert set(lanes) == {"host", "gpu"}
    gpu = [e for e in trace if e["ph"] == "X" and e["tid"] == lanes["gpu"]]
    assert len(gpu) == 2
    assert gpu[0]["args"] == {"bytes": 7}
    assert abs(gpu[0]["ts"] / 1e6 - time.time()) < 60


def test_records_every_n_steps_cover_the_steps_between(tmp_path: Path) -> None:
    telemetry = Telemetry(TelemetryConfig(dir=str(tmp_path), every_n_steps=3))
    telemetry.begin_run(host="test", plugins=[], listeners=[], config={})
    for step in range(1, 8):
        with telemetry.span("forward"):
            pass
        telemetry.end_step(step)
    telemetry.close()
    steps = [r for r in records(tmp_path) if r["kind"] == "step"]
    assert [(r["step"], r["steps"], r["spans"]["forward"]["count"]) for r in steps] == [
        (3, 3, 3),
        (6, 3, 3),
    ]


def test_without_a_folder_nothing_is_written_and_figures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    telemetry = Telemetry(TelemetryConfig())
    telemetry.begin_run(host="test", plugins=[], listeners=[], config={})
    telemetry.add_span("copy", "h2d", 1.0, 1.5)
    telemetry.gauge("g", 3)
    telemetry.scalar("train/loss", 2.5, 1)
    telemetry.end_step(1)
    telemetry.close()
    assert list(tmp_path.iterdir()) == []
    snapshot = telemetry.snapshot()
    assert snapshot["spans"] == {"copy": {"count": 1, "total_s": 0.5}}
    assert snapshot["scalars"] == {"train/loss": 2.5}
    assert snapshot["gauges"]["g"] == 3


def test_resumed_run_appends_after_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    for _ in range(2):
        telemetry = Telemetry(TelemetryConfig(dir=str(tmp_path)))
        telemetry.begin_run(host="test", plugins=[], listeners=[], config={})
        telemetry.flush()
        with open(tmp_path / "rank0.jsonl", "a") as file:
            file.write('{"kind": "step", "st')
    lines = (tmp_path / "rank0.jsonl").read_text().splitlines()
    assert [json.loads(lines[0])["attempt"], json.loads(lines[2])["attempt"]] == [1, 2]


def test_values_that_json_lacks_are_named(tmp_path: Path) -> None:
    telemetry = Telemetry(TelemetryConfig(dir=str(tmp_path)))
    telemetry.begin_run(host="test", plugins=[], listeners=[], config={})
    telemetry.scalar("train/loss", math.nan, 1)
    telemetry.scalar("train/loss", -math.inf, 2)
    telemetry.close()
    text = (tmp_path / "rank0.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    values = [(r["value"], r["nonfinite"]) for r in records(tmp_path) if r["kind"] == "scalar"]
    assert values == [(None, "nan"), (None, "-inf")]


def test_sinks_receive_every_scalar() -> None:
    telemetry = Telemetry(TelemetryConfig())
    got: list[tuple[str, float, int]] = []
    telemetry.sinks.append(lambda name, value, step: got.append((name, value, step)))
    telemetry.scalar("train/loss", 2, 3)
    assert got == [("train/loss", 2.0, 3)]


def test_folder_that_cannot_be_made_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    telemetry = Telemetry(TelemetryConfig(dir=str(tmp_path / "file" / "sub")))
    with pytest.raises(TelemetryError, match=r"lowtide\.telemetry\.dir: .* cannot be written"):
        telemetry.begin_run(host="test", plugins=[], listeners=[], config={})


def test_folder_that_vanishes_is_reported_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry = Telemetry(TelemetryConfig(dir=str(tmp_path / "t"), flush_interval_s=1e-9))
    telemetry.begin_run(host="test", plugins=[], listeners=[], config={})
    shutil.rmtree(tmp_path / "t")
    for step in (1, 2, 3):
        telemetry.end_step(step)
    telemetry.close()
    assert [r.message for r in caplog.records if "no longer be written" in r.message] != []
    assert len(caplog.records) == 1


def test_counts_from_many_threads_are_all_kept() -> None:
    telemetry = Telemetry(TelemetryConfig())

    def work() -> None:
        for _ in range(2000):
            telemetry.count("n")
            telemetry.add_span("s", "lane", 0.0, 1.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert telemetry.snapshot()["counters"]["n"] == 8000
    assert telemetry.snapshot()["spans"]["s"] == {"count": 8000, "total_s": 8000.0}


def test_trace_keeps_only_the_newest_spans(tmp_path: Path) -> None:
    telemetry = Telemetry(TelemetryConfig(dir=str(tmp_path), trace_spans=10))
    telemetry.begin_run(host="test", plugins=[], listeners=[], config={})
    for index in range(25):
        telemetry.add_span(f"s{index}", "host", index, index + 0.5)
    telemetry.close()
    trace = json.loads((tmp_path / "trace.rank0.json").read_text())["traceEvents"]
    assert [e["name"] for e in trace if e["ph"] == "X"] == [f"s{i}" for i in range(15, 25)]


def test_chrome_trace_places_spans_by_rank_lane_and_unix_time() -> None:
    trace = chrome_trace([Span("a", "h2d", 1.0, 1.25, {})], rank=3, unix_offset_s=100.0)
    (span,) = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert (span["pid"], span["ts"], span["dur"]) == (3, 101e6, 0.25e6)


def test_forked_child_does_not_write_the_parents_files(tmp_path: Path) -> None:
    telemetry = Telemetry(TelemetryConfig(dir=str(tmp_path)))
    telemetry.begin_run(host="test", plugins=[], listeners=[], config={})
    pid = os.fork()
    if pid == 0:
        telemetry.scalar("child", 1, 1)
        telemetry.close()
        os._exit(0)
    os.waitpid(pid, 0)
    telemetry.close()
    assert [r["kind"] for r in records(tmp_path)] == ["run", "end"]
