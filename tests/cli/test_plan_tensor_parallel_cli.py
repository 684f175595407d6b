"""``lowtide plan tensor_parallel``: its table, its JSON and its refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lowtide.cli import app

runner = CliRunner()
MODEL = ("--model", "llama-7b", "--rank-ratio", 0.25, "--gpus", 4, "--gpu", "A100")
NAMES = ("full rank", "naive low rank", "naive, heads split", "bottleneck-aware")


def _run(*arguments: object, columns: int = 80) -> Result:
    words = ["plan", "tensor_parallel", *map(str, arguments)]
    return runner.invoke(app, words, env={"COLUMNS": str(columns)})


def _json(*arguments: object) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _ours(found: dict[str, Any]) -> dict[str, Any]:
    ours: dict[str, Any] = found["schemes"][-1]
    return ours


@pytest.mark.parametrize("columns", [80, 120])
def test_table_names_every_scheme_and_says_modelled(columns: int) -> None:
    result = _run(*MODEL, columns=columns)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "llama-7b, rank 1024 of 4096, 4 x A100-80GB, 4 x 4096 tokens, tier none"
    assert all(len(line) <= columns for line in lines)
    assert "…" not in result.stdout
    rows = [next(line for line in lines if line.startswith(name)) for name in NAMES]
    found = _json(*MODEL)
    for row, scheme in zip(rows, found["schemes"], strict=True):
        *_, messages, sent, _kept, _held, block_ms, ratio, step_s = row.split()
        assert messages == f"{scheme['forward_messages']}+{scheme['backward_messages']}"
        assert float(sent) == pytest.approx(scheme["iteration_bytes"] / 1e9, abs=0.06)
        assert float(block_ms) == pytest.approx(scheme["block_s"] * 1e3, abs=0.006)
        assert float(ratio) == pytest.approx(scheme["block_s"] / _ours(found)["block_s"], abs=0.006)
        assert float(step_s) == pytest.approx(scheme["iteration_s"], abs=6e-4)
    assert "Times are modelled" in result.stdout
    assert "2/7" not in result.stdout


def test_table_counts_what_checkpointing_sends_again() -> None:
    lines = _run(*MODEL, "--tier", "sharded_latents").stdout.splitlines()
    messages = [next(line for line in lines if line.startswith(name)).split()[-7] for name in NAMES]
    assert messages == ["4+6+4", "4+4+4", "5+5+5", "4+4+4"]


def test_large_ranks_are_warned_of() -> None:
    text = " ".join(_run(*MODEL[:2], "--rank", 1176).stdout.split())
    assert "! rank: 1176 is above 2/7 of the width, 1170: full rank sends less" in text


def test_widths_may_stand_in_for_a_name() -> None:
    widths = ("--width", 4096, "--mlp-width", 11008, "--layers", 32, "--heads", 32)
    assert _json(*widths, "--gpu", "A100") == _json(*MODEL)
    found = _json(*widths, "--kv-heads", 8, "--head-width", 64, "--vocabulary", 100, "--tied")
    block = found["model"]["block"]
    assert (block["kv_heads"], block["head_width"]) == (8, 64)
    assert (found["model"]["vocabulary"], found["model"]["is_tied"]) == (100, True)


def test_options_change_a_named_model() -> None:
    found = _json("--model", "llama3-8b", "--layers", 2, "--untied", "--rank", 512)
    assert found["model"]["layers"] == 2
    assert found["model"]["block"]["kv_heads"] == 8
    assert found["model"]["block"]["mlp_rank"] == 512
    # Other heads: the preset's number of key heads does not go with them.
    assert _json("--model", "llama3-8b", "--heads", 16)["model"]["block"]["kv_heads"] == 16


def test_given_rates_replace_the_modelled_ones() -> None:
    found = _json(*MODEL, "--link-gb-per-s", 50, "--hop-us", 2)
    assert found["modelled_machine"]["link"]["beta_bytes_per_s"] == 5e10
    assert found["modelled_machine"]["link"]["alpha_s"] == pytest.approx(2e-6)
    assert _ours(found)["block_s"] > _ours(_json(*MODEL))["block_s"]


def test_batch_is_asked_for() -> None:
    found = _json(*MODEL, "--sequence", 2048, "--micro-batch", 1)
    assert (found["micro_batch"], found["sequence"]) == (1, 2048)
    tokens_before = 8 * _ours(found)["footprint"]["block_activation_bytes"]
    assert tokens_before == _ours(_json(*MODEL))["footprint"]["block_activation_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "lama-7b"), 'Did you mean "llama-7b"'),
        ((), "--width, --mlp-width, --layers, --heads as well"),
        (("--width", 64, "--heads", 3), "--mlp-width, --layers as well"),
        ((*MODEL, "--rank", 8), "got both"),
        (("--model", "llama-7b", "--rank", 0), "attention_rank: got 0"),
        (("--model", "llama-7b", "--rank", 5000), "at most the width 4096"),
        (("--model", "llama-7b", "--rank-ratio", 0), "rank_ratio: got 0"),
        (("--model", "llama-7b", "--rank-ratio", "nan"), "rank_ratio: got nan"),
        (("--model", "llama-7b", "--gpus", 5), "which 5 ranks cannot share"),
        (("--model", "llama-7b", "--gpus", 0), "ranks: got 0"),
        (("--model", "llama-30b", "--gpus", 8), "heads: got 52, which 8 ranks"),
        (("--model", "llama-7b", "--heads", 48), "heads: got 48, allowed is a divisor"),
        (("--model", "llama-7b", "--heads", 0), "heads: got 0"),
        (("--model", "llama-7b", "--kv-heads", 5), "kv_heads: got 5"),
        (("--model", "llama-7b", "--head-width", 0), "head_width: got 0"),
        (("--model", "llama-7b", "--gpu", "A10"), "unknown profile 'A10'"),
        (("--model", "llama-7b", "--tier", "full"), "tier: got 'full'"),
        (("--model", "llama-7b", "--sequence", 0), "sequence: got 0"),
        (("--model", "llama-7b", "--micro-batch", -1), "micro_batch: got -1"),
        (("--model", "llama-7b", "--link-gb-per-s", 0), "link_bytes_per_s: got 0"),
        (("--model", "llama-7b", "--hop-us", "inf"), "hop_s: got inf"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(arguments: tuple[Any, ...], message: str) -> None:
    result = _run(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr
