"""``lowtide plan offload``: its table, its picture, its files and its refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lowtide.cli import app
from lowtide.offload.outlook import cut, look_ahead
from lowtide.offload.picture import lane_rows
from lowtide.offload.plan import Plan, check_plan
from lowtide.offload.rates import profile
from lowtide.report.lanes import read_trace

runner = CliRunner()
MODEL = ("--params", "20e9", "--gpu", "H100-80GB", "--ranks", "4")


def _run(*arguments: object, columns: int = 100) -> Result:
    words = ["plan", "offload", *map(str, arguments)]
    return runner.invoke(app, words, env={"COLUMNS": str(columns)})


def _json(*arguments: object) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_table_names_every_schedule_and_the_bound() -> None:
    result = _run(*MODEL)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "5B parameters in 50 subgroups on each H100-80GB"
    names = ("stock loop", "static split", "every second", "host only", "this plan", "lower bound")
    rows = [next(line for line in lines if line.startswith(name)) for name in names]
    times = [float(re.findall(r"\d+\.\d", row)[0]) for row in rows]
    assert times[-2] == min(times[:-1])
    assert times[-1] < times[-2]
    assert "modelled" in result.stdout
    assert "fraction 0." in result.stdout


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_picture_fills_the_terminal_and_no_more(columns: int) -> None:
    lines = _run(*MODEL, columns=columns).stdout.splitlines()
    lanes = ("host ", "prefetch ", "upload ", "device ", "flush ")
    picture = [line for line in lines if line.startswith(lanes) and line.endswith("%")]
    assert len(picture) >= 5
    assert all(len(line) <= columns for line in lines)
    prefetch = next(line for line in picture if line.startswith("prefetch"))
    assert len(prefetch) >= columns - 3
    assert prefetch.count("█") > 0.9 * (columns - 16)  # that lane is the bottleneck here


def test_json_holds_the_plan_and_its_rivals() -> None:
    found = _json(*MODEL)
    pieces = cut(5 * 10**9, 10**8)
    plan = Plan.from_dict(found["plan"])
    check_plan(pieces, plan, memory_bytes=found["memory_bytes"])
    assert found["memory_bytes"] == 8e9
    by_name = {row["name"].split(",")[0]: row for row in found["schedules"]}
    ours = by_name["this plan"]
    assert ours["update_s"] == plan.makespan_s
    assert ours["update_s"] == min(row["update_s"] for row in found["schedules"])
    assert by_name["host only"]["to_host_bytes"] == 0
    assert by_name["stock loop"]["to_device_bytes"] == 2 * 5 * 10**9
    assert by_name["every second"]["on_device"] == 0.5
    staged = sum(pieces[i].numel for i in plan.staged)
    assert ours["to_host_bytes"] == 12 * staged


def test_given_rates_replace_the_modelled_ones() -> None:
    found = _json(
        *MODEL, "--link-gb-per-s", 10, "--half-duplex", "--host-params-per-s", 1e9,
        "--host-memory-gb-per-s", 50, "--device-params-per-s", 2e10, "--gradient-bytes", 0,
        "--slots", 3, "--fraction", 0.25, "--no-residents", "--memory-gb", 20,
        "--subgroup-size", 5e7,
    )  # fmt: skip
    rates, plan = found["rates"], found["plan"]
    assert rates["host_to_device_bytes_per_s"] == rates["device_to_host_bytes_per_s"] == 1e10
    assert rates["is_duplex"] is False
    assert rates["host_params_per_s"] == 1e9
    assert rates["host_memory_bytes_per_s"] == 5e10
    assert rates["device_params_per_s"] == 2e10
    assert plan["fraction"] == 0.25
    assert plan["residents"] == []
    assert len(plan["device_order"]) + len(plan["host_order"]) == 100
    assert found["memory_bytes"] == 2e10


def test_trace_file_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert _run(*MODEL, "--chrome-trace", path).exit_code == 0
    spans = read_trace(path, rank=0)
    outlook = look_ahead(
        cut(5 * 10**9, 10**8, gradient_upload_bytes=2, keeps_gradient=True),
        profile("H100-80GB").rates(ranks=4), memory_bytes=8e9,
    )  # fmt: skip
    assert len(spans) == len(outlook.simulation.trace)
    assert {span.lane for span in spans} == {"host", "prefetch", "upload", "device", "flush"}
    last_s = max(span.end_s for span in spans)
    assert last_s == pytest.approx(outlook.simulation.makespan_s, abs=1e-6)


def test_no_memory_is_said_to_be_no_use() -> None:
    result = _run(*MODEL, "--memory-gb", 0)
    assert "The GPU would not help within this memory." in result.stdout
    assert "static split" not in result.stdout
    assert "GPU: none" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--params", 1e9, "--gpu", "H100-80"), "Did you mean"),
        (("--params", -1, "--gpu", "H100-80GB"), "--params: got -1"),
        (("--params", "nan", "--gpu", "H100-80GB"), "--params: got nan"),
        ((*MODEL, "--memory-gb", 81), "allowed is 0 to 80"),
        ((*MODEL, "--memory-gb", "nan"), "--memory-gb"),
        ((*MODEL, "--ranks", 0), "ranks: got 0"),
        ((*MODEL, "--subgroup-size", 100), "make it larger"),
        ((*MODEL, "--subgroup-size", 0), "--subgroup-size"),
        ((*MODEL, "--gradient-bytes", 3), "allowed is 0, 2 or 4"),
        ((*MODEL, "--slots", 0), "max_slots"),
        ((*MODEL, "--fraction", 1.1), "fraction"),
        ((*MODEL, "--link-gb-per-s", 0), "host_to_device_bytes_per_s"),
        ((*MODEL, "--chrome-trace", "/no/such/folder/x.json"), "cannot write the trace"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(arguments: tuple[Any, ...], message: str) -> None:
    result = _run(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_lane_rows_add_up_to_the_busy_time() -> None:
    outlook = look_ahead(cut(10**9, 10**8), profile("A100-40GB").rates(), memory_bytes=8e9)
    for columns in (7, 200):
        simulation = outlook.simulation
        rows = lane_rows(simulation.trace, simulation.makespan_s, columns)
        step_s = outlook.simulation.makespan_s / columns
        for lane, row in rows.items():
            assert len(row) == columns
            busy_s = sum(busy for busy, _ in row) * step_s
            assert busy_s == pytest.approx(outlook.simulation.busy_s[lane])
            assert all((number >= 0) == (busy > 0) for busy, number in row)
