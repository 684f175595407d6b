"""The page of a run: every figure recomputed here from the records, every odd run survives."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from lowtide.core.config import TelemetryConfig
from lowtide.core.errors import TelemetryError
from lowtide.core.telemetry import Telemetry
from lowtide.report import key_figures, read_run, render, write_report
from lowtide.report.svg import seconds_labels, ticks
from lowtide.report.text import bytes_text, number, seconds_text
from tests.report.page_checks import check, images
from tests.report.run_files import RankWriter, write_demo

PHASES = {"forward": 0.1, "backward": 0.2, "update": 0.05}


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def test_page_shows_the_figures_of_the_records(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo" / "telemetry", steps=200)
    html = page_of(tmp_path / "demo")
    page = check(html)

    rows = records(tmp_path / "demo" / "telemetry" / "rank0.jsonl")
    starts = [i for i, row in enumerate(rows) if row["kind"] == "run"]
    assert len(starts) == 2
    resumed = next(row["step"] for row in rows[starts[1] :] if row["kind"] == "step")
    kept = [r for r in rows[: starts[1]] if r.get("step", 0) < resumed] + rows[starts[1] :]
    losses = [r["value"] for r in kept if r.get("name") == "train/loss"]
    times = [r["duration_s"] for r in kept if r["kind"] == "step"]
    bits = [r["value"] for r in kept if r.get("name") == "validation/bits_per_byte"]
    assert len(losses) == len(times) == 200

    figures = key_figures(read_run(tmp_path / "demo")).as_dict()
    assert figures["train_loss_values"] == 20
    assert figures["train_loss"] == pytest.approx(statistics.fmean(losses[-20:]))
    assert figures["step_time_median_s"] == pytest.approx(statistics.median(times))
    assert figures["validation_bits_per_byte"] == bits[-1]
    assert (figures["best_reference"], figures["last_step"]) == ("xz -9", 200)
    assert (figures["ranks"], figures["attempts"], figures["status"]) == (2, 2, "done")

    for shown in (
        number(statistics.fmean(losses[-20:])),
        number(bits[-1]),
        seconds_text(statistics.median(times)).split()[0],
        f"{number(100 * abs(bits[-1] / 1.93 - 1), 3)} % below xz -9 (1.93)",
        "Example CPU <64-core> & friends",
        "commit 0123abc",
        "xz -9: 1.93",
        "gzip -9: 2.41",
        "train_batch_size",
    ):
        assert shown in page.text, shown


def test_counters_add_up_over_ranks_and_attempts(tmp_path: Path) -> None:
    write_demo(tmp_path, steps=60)
    total = 0
    for rank in (0, 1):
        tops: dict[int, int] = {}
        attempt = 0
        for row in records(tmp_path / f"rank{rank}.jsonl"):
            attempt += row["kind"] == "run"
            if row["kind"] == "step":
                tops[attempt] = row["counters"]["lowtide.offload.moved_bytes"]
        total += sum(tops.values())
    page = check(page_of(tmp_path))
    assert f"moved_bytes {bytes_text(total)}" in page.text
    assert "No plugin was active" not in page.text


def test_page_says_so_when_no_plugin_is_active(tmp_path: Path) -> None:
    writer = RankWriter(tmp_path)
    writer.run()
    writer.step(1, PHASES, 0.01)
    writer.record("end", status="done")
    writer.write()
    assert "No plugin was active in this run" in check(page_of(tmp_path)).text


def test_names_from_files_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</svg><script>alert(1)</script>\"'&"
    writer = RankWriter(tmp_path)
    writer.run(host=evil, plugins=[evil], listeners=[evil], config={evil: evil},
               host_config={evil: [evil]},
               environment={"cpu": evil, evil: evil, "commit": evil})  # fmt: skip
    for step in range(1, 9):
        writer.step(step, {**PHASES, evil: 0.01}, 0.01,
                    counters={f"lowtide.{evil}.x_bytes": step})  # fmt: skip
        writer.span(evil, evil, writer.now_s - 0.05, writer.now_s, **{evil: evil})
        writer.scalar(evil, step, step)
        writer.scalar("train/loss", step, 1.0 / step)
        writer.scalar("validation/bits_per_byte", step, 2.0)
    writer.record("reference", series="validation/bits_per_byte", name=evil, value=1.5)
    writer.record("end", status=evil)
    writer.write()
    html = page_of(tmp_path)
    check(html)
    assert "<script>" not in html
    assert evil in check(html).text


def test_charts_are_drawn_and_carry_tooltips(tmp_path: Path) -> None:
    write_demo(tmp_path, steps=80)
    drawn = images(page_of(tmp_path))
    labels = [image.attrib["aria-label"] for image in drawn]
    assert "Loss over optimizer steps" in labels
    assert "Validation bits per byte over optimizer steps" in labels
    assert "Timeline of lanes" in labels
    assert "Median step time of every rank, by phase" in labels
    for image in drawn:
        tips = [e.text for e in image.iter() if e.tag.endswith("title")]
        assert tips, image.attrib["aria-label"]
    loss = drawn[labels.index("Loss over optimizer steps")]
    texts = [element.text for element in loss.iter() if element.tag.endswith("text")]
    assert "resumed" in texts


def test_stacked_bar_heights_follow_the_phases(tmp_path: Path) -> None:
    writer = RankWriter(tmp_path)
    writer.run()
    for step in range(1, 11):
        writer.step(step, PHASES, 0.15)
    writer.write()
    chart = next(i for i in images(page_of(tmp_path)) if "split into" in i.attrib["aria-label"])
    heights: dict[str, float] = {}
    tops: list[float] = []
    for element in chart.iter():
        if element.attrib.get("class", "").startswith("k-") and len(heights) < 4:
            heights[element.attrib["class"]] = float(element.attrib["height"])
            tops.append(float(element.attrib["y"]))
    assert heights["k-backward"] / heights["k-forward"] == pytest.approx(2.0, rel=0.02)
    assert heights["k-other"] / heights["k-update"] == pytest.approx(3.0, rel=0.02)
    # Stacked: each part ends where the next one begins.
    for above, height, below in zip(tops[1:], list(heights.values())[1:], tops, strict=False):
        assert above + height == pytest.approx(below, abs=0.11)


def test_timeline_shows_whole_steps_of_the_trace(tmp_path: Path) -> None:
    write_demo(tmp_path, steps=50)
    chart = next(i for i in images(page_of(tmp_path)) if i.attrib["aria-label"].startswith("Time"))
    tips = [e.text or "" for e in chart.iter() if e.tag.endswith("title")]
    updates = [t for t in tips if t.startswith("update:") and "rank 0, lane host" in t]
    assert len(updates) == 4
    assert any("subgroup = 3" in tip and "lane to device" in tip for tip in tips)


def test_record_of_several_steps_counts_per_step(tmp_path: Path) -> None:
    writer = RankWriter(tmp_path)
    writer.run()
    for step in (10, 20, 30):
        writer.step(step, {"forward": 1.0, "backward": 2.0, "update": 1.0}, 1.0, steps=10)
    writer.write()
    figures = key_figures(read_run(tmp_path))
    assert figures.step_time_median_s == pytest.approx(0.5)
    assert "rank 0, 30 steps" in check(page_of(tmp_path)).text


@pytest.mark.parametrize("age_s", [5.0, 3600.0])
def test_run_without_an_end_is_running_or_killed_by_its_age(tmp_path: Path, age_s: float) -> None:
    write_demo(tmp_path, steps=20, is_done=False)
    newest = max(r["time_s"] for f in tmp_path.glob("rank*.jsonl")
                 for r in map(json.loads, f.read_text().splitlines()[:-1]))  # fmt: skip
    run = read_run(tmp_path, now_s=newest + age_s)
    assert run.status() == ("running" if age_s < 60 else "killed")
    page = check(render(run))
    assert "2 lines of the telemetry files could not be read" in page.text
    assert ("it was killed" in page.text) == (age_s > 60)


def test_damaged_lines_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    writer = RankWriter(tmp_path)
    writer.run()
    damaged = ["{", "[]", "17", "null", '{"kind": "step"}', '{"kind": "scalar", "time_s": 1}',
               '{"kind": "step", "time_s": 1, "step": 1, "duration_s": "x"}',
               '{"kind": "step", "time_s": 1, "step": 1e999, "duration_s": 1}',
               '{"kind": "scalar", "time_s": 1, "name": "a", "step": 1, "value": true}',
               "[" * 100_000, "\x00\x01"]  # fmt: skip
    for index, line in enumerate(damaged):
        writer.lines.append(line)
        writer.step(index + 1, PHASES, 0.01)
    writer.lines.append('{"kind": "from the future", "time_s": 1700000000}')
    writer.write()
    run = read_run(tmp_path)
    assert run.bad_lines == len(damaged)
    assert len(run.lead.steps) == len(damaged)
    assert f"{len(damaged)} lines" in check(render(run)).text


def test_values_that_are_not_finite_leave_gaps_and_are_named(tmp_path: Path) -> None:
    writer = RankWriter(tmp_path)
    writer.run()
    for step in range(1, 101):
        bad = {40: math.nan, 41: math.inf, 90: -math.inf}
        writer.step(step, PHASES, 0.01)
        writer.scalar("train/loss", step, bad.get(step, 4.0))
        writer.scalar("validation/bits_per_byte", step, math.nan)
    writer.record("end", status="done")
    writer.write()
    figures = key_figures(read_run(tmp_path))
    assert (figures.train_loss, figures.train_loss_nonfinite) == (4.0, 3)
    assert figures.validation_bits_per_byte is None
    page = check(page_of(tmp_path))
    assert "3 values of the training loss not finite" in page.text
    assert "step 41: ∞" in page.text


def test_all_losses_nan_still_gives_a_page(tmp_path: Path) -> None:
    writer = RankWriter(tmp_path)
    writer.run()
    for step in range(1, 4):
        writer.scalar("train/loss", step, math.nan)
    writer.write()
    assert "No step record" in check(page_of(tmp_path)).text
    assert json.dumps(key_figures(read_run(tmp_path)).as_dict(), allow_nan=False)


@pytest.mark.parametrize("content", ["", "\n", "not json\n", '{"kind": "end", "time_s": 1}\n'])
def test_file_with_hardly_anything_gives_a_page(tmp_path: Path, content: str) -> None:
    (tmp_path / "rank0.jsonl").write_text(content)
    assert "Optimizer steps" in check(page_of(tmp_path)).text


@pytest.mark.parametrize("cut", [0, 1, 20, 2000, -1])
def test_trace_cut_short_never_breaks_the_page(tmp_path: Path, cut: int) -> None:
    write_demo(tmp_path, steps=30, ranks=1)
    trace = tmp_path / "trace.rank0.json"
    trace.write_text(trace.read_text()[:cut])
    page = check(page_of(tmp_path))
    assert ("No trace was found" in page.text) == (0 <= cut < 100)


def test_files_of_ranks_that_are_not_there_are_missed(tmp_path: Path) -> None:
    for rank in (0, 2):
        writer = RankWriter(tmp_path, rank)
        writer.run(world_size=4)
        writer.step(1, PHASES, 0.1)
        writer.write()
    page = check(page_of(tmp_path))
    assert "The files of 2 of 4 ranks were not found" in page.text
    assert key_figures(read_run(tmp_path)).ranks == 4


def test_single_rank_has_no_comparison(tmp_path: Path) -> None:
    write_demo(tmp_path, steps=10, ranks=1)
    assert "Ranks compared" not in check(page_of(tmp_path)).text


def test_long_run_stays_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(1)
    writer = RankWriter(tmp_path)
    writer.run()
    for step in range(1, 20_001):
        phases = dict.fromkeys(PHASES, float(noise.uniform(0.1, 0.2)))
        writer.step(step, phases, 0.01, gauges={"memory.rss_bytes": 1e9})
        for name in ("train/loss", "train/tokens_per_s", "validation/bits_per_byte"):
            writer.scalar(name, step, float(noise.normal()))
        writer.scalar("train/grad_norm", step, math.nan if step % 2 else 1.0)
    writer.write()
    html = page_of(tmp_path)
    check(html)
    assert len(html) < 1_000_000


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [(0.0, 0.0269, ["0 ms", "5 ms", "10 ms", "15 ms", "20 ms", "25 ms"]),
     (0.0, 27.0, ["0 s", "5 s", "10 s", "15 s", "20 s", "25 s"]),
     (0.0, 14.0, ["0.0 s", "2.5 s", "5.0 s", "7.5 s", "10.0 s", "12.5 s"]),
     (0.0, 1.4, ["0.00 s", "0.25 s", "0.50 s", "0.75 s", "1.00 s", "1.25 s"])],
)  # fmt: skip
def test_ticks_are_round_and_their_labels_exact(low: float, high: float, labels: list) -> None:
    values = ticks(low, high, 5)
    assert [seconds_labels(values)(value) for value in values] == labels


def test_spikes_survive_thinning(tmp_path: Path) -> None:
    writer = RankWriter(tmp_path)
    writer.run()
    for step in range(1, 10_001):
        writer.scalar("train/loss", step, 9.0 if step % 1000 == 500 else 2.0)
    writer.write()
    chart = images(page_of(tmp_path))[0]
    raw = next(e for e in chart.iter() if e.attrib.get("class") == "band c1")
    heights = [float(p.split()[1]) for p in raw.attrib["d"].rstrip("Z").split("L")[1:]]
    top = min(heights)
    assert sum(height == top for height in heights) == 10


def test_folders_without_or_with_too_much_telemetry_are_named(tmp_path: Path) -> None:
    with pytest.raises(TelemetryError, match=r"nowhere: no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(TelemetryError, match=r"found no rank<R>\.jsonl"):
        read_run(tmp_path)
    for name in ("one", "two"):
        write_demo(tmp_path / name / "telemetry", steps=4, ranks=1)
    with pytest.raises(TelemetryError, match="rank 0 has files of several runs"):
        read_run(tmp_path)
    assert read_run(tmp_path / "two").name == "two"
    assert read_run(tmp_path / "two" / "telemetry").name == "two"


def test_report_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    write_demo(tmp_path, steps=4, ranks=1)
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(TelemetryError, match=r"taken/page\.html: the report cannot be written"):
        write_report(tmp_path, tmp_path / "taken" / "page.html")


def test_files_of_the_real_telemetry_are_understood(tmp_path: Path) -> None:
    """Catch drift between what `Telemetry` writes and what the report reads."""
    folder = tmp_path / "real" / "telemetry"
    for attempt in (1, 2):
        telemetry = Telemetry(TelemetryConfig(dir=str(folder)), rank=0, world_size=1)
        telemetry.begin_run(host="torch_loop", plugins=["offload"], listeners=["a: b"],
                            config={"telemetry": {}}, host_config={"x": 1})  # fmt: skip
        telemetry.reference("validation/bits_per_byte", "xz -9", 1.93)
        for step in range(1, 7):
            for name in ("forward", "backward", "update"):
                with telemetry.span(name, part=step):
                    pass
            telemetry.count("lowtide.offload.moved_bytes", 1024)
            telemetry.scalar("train/loss", math.nan if step == 2 else 5.0 - step / 10, step)
            telemetry.scalar("validation/bits_per_byte", 2.5, step)
            telemetry.end_step(step)
        telemetry.close(status="done" if attempt == 2 else "stopped")
    run = read_run(tmp_path / "real")
    assert run.bad_lines == 0
    figures = key_figures(run)
    assert (figures.name, figures.status, figures.attempts) == ("real", "done", 2)
    assert (figures.last_step, figures.train_loss_nonfinite) == (6, 1)
    assert figures.train_loss == 4.4
    assert figures.peak_memory_bytes is not None
    page = check(render(run))
    assert "moved_bytes 12 KiB" in page.text
    assert "typical steps near the end" in page.text
    assert "stopped" in page.text
