"""Manifests: written and read back, and every way in which one can be wrong."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.checkpoint.store.manifest import (
    FileSums,
    Manifest,
    is_manifest_name,
    manifest_name,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from lowtide.checkpoint.writer.plan import FileResult
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import json_checksum
from tests.helpers.checkpoints import ATTEMPT

FILES = {
    "a.pt": FileSums(size_bytes=9, chunk_bytes=4, crc32=(1, 2, 2**32 - 1)),
    "sub/é.pt": FileSums(size_bytes=0, chunk_bytes=4, crc32=()),
}
MANIFEST = Manifest(attempt=ATTEMPT, rank=3, step=7, files=FILES)


def test_manifest_is_read_as_written(tmp_path: Path) -> None:
    name, size_bytes, crc32 = write_manifest(tmp_path, MANIFEST)
    raw = (tmp_path / name).read_bytes()
    assert (name, size_bytes, crc32) == ("manifest-00003.json", len(raw), zlib.crc32(raw))
    assert read_manifest(tmp_path / name) == MANIFEST
    value = json.loads(raw)
    assert value["format"] == 1
    assert value["files"]["a.pt"] == {
        "size_bytes": 9, "chunk_bytes": 4, "crc32": [1, 2, 4294967295]
    }  # fmt: skip
    body = {k: v for k, v in value.items() if k != "checksum"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    assert value["checksum"] == zlib.crc32(text.encode())


def test_manifest_of_results_names_files_below_the_folder(tmp_path: Path) -> None:
    results = [
        FileResult(path=tmp_path / "sub" / "x.pt", size_bytes=5, chunk_bytes=4, crc32=[1, 2])
    ]
    manifest = Manifest.of_results(tmp_path, results, attempt=ATTEMPT, rank=0, step=1)
    assert manifest.files == {
        "sub/x.pt": FileSums(size_bytes=5, chunk_bytes=4, crc32=(1, 2)),
    }


@pytest.mark.parametrize(
    ("rank", "name"), [(0, "manifest-00000.json"), (123456, "manifest-123456.json")]
)
def test_names_are_known_again(rank: int, name: str) -> None:
    assert manifest_name(rank) == name
    assert is_manifest_name(name)
    assert not is_manifest_name(name + ".part")


def _changed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A change with a checksum that fits again: what a faulty writer would leave."""

    def apply(raw: bytes) -> bytes:
        value = json.loads(raw)
        change(value)
        value["checksum"] = json_checksum(value)
        return json.dumps(value).encode()

    return apply


def _set_file(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda value: value["files"]["a.pt"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.replace(b'"rank": 3', b'"rank": 4'), "checksum does not fit"),
        (lambda raw: raw.replace(b'"checksum"', b'"checksun"'), "checksum does not fit"),
        (lambda raw: raw[:-5], "is not a whole manifest"),
        (lambda raw: b"\xff" + raw, "is not a whole manifest"),
        (lambda raw: b"[]", "got list, allowed is an object"),
        (lambda raw: b"[" * 100_000, "is not a whole manifest"),
        (_changed(lambda v: v.update(format=2)), "format 2, allowed is 1; a newer Lowtide"),
        (_changed(lambda v: v.update(rank=4)), "it is of rank 4"),
        (_changed(lambda v: v.update(rank="3")), "wrong type"),
        (_changed(lambda v: v.pop("step")), "KeyError"),
        (_changed(lambda v: v.update(files=[])), "is no manifest"),
        (_changed(lambda v: v["files"].update({"../x": v["files"]["a.pt"]})), "not a file below"),
        (_changed(lambda v: v["files"].update({"/x": v["files"]["a.pt"]})), "not a file below"),
        (_changed(_set_file(crc32=[1, 2])), "2 checksums, 9 bytes have 3"),
        (_changed(_set_file(crc32=[1, 2, "3"])), "3 checksums"),
        (_changed(_set_file(size_bytes=-1)), "size_bytes is -1"),
        (_changed(_set_file(chunk_bytes=0)), "chunk_bytes is 0"),
    ],
)
def test_wrong_manifest_is_an_error_that_says_why(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / write_manifest(tmp_path, MANIFEST)[0]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_folder_and_file_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest-00003\.json: cannot be read \(No such"):
        read_manifest(tmp_path / "manifest-00003.json")
    with pytest.raises(CheckpointError, match=r"manifest-00003\.json: cannot be written \(No such"):
        write_manifest(tmp_path / "gone", MANIFEST)


def test_every_single_flipped_bit_is_seen(tmp_path: Path) -> None:
    path = tmp_path / write_manifest(tmp_path, MANIFEST)[0]
    raw, unseen = path.read_bytes(), 0
    for place in range(8 * len(raw)):
        broken = bytearray(raw)
        broken[place // 8] ^= 1 << (place % 8)
        try:
            assert parse_manifest(bytes(broken), path) == MANIFEST  # \u00E9 for \u00e9
            unseen += 1
        except CheckpointError:
            pass
    assert unseen <= 2


@given(
    sums=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1).filter(
            lambda name: name not in (".", "..")
        ),
        st.tuples(st.integers(0, 40), st.integers(1, 9)),
    )
)
def test_any_manifest_survives_the_way_through_json(
    tmp_path_factory: pytest.TempPathFactory, sums: dict[str, tuple[int, int]]
) -> None:
    files = {
        name: FileSums(size_bytes=s, chunk_bytes=c, crc32=tuple(range(-(-s // c))))
        for name, (s, c) in sums.items()
    }
    manifest = Manifest(attempt=ATTEMPT, rank=1, step=2, files=files)
    folder = tmp_path_factory.getbasetemp()
    assert read_manifest(folder / write_manifest(folder, manifest)[0]) == manifest
