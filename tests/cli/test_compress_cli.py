"""``lowtide compress``, ``decompress`` and ``inspect``: what they write, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from lowtide.cli import app
from lowtide.compression import compress
from lowtide.compression.sz import SzCodec
from lowtide.compression.verify import measure
from lowtide.core.codec import ArrayData, Bound
from lowtide.core.errors import CodecError
from lowtide.core.stream import pack_stream, read_header

runner = CliRunner()


def _run(*arguments: object) -> Result:
    return runner.invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


def _json(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _saved(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


@pytest.fixture
def field(tmp_path: Path) -> Path:
    axes = np.linspace(0, 6, 40), np.linspace(0, 4, 50)
    return _saved(tmp_path / "field.npy", np.add.outer(*map(np.sin, axes)).astype(np.float32))


def test_there_and_back_within_the_bound(tmp_path: Path, field: Path) -> None:
    small, back = tmp_path / "field.lt", tmp_path / "back.npy"
    found = _json("compress", field, small, "--mode", "rel", "--bound", 1e-3)
    before = np.load(field)
    assert found["stream_bytes"] == small.stat().st_size
    assert found["ratio"] == before.nbytes / small.stat().st_size > 5
    assert found["bits_per_value"] == pytest.approx(32 / found["ratio"])
    assert found["bound"] == {"kind": "rel", "value": 1e-3}
    assert (found["dtype"], found["shape"], found["outside"]) == ("float32", [40, 50], 0)
    assert _json("decompress", small, back)["shape"] == [40, 50]
    after = np.load(back)
    assert after.dtype == before.dtype
    error = np.abs(after.astype(np.float64) - before)
    assert found["max_abs_error"] == error.max() <= found["limit"]
    assert found["limit"] == pytest.approx(1e-3 * (before.max() - before.min()))


def test_people_get_a_table(tmp_path: Path, field: Path) -> None:
    small = tmp_path / "field.lt"
    header, row = _run("compress", field, small, "--bound", "0.01").stdout.splitlines()
    assert header.split()[:3] == ["shape", "dtype", "from"]
    assert row.startswith("40 x 50")
    assert " abs 0.01 " in row
    assert row.rstrip().endswith(" of 0.01")
    assert _run("decompress", small, tmp_path / "back.npy").stdout.endswith(
        "back.npy: 40 x 50, float32, 8.0 kB\n"
    )
    shown = _run("inspect", small).stdout
    assert "lowtide.sz" in shown
    assert "linear" in shown
    assert shown.splitlines()[-1].split()[:4] == ["1", "40", "x", "50"]


def test_inspect_says_what_the_library_says(tmp_path: Path, field: Path) -> None:
    codec = json.dumps({"id": "lowtide.sz", "chunk_elements": 500})
    _json("compress", field, tmp_path / "s", "--bound", 0.01, "--codec", codec)
    found = _json("inspect", tmp_path / "s")
    assert found["codec"]["chunk_elements"] == 500
    assert [chunk["shape"] for chunk in found["chunks"]] == [[10, 50]] * 4
    _json("compress", field, tmp_path / "z", "--codec", "lowtide.zstd")
    found = _json("inspect", tmp_path / "z")
    assert "chunks" not in found
    assert "lowtide.zstd" in _run("inspect", tmp_path / "z").stdout
    assert np.array_equal(np.load(field), _back(tmp_path / "z", tmp_path))


def _back(stream: Path, folder: Path) -> np.ndarray:
    _json("decompress", stream, folder / "again.npy", "--force")
    return np.asarray(np.load(folder / "again.npy"))


def test_fill_values_stay_exact(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 3000)
    values[::7] = -1e34
    source = _saved(tmp_path / "a.npy", values)
    options = ("--mode", "rel", "--bound", 1e-2, "--fill-value=-1e34")
    found = _json("compress", source, tmp_path / "s", *options)
    assert found["limit"] == pytest.approx(1e-2, rel=1e-2)
    after = _back(tmp_path / "s", tmp_path)
    assert (after[::7] == -1e34).all()
    assert np.abs(after - values).max() <= 1e-2


@pytest.mark.parametrize(
    "values",
    [np.float32(3.5), np.zeros((0, 4)), np.asfortranarray(np.arange(12.0).reshape(3, 4)),
     np.arange(6, dtype=">f4"), np.array([np.nan, np.inf, 1], np.float16)],
    ids=["0-d", "empty", "Fortran", "big endian", "half"],
)  # fmt: skip
def test_every_array_goes_there_and_back(tmp_path: Path, values: Any) -> None:
    source = _saved(tmp_path / "a.npy", np.asarray(values))
    for mode in ("abs", "pw_rel"):
        assert (
            _json("compress", source, tmp_path / mode, "--mode", mode, "--bound", 0)["outside"] == 0
        )
        np.testing.assert_array_equal(_back(tmp_path / mode, tmp_path), values)
        assert _run("inspect", tmp_path / mode).exit_code == 0
        assert _run("compress", source, tmp_path / f"{mode}2", "--bound", 1).exit_code == 0


def test_a_broken_bound_is_exit_code_1_and_writes_nothing(
    tmp_path: Path, field: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = SzCodec._decode

    def off_by_a_hair(self: SzCodec, header: Any, payload: Any) -> Any:
        values = decode(self, header, payload)
        values[7] += np.float32(0.011)
        return values

    monkeypatch.setattr(SzCodec, "_decode", off_by_a_hair)
    result = _run("compress", field, tmp_path / "out", "--bound", 0.005)
    assert result.exit_code == 1
    assert "1 elements come back outside of Bound(kind='abs', value=0.005)" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["field.npy"]


def test_files_are_not_replaced_unasked(tmp_path: Path, field: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    for verb, source in (("compress", field), ("decompress", _compressed(tmp_path, field))):
        options = ["--bound", 0.1] if verb == "compress" else []
        result = _run(verb, source, out, *options)
        assert result.exit_code == 2
        assert "exists; remove it" in result.stderr
        assert out.read_bytes() == b"mine"
        assert _run(verb, source, out, *options, "--force").exit_code == 0
        assert out.read_bytes() != b"mine"
        out.write_bytes(b"mine")


def _compressed(folder: Path, field: Path) -> Path:
    path = folder / "small"
    path.write_bytes(compress(np.load(field), bound=0.1))
    return path


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "bound is missing"),
        (["--bound", "-1"], "bound -1.0, allowed are 0 and more"),
        (["--bound", "1", "--mode", "relative"], "mode 'relative'"),
        (["--bound", "1", "--codec", "lowtide.zs"], 'Did you mean "lowtide.zstd"'),
        (["--bound", "1", "--codec", "lowtide.zstd"], "cannot use the parameters"),
        (["--codec", "{nonsense"], "--codec: {nonsense is not JSON"),
        (["--codec", '{"bound": 1}'], '"id" must name a codec'),
    ],
)
def test_wrong_options_are_exit_code_2(
    tmp_path: Path, field: Path, options: list[str], text: str
) -> None:
    result = _run("compress", field, tmp_path / "out", *options)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_exit_code_2(tmp_path: Path, field: Path) -> None:
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "integers.npy", np.arange(5))
    (tmp_path / "empty").write_bytes(b"")
    damaged = bytearray(_compressed(tmp_path, field).read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    (tmp_path / "tensor").write_bytes(compress(torch.ones(9).bfloat16(), bound=0.1))
    out, bound = tmp_path / "out", ["--bound", 1]
    for arguments, text in (
        (["compress", tmp_path / "gone.npy", out, *bound], "gone.npy: cannot be read"),
        (["compress", tmp_path / "empty", out, *bound], "empty: cannot be read as a .npy file"),
        (["compress", tmp_path / "several.npz", out, *bound], "holds several arrays"),
        (["compress", tmp_path / "objects.npy", out, *bound], "objects.npy: cannot be read"),
        (["compress", tmp_path / "integers.npy", out, *bound], "elements are int64"),
        (["compress", field, tmp_path / "no" / "out", *bound], "out: cannot be written (No such"),
        (["compress", field, tmp_path, *bound], "is not a file; name another"),
        (["decompress", tmp_path / "gone", out], "gone: cannot be read: No such file"),
        (["decompress", tmp_path / "empty", out], "stream has 0 bytes"),
        (["decompress", tmp_path / "damaged", out], "payload does not match its checksum"),
        (["decompress", tmp_path / "tensor", out], "holds bfloat16, which .npy files lack"),
        (["decompress", tmp_path / "small", out, "--max-bytes", 10], "max_bytes=10"),
        (["inspect", field], "stream begins with"),
        (["inspect", tmp_path / "damaged"], "checksum"),
    ):
        result = _run(*arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert text in result.stderr
        assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_the_check_counts_to_the_last_bit() -> None:
    x = np.array([1.0, 2.0, np.nan, np.inf, -9.0, 4.0])
    y = x.copy()
    y[0] += 0.25
    given = ArrayData(x, "float64")
    assert measure(given, ArrayData(y, "float64"), Bound("abs", 0.25)).outside == 0
    less = float(np.nextafter(0.25, 0))
    found = measure(given, ArrayData(y, "float64"), Bound("abs", less))
    assert (found.outside, found.max_abs, found.limit) == (1, 0.25, less)
    relative = measure(given, ArrayData(y, "float64"), Bound("rel", 0.25 / 13))
    assert relative.limit == 0.25
    assert measure(given, ArrayData(y, "float64"), Bound("rel", 0.1), fill_value=-9.0).limit < 0.31
    y[4] += 1e-9
    assert measure(given, ArrayData(y, "float64"), Bound("abs", 1), fill_value=-9.0).outside == 1
    y[2] = -np.nan
    assert measure(given, ArrayData(y, "float64"), Bound("abs", 1)).outside == 1
    assert measure(given, ArrayData(y, "float64"), Bound("lossless")).outside == 3
    assert measure(given, ArrayData(y, "float64"), Bound("pw_rel", 0.2)).outside == 2
    with pytest.raises(CodecError, match="6 elements of float64 cannot be compared with 5"):
        measure(given, ArrayData(y[1:], "float64"), Bound("lossless"))
    assert read_header(compress(x, bound=1)).shape == (6,)


def test_inspect_shows_the_text_of_strangers_as_it_is(tmp_path: Path) -> None:
    config = {"id": "a[/b]", "text": "[red]\x1b[2J"}
    path = tmp_path / "forged"
    path.write_bytes(pack_stream(config, "float32", (0,), b""))
    shown = _run("inspect", path)
    assert shown.exit_code == 0
    assert "a[/b]" in shown.stdout
    assert "[red]\\x1b[2J" in shown.stdout


def test_a_folder_as_the_target_is_named_even_with_force(tmp_path: Path, field: Path) -> None:
    shown = _run("compress", field, tmp_path, "--bound", "0.1", "--force")
    assert shown.exit_code != 0
    assert "is not a file" in shown.output
