"""``lowtide checkpoint``: what its verbs print, and their exit codes."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lowtide.checkpoint.state import compare
from lowtide.cli import app
from tests.helpers.checkpoints import make_checkpoint, make_part, make_stock

runner = CliRunner()
OPTIM = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def _run(*arguments: object) -> Result:
    return runner.invoke(app, ["checkpoint", *map(str, arguments)], env={"COLUMNS": "200"})


def _json(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _hurt(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_ls_shows_each_checkpoint_and_its_state(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    make_stock(tmp_path, 2)
    make_part(tmp_path, 3, pid=2**40)
    lines = _run("ls", tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["tag", *(f"global_step{i}" for i in (3, 2, 1))]
    assert "abandoned" in lines[1]
    assert "<- latest" in lines[2]
    assert "unverified" in lines[2]
    assert "complete" in lines[3]
    found = _json("ls", tmp_path)["checkpoints"]
    assert [c["state"] for c in found] == ["abandoned", "unverified", "complete"]
    assert found[2]["path"] == str(tmp_path / "global_step1")


def test_rows_stay_whole_in_a_log_of_any_width(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    result = runner.invoke(app, ["checkpoint", "ls", str(tmp_path)], env={"COLUMNS": "30"})
    header, row = result.stdout.splitlines()
    assert header.split()[-1] == "written"
    assert row.startswith("global_step1")


def test_ls_of_an_empty_folder_says_so(tmp_path: Path) -> None:
    assert _run("ls", tmp_path).stdout == f"no checkpoints in {tmp_path}\n"
    assert _json("ls", tmp_path)["checkpoints"] == []
    gone = _run("ls", tmp_path / "gone")
    assert (gone.exit_code, gone.stderr.count("\n")) == (2, 1)


def test_verify_reads_the_newest_or_all(tmp_path: Path) -> None:
    old, new = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    make_part(tmp_path, 3)
    result = _run("verify", tmp_path)
    assert result.exit_code == 0
    assert result.stdout.startswith("global_step2: ok (full, ")
    _hurt(old / OPTIM)
    assert _run("verify", tmp_path).exit_code == 0
    assert _run("verify", new).exit_code == 0
    result = _run("verify", tmp_path, "--all", "--threads", 1)
    assert result.exit_code == 1
    assert "global_step1: DAMAGED" in result.stdout
    assert f"  {OPTIM} bytes " in result.stdout
    found = _json("verify", tmp_path, "--all", exit_code=1)
    assert [c["is_ok"] for c in found["checkpoints"]] == [True, False]
    assert found["ok"] is False
    assert found["checkpoints"][1]["damage"][0]["file"] == OPTIM


def test_verify_fast_reads_less(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    full, fast = _json("verify", path), _json("verify", path, "--fast")
    (full_report,), (fast_report,) = full["checkpoints"], fast["checkpoints"]
    assert (full_report["mode"], fast_report["mode"]) == ("full", "fast")
    assert fast_report["read_bytes"] < full_report["read_bytes"]


def test_verify_looks_at_latest_too(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    (tmp_path / "latest").write_text("global_step0")
    result = _run("verify", tmp_path)
    assert result.exit_code == 1
    assert "latest names 'global_step0', which is not there" in result.stdout
    assert _json("verify", tmp_path, exit_code=1)["latest"] is not None
    assert _run("verify", path).exit_code == 0


def test_verify_says_where_checksums_are_missing(tmp_path: Path) -> None:
    make_stock(tmp_path, 1)
    assert "no checksums by Lowtide: torch's own were checked" in _run("verify", tmp_path).stdout


def test_verify_of_nothing_is_exit_code_2(tmp_path: Path) -> None:
    result = _run("verify", tmp_path)
    assert result.exit_code == 2
    assert "holds no checkpoint" in result.stderr
    assert _run("verify", tmp_path / "gone").exit_code == 2


def test_prune_removes_or_only_says_so(tmp_path: Path) -> None:
    for step in (10, 15, 20, 30):
        make_checkpoint(tmp_path, step)
    arguments = ("prune", tmp_path, "--keep", 1, "--keep-every", 10)
    result = _run(*arguments, "--dry-run")
    assert "would remove global_step15 (" in result.stdout
    assert "would remove 1 of 4 complete checkpoints" in result.stdout
    planned = _json(*arguments, "--dry-run")
    assert (tmp_path / "global_step15").is_dir()
    done = _json(*arguments)
    assert {**done, "dry_run": True} == planned
    assert not (tmp_path / "global_step15").exists()
    assert "removed 0 of 3" in _run(*arguments).stdout
    assert _run("prune", tmp_path, "--keep", 0).exit_code == 2
    assert _run("prune", tmp_path).exit_code == 2


# ---- diff


def _save(path: Path, **values: Any) -> Path:
    torch.save(values, path)
    return path


def test_diff_of_the_same_says_so(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    other = make_checkpoint(tmp_path / "b", 1)
    result = _run("diff", path, other)
    assert (result.exit_code, result.stdout) == (0, "no difference\n")
    assert _json("diff", path, other) == {"same": True, "differences": []}


def test_diff_names_each_tensor_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PIECE_ELEMENTS", 7)
    x, nan = torch.arange(20.0).reshape(4, 5), torch.tensor([float("nan"), 1.0])
    changed, far = x.clone(), x.clone()
    changed[0, 1] += 5
    changed[3, 4] -= 2
    far[0] = float("inf")
    a = _save(
        tmp_path / "a.pt", same=x, nan=nan, opt={0: {"m": x, "far": x}}, gone=x, kind=x, form=x,
        zero=torch.zeros(3, dtype=torch.bfloat16), step=3, rate=0.5, tags=["a", None],
    )  # fmt: skip
    b = _save(
        tmp_path / "b.pt", same=x.clone(), nan=nan, opt={0: {"m": changed, "far": far}}, new=x,
        kind=x.long(), form=x.T, zero=-torch.zeros(3, dtype=torch.bfloat16), step=5, rate=0.5,
        tags=["b", None],
    )  # fmt: skip
    found = {d.pop("name"): d for d in _json("diff", a, b, exit_code=1)["differences"]}
    f32 = {"file": "", "dtype": "float32", "shape": "[4, 5]"}
    none = {"max_abs_difference": None, "differing_elements": None}
    assert found == {
        "opt/0/m": {**f32, "kind": "value", "max_abs_difference": 5.0, "differing_elements": 2},
        "opt/0/far": {**f32, "kind": "value", "max_abs_difference": None, "differing_elements": 5},
        "gone": {**f32, "kind": "only in A", **none},
        "new": {**f32, "kind": "only in B", **none},
        "kind": {**f32, "kind": "dtype", "dtype": "float32 -> int64", **none},
        "form": {**f32, "kind": "shape", "shape": "[4, 5] -> [5, 4]", **none},
        "zero": {
            "file": "", "kind": "value", "dtype": "bfloat16", "shape": "[3]",
            "max_abs_difference": 0.0, "differing_elements": 3,
        },
        "step": {
            "file": "", "kind": "value", "dtype": "int", "shape": "",
            "max_abs_difference": 2.0, "differing_elements": 1,
        },
        "tags/0": {
            "file": "", "kind": "value", "dtype": "str", "shape": "",
            "max_abs_difference": None, "differing_elements": 1,
        },
    }  # fmt: skip
    shown = _run("diff", a, b)
    assert shown.exit_code == 1
    line = next(line for line in shown.stdout.splitlines() if "opt/0/m" in line)
    assert line.split()[-2:] == ["5", "2"]


def test_diff_pairs_the_files_of_two_checkpoints(tmp_path: Path) -> None:
    a, b = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    (a / OPTIM).unlink()
    found = _json("diff", a, b, exit_code=1)["differences"]
    assert {(d["file"], d["name"], d["kind"]) for d in found} >= {
        (OPTIM, "x", "only in B"),
        ("mp_rank_00_model_states.pt", "x", "value"),
        ("layers/layer_2.pt", "step", "value"),
    }


def test_diff_of_what_cannot_be_compared_is_exit_code_2(tmp_path: Path) -> None:
    a = make_checkpoint(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pt").write_text("no torch file")
    for first, second, message in (
        (a, tmp_path / "gone", "no such file or folder"),
        (a, a / OPTIM, "one is a folder, the other a file"),
        (tmp_path / "empty", tmp_path / "empty", "neither holds a .pt file"),
        (tmp_path / "x.pt", a / OPTIM, "x.pt: cannot be read"),
    ):
        result = _run("diff", first, second)
        assert result.exit_code == 2
        assert message in result.stderr


def test_what_libraries_say_while_files_are_compared_is_not_in_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "compare", lambda *_, **__: print("what a library says") or [])
    assert _json("diff", tmp_path, tmp_path) == {"same": True, "differences": []}


def test_compact_copies_are_named_as_such(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", 1)
    small = tmp_path / "global_step1"
    small.mkdir()
    (small / f"{OPTIM}.compact").write_bytes(b"small")
    (tmp_path / "latest").write_text(small.name)
    calls = (("diff", whole, small), ("export", small, "out"), ("export", tmp_path, "out"))
    for arguments in calls:
        result = _run(*arguments)
        assert result.exit_code == 2
        assert f'"lowtide checkpoint expand {small} FOLDER"' in result.stderr


def test_diff_reads_files_of_the_old_format(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "a", _use_new_zipfile_serialization=False)
    _save(tmp_path / "b", x=torch.ones(3))
    assert _run("diff", tmp_path / "a", tmp_path / "b").exit_code == 0


# ---- export


def test_export_hands_on_what_it_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def export(checkpoint: Path, out: Path, *, dtype: torch.dtype | None) -> list[Path]:
        asked.append((checkpoint, out, dtype))
        print("what a library says")  # as DeepSpeed's logger does; stdout must stay JSON
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"123")
        return [out / "model.safetensors"]

    stand_in = types.ModuleType("lowtide.checkpoint.state")
    stand_in.export = export  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lowtide.checkpoint.state", stand_in)
    monkeypatch.setattr("lowtide.checkpoint.state", stand_in, raising=False)
    out = tmp_path / "out"
    found = _json("export", tmp_path, out, "--dtype", "bfloat16")
    assert found == {"out": str(out), "files": {"model.safetensors": 3}}
    assert asked == [(tmp_path, out, torch.bfloat16)]
    wrong = _run("export", tmp_path, out, "--dtype", "int33")
    assert wrong.exit_code == 2
    assert '--dtype: got "int33"' in wrong.stderr
