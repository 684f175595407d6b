"""README and docs tell the truth: commands exist, links resolve, JSON is accepted, code runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowtide.core.config import load_block, resolve
from lowtide.core.registry import plugins
from lowtide.core.schema import key_table

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs/*.md", "examples/*/README.md", "plugins/lowtide/*/README.md")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(page for pattern in FOLDERS for page in ROOT.glob(pattern))
GROUPS = {"checkpoint", "launch", "plan", "quality"}  # verbs with verbs of their own
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text()) if kind == language]


def commands(page: Path) -> Iterator[list[str]]:
    for block in [*blocks(page, "bash"), *blocks(page, "sh")]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page: Path) -> None:
    for words in commands(page):
        if words[0] == "make":
            goals = [w for w in words[1:] if "=" not in w]
            done = subprocess.run(
                ["make", "-n", *goals], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{name(page)}: {words}: {done.stderr}"
        for word in words:
            if re.fullmatch(r"(examples|benchmarks|tests|launch)/[\w/.-]+\.(py|sh|json)", word):
                assert (ROOT / word).exists(), f"{name(page)} names {word}"


def test_lowtide_verbs_and_options_in_the_docs_exist() -> None:
    from typer.testing import CliRunner

    from lowtide.cli import app

    runner = CliRunner()
    seen = set()
    for page in PAGES:
        for words in commands(page):
            if words[0] != "lowtide" or len(words) < 2 or words[1].startswith("-"):
                continue
            seen.add(words[1])
            verb = words[1:3] if words[1] in GROUPS else words[1:2]
            result = runner.invoke(app, [*verb, "--help"], env={"COLUMNS": "200"})
            assert result.exit_code == 0, f"{name(page)}: {words}"
            for option in [w.partition("=")[0] for w in words[2:] if re.match(r"--\w", w)]:
                assert option in result.output, f"{name(page)}: {words}"
    assert {"doctor", "schema", "report", "launch", "checkpoint"} <= seen


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_json_blocks_are_accepted(page: Path) -> None:
    for text in blocks(page, "json"):
        block = load_block(json.loads(text))
        assert block is None or resolve(block).as_dict()["telemetry"]


@pytest.mark.parametrize("page", sorted(ROOT.glob("examples/*/ds*.json")), ids=name)
def test_example_configurations_are_accepted(page: Path) -> None:
    block = load_block(page)
    assert block is not None
    resolve(block)


def test_plugin_guide_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {"__name__": "guide"}
    try:
        for code in blocks(ROOT / "docs" / "plugins.md", "python"):
            exec(compile(code, "docs/plugins.md", "exec"), scope)
    finally:
        plugins.unregister("drift")
    assert re.search(r"'drift/distance': 0\.\d+", capsys.readouterr().out)


def test_key_table_in_the_docs_is_the_generated_one() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "lowtide.cli", "schema", "--markdown"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() in page, "put `lowtide schema --markdown` into docs/config.md"
    for row in key_table():
        assert f"`{row.path}`" in page
