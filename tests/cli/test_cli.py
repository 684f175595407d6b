"""The ``lowtide`` command: verbs, exit codes, one line per error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lowtide
from lowtide.cli import app
from lowtide.cli.schema import markdown
from lowtide.core.errors import TelemetryError
from lowtide.core.schema import KeyRow, key_table
from lowtide.report import key_figures, read_run
from tests.report.page_checks import check
from tests.report.run_files import write_demo

runner = CliRunner()


def test_version_is_the_package_s() -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"lowtide {lowtide.__version__}\n")


def test_report_writes_the_page_and_prints_its_path(tmp_path: Path) -> None:
    write_demo(tmp_path / "telemetry", steps=12)
    result = runner.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0
    path = Path(result.stdout.strip())
    assert path == tmp_path / "report.html"
    check(path.read_text(encoding="utf-8"))


def test_report_json_holds_the_key_figures(tmp_path: Path) -> None:
    write_demo(tmp_path / "run", steps=12)
    out = tmp_path / "new" / "folder" / "page.html"
    result = runner.invoke(app, ["report", str(tmp_path / "run"), "--out", str(out), "--json"])
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["report"] == str(out)
    assert out.is_file()
    assert printed["figures"] == key_figures(read_run(tmp_path / "run")).as_dict()


def test_error_is_one_line_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWTIDE_DEBUG", raising=False)
    result = runner.invoke(app, ["report", str(tmp_path / "gone")])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"lowtide: {tmp_path}/gone: no such folder; pass the folder of a run, e.g. runs/demo"
    ]


def test_error_is_raised_whole_when_debugging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWTIDE_DEBUG", "1")
    result = runner.invoke(app, ["report", str(tmp_path / "gone")])
    assert isinstance(result.exception, TelemetryError)


@pytest.mark.parametrize(
    "arguments", [["tell"], ["report"], ["schema", "--json", "--markdown"], ["doctor", "--wat"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


def test_schema_json_is_a_schema_of_the_block() -> None:
    result = runner.invoke(app, ["schema", "--json"])
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    block = schema["properties"]["lowtide"]
    assert block["additionalProperties"] is False
    assert "every_n_steps" in block["properties"]["telemetry"]["properties"]


def test_schema_tables_list_every_key() -> None:
    keys = [row.path for row in key_table()]
    assert "lowtide.telemetry.dir" in keys
    lines = runner.invoke(app, ["schema", "--markdown"]).stdout.splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == keys
    table = runner.invoke(app, ["schema"]).stdout
    assert all(key in table for key in keys)


def test_markdown_cells_survive_bars() -> None:
    row = KeyRow(path="lowtide.x", type="a", default='"a|b"', description="a | b")
    assert markdown([row]).splitlines()[-1] == '| `lowtide.x` | a | `"a\\|b"` | a \\| b |'


def test_command_starts_without_heavy_imports() -> None:
    code = (
        "import sys; from lowtide.cli import app; "
        "print(sorted({'torch', 'deepspeed', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_module_runs_as_a_process(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LOWTIDE_DEBUG"}
    done = subprocess.run(
        [sys.executable, "-m", "lowtide.cli", "report", "nowhere"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
