"""`verify` sees every kind of damage, shares its work, and `choose` falls back on its word."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowtide.checkpoint
from lowtide.checkpoint.store import scan
from lowtide.checkpoint.store.integrity import find_damage, find_latest_damage, verify
from lowtide.checkpoint.store.manifest import FileSums, read_manifest
from lowtide.core import restart
from lowtide.core.errors import CheckpointError
from tests.helpers.checkpoints import CHUNK_BYTES, certify, make_checkpoint, make_stock, sums_of

MODEL = "mp_rank_00_model_states.pt"
OPTIM = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
MANIFEST = "manifest-00001.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, 20)


def _texts(path: Path, **options: object) -> list[str]:
    return [str(damage) for damage in verify(path, **options).damage]  # type: ignore[arg-type]


def _flip(path: Path, place: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def test_whole_checkpoint_is_ok(checkpoint: Path) -> None:
    data_bytes = sum(p.stat().st_size for p in checkpoint.rglob("*.pt"))
    report = verify(str(checkpoint))
    assert (report.is_ok, report.is_checksummed, report.mode) == (True, True, "full")
    assert (report.path, report.read_bytes) == (checkpoint, data_bytes)
    assert report.wall_s > 0
    fast = verify(checkpoint, mode="fast")
    assert fast.is_ok
    assert 0 < fast.read_bytes < data_bytes
    assert json.loads(json.dumps(report.as_dict()))["is_ok"] is True


def test_damage_names_file_and_bytes(checkpoint: Path) -> None:
    for place in (CHUNK_BYTES + 5, 2 * CHUNK_BYTES, 5 * CHUNK_BYTES):
        _flip(checkpoint / OPTIM, place)
    report = verify(checkpoint)
    assert not report.is_ok
    assert [(d.file, d.byte_range) for d in report.damage] == [
        (OPTIM, (CHUNK_BYTES, 3 * CHUNK_BYTES)),  # neighbours as one
        (OPTIM, (5 * CHUNK_BYTES, 6 * CHUNK_BYTES)),
    ]
    assert str(report.damage[0]) == f"{OPTIM} bytes 4096 to 12288 are not what was written"
    assert find_damage(checkpoint) == f"{report.damage[0]} (and 1 more)"


def test_torch_loads_what_verify_refuses(checkpoint: Path) -> None:
    raw = (checkpoint / OPTIM).read_bytes()
    before = torch.load(checkpoint / OPTIM)["x"]
    _flip(checkpoint / OPTIM, raw.index(before.numpy().tobytes()) + 400)
    assert not torch.equal(torch.load(checkpoint / OPTIM)["x"], before)
    assert find_damage(checkpoint) is not None


def _rename(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).rename(path / f"{name}x")


def _stale(path: Path) -> None:
    """Put a manifest of an earlier try, with the right name and step, in place of the right one."""
    other = make_checkpoint(path.parent / "other", 20, attempt="f" * 16)
    shutil.copy(other / MANIFEST, path / MANIFEST)


def _stale_step(path: Path) -> None:
    other = make_checkpoint(path.parent / "other", 19)
    shutil.copy(other / MANIFEST, path / MANIFEST)


def _stale_data(path: Path) -> None:
    other = make_checkpoint(path.parent / "other", 19)
    shutil.copy(other / OPTIM, path / OPTIM)


def _rewritten_manifest(path: Path) -> None:
    """Of the right attempt and step and with a right checksum, but of other data."""
    other = make_checkpoint(path.parent / "other", 20)
    _flip(other / OPTIM, 4000)
    certify(other, sorted(other.rglob("*.pt")), step=20)
    shutil.copy(other / MANIFEST, path / MANIFEST)


def _fifo(path: Path) -> None:
    (path / OPTIM).unlink()
    os.mkfifo(path / OPTIM)


def _folder(path: Path) -> None:
    (path / OPTIM).unlink()
    (path / OPTIM).mkdir()


@pytest.mark.parametrize("mode", ["full", "fast"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / OPTIM).unlink(), f"{OPTIM} cannot be read (No such file or directory)"),
        (lambda p: (p / "layers/layer_2.pt").unlink(), "layers/layer_2.pt cannot be read"),
        (_rename(OPTIM), f"{OPTIM} cannot be read"),
        (_fifo, f"{OPTIM} is not a file"),
        (_folder, f"{OPTIM} "),
        (lambda p: os.truncate(p / OPTIM, 5000), f"{OPTIM} has 5000 bytes, "),
        (lambda p: os.truncate(p / OPTIM, 50_000_000), f"{OPTIM} has 50000000 bytes, "),
        (_stale_data, f"{OPTIM} "),
        (_rename(MANIFEST), f"{MANIFEST} cannot be read"),
        (lambda p: (p / MANIFEST).write_text("{}"), f"{MANIFEST} is not a whole manifest"),
        (_stale, f"{MANIFEST} is of attempt ffffffffffffffff, the record of 0123456789abcdef"),
        (_stale_step, f"{MANIFEST} is of step 19, the record of step 20"),
        (_rewritten_manifest, f"{MANIFEST} is not the one that the record certifies"),
        (_rename("lowtide.json"), "lowtide.json is missing: the checkpoint was never finished"),
        (lambda p: os.truncate(p / "lowtide.json", 99), "lowtide.json is not a whole completion"),
        (lambda p: (p / "lowtide.json").write_text("{}"), "lowtide.json is not a whole completion"),
    ],
)
def test_missing_stale_and_cut_files_are_found(
    checkpoint: Path, mode: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(checkpoint)
    assert any(text.startswith(message) for text in _texts(checkpoint, mode=mode))


def test_files_that_no_manifest_names_are_ignored(checkpoint: Path) -> None:
    for name in ("owner.json", "notes.txt", "zero_pp_rank_7_mp_rank_00_optim_states.pt"):
        (checkpoint / name).write_text("x")
    assert verify(checkpoint).is_ok


def test_file_that_only_the_record_names_must_have_its_size(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 5)
    record = restart.read_record(path)
    assert record is not None
    (path / "extra.bin").write_bytes(b"12345")
    sizes = {name: written["size_bytes"] for name, written in record["files"].items()}
    restart.write_record(
        path, step=5, world_size=2, config={}, files={**sizes, "extra.bin": 5},
        attempt=record["attempt"], tag=path.name, manifests=record["manifests"],
    )  # fmt: skip
    assert verify(path).is_ok
    (path / "extra.bin").write_bytes(b"1234")
    assert _texts(path) == ["extra.bin has 4 bytes, 5 were written"]


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint; pass the folder of one"):
        verify(tmp_path / "gone")
    assert "no such checkpoint" in (find_damage(tmp_path / "gone") or "")
    with pytest.raises(CheckpointError, match='got \'slow\', allowed: "full", "fast"'):
        verify(checkpoint, mode="slow")  # type: ignore[arg-type]
    for part in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(CheckpointError, match="index < count"):
            verify(checkpoint, part=part)
    (tmp_path / "empty").mkdir()
    assert _texts(tmp_path / "empty") == ["it has no completion record and no model part"]


# ---- sharing the work


@pytest.mark.parametrize("mode", ["full", "fast"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 500])
def test_parts_together_read_everything_once(checkpoint: Path, mode: str, count: int) -> None:
    whole = verify(checkpoint, mode=mode)  # type: ignore[arg-type]
    parts = [verify(checkpoint, mode=mode, part=(i, count)) for i in range(count)]  # type: ignore[arg-type]
    assert sum(part.read_bytes for part in parts) == whole.read_bytes
    assert all(part.is_ok for part in parts)


def test_some_part_sees_each_damage(checkpoint: Path) -> None:
    size_bytes = (checkpoint / OPTIM).stat().st_size
    for place in range(0, size_bytes, CHUNK_BYTES):
        _flip(checkpoint / OPTIM, place)
        assert sum(not verify(checkpoint, part=(i, 5)).is_ok for i in range(5)) == 1
        _flip(checkpoint / OPTIM, place)
    (checkpoint / "layers/layer_2.pt").unlink()
    assert not all(verify(checkpoint, part=(i, 5)).is_ok for i in range(5))


def test_empty_file_is_looked_at_by_one_part(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    (path / "empty.pt").touch()
    certify(path, sorted(path.rglob("*.pt")), step=3)
    assert verify(path).is_ok
    (path / "empty.pt").write_bytes(b"x")
    assert [len(verify(path, part=(i, 3)).damage) for i in range(3)] == [1, 0, 0]


def test_progress_ends_at_the_total(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "RUN_BYTES", 2 * CHUNK_BYTES)
    seen: list[tuple[int, int]] = []
    report = verify(checkpoint, threads=3, on_progress=lambda *both: seen.append(both))
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert seen[-1] == (report.read_bytes, report.read_bytes)


@given(
    size=st.integers(0, 3000), chunk=st.integers(1, 700), block=st.integers(1, 500),
    run=st.integers(1, 2000), count=st.integers(1, 5), place=st.integers(0, 2999),
)  # fmt: skip
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_changed_byte_is_seen_whatever_the_sizes(
    tmp_path: Path, size: int, chunk: int, block: int, run: int, count: int, place: int
) -> None:
    path = tmp_path / "file"
    raw = random.Random(size).randbytes(size)
    path.write_bytes(raw)
    sums = sums_of(path, chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "BLOCK_BYTES", block)
        patch.setattr(scan, "RUN_BYTES", run)
        for is_broken in (False, True):
            if is_broken:
                _flip(path, place % size) if size else path.write_bytes(b"x")
            runs = [
                r
                for i in range(count)
                for r in scan.make_runs(
                    tmp_path, [("file", sums)], is_sample=False, part=(i, count)
                )
            ]
            damage, read_bytes = scan.scan_all(runs, threads=1, on_progress=None)
            assert read_bytes == size
            assert bool(damage) == is_broken
            for found in damage if size else []:
                assert found.byte_range is not None
                assert found.byte_range[0] <= place % size < found.byte_range[1]


def test_sample_holds_first_and_last_chunk(checkpoint: Path) -> None:
    last = (checkpoint / OPTIM).stat().st_size - 1
    for place in (0, last):
        _flip(checkpoint / OPTIM, place)
        assert not verify(checkpoint, mode="fast").is_ok
        _flip(checkpoint / OPTIM, place)
    sums = FileSums(size_bytes=100, chunk_bytes=1, crc32=(0,) * 100)
    runs = scan.make_runs(checkpoint, [("x", sums)], is_sample=True, part=(0, 1))
    assert [run.chunks for run in runs] == [(0, 33, 66, 99)]


# ---- checkpoints without Lowtide's checksums


def test_stock_checkpoint_is_checked_by_its_zip_files(tmp_path: Path) -> None:
    path = make_stock(tmp_path, 8)
    report = verify(path)
    assert (report.is_ok, report.is_checksummed) == (True, False)
    assert report.read_bytes == sum(p.stat().st_size for p in path.glob("*.pt"))
    assert find_damage(path, world_size=2) is None
    assert find_damage(path, world_size=3) == "2 of 3 optimizer parts are there"
    _flip(path / OPTIM, (path / OPTIM).stat().st_size // 2)
    assert _texts(path, mode="fast") == []
    assert [len(verify(path, part=(i, 2)).damage) for i in range(2)] in ([1, 0], [0, 1])
    assert "has a wrong checksum" in _texts(path)[0]
    os.truncate(path / OPTIM, 4000)
    assert _texts(path, mode="fast") == [f"{OPTIM} is no torch file"]
    assert f"{OPTIM} cannot be read" in _texts(path)[0]


def test_record_without_manifests_gives_sizes_and_zip_files(tmp_path: Path) -> None:
    path = make_stock(tmp_path, 8)
    (path / "legacy.pt").write_bytes(b"no zip file")
    restart.write_record(path, step=8, world_size=2, config={})
    assert verify(path).is_ok
    _flip(path / OPTIM, (path / OPTIM).stat().st_size // 2)
    assert [t for t in _texts(path) if "wrong checksum" in t]
    (path / "legacy.pt").write_bytes(b"no zip")
    assert "legacy.pt has 6 bytes, 11 were written" in _texts(path)
    (path / MODEL).unlink()
    assert any(t.startswith(f"{MODEL} cannot be read") for t in _texts(path))


def test_zip_files_with_any_flipped_header_bit_are_damage_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.arange(4)}, path)
    with zipfile.ZipFile(path) as archive:
        begin = archive.start_dir
    whole = path.read_bytes()
    found = 0
    for place in range(8 * begin, 8 * len(whole), 3):
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        found += restart.find_zip_damage(path) is not None
    assert found > 100  # whatever is not dates, versions and attributes


# ---- latest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"global_step2\xb0", "latest cannot be read"),
        (b"global_step24", "latest names 'global_step24', which is not there"),
        (b"global\x00step20", "latest "),
        (b"", "latest names '', which is not there"),
    ],
)
def test_latest_that_names_nothing_is_damage(checkpoint: Path, text: bytes, message: str) -> None:
    folder = checkpoint.parent
    assert find_latest_damage(folder) is None  # none at all
    (folder / "latest").write_text(checkpoint.name)
    assert find_latest_damage(folder) is None
    (folder / "latest").write_bytes(text)
    assert str(find_latest_damage(folder)).startswith(message)
    assert restart.choose(folder, find_damage=find_damage).tag == checkpoint.name


# ---- many random damages


def _bit(path: Path, chance: random.Random) -> str:
    place, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
    _flip(path, place, bit)
    return f"bit {bit} of byte {place}"


def _hole(path: Path, chance: random.Random) -> str:
    size = path.stat().st_size
    begin = chance.randrange(size)
    length = min(65536, size - begin)
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(bytes(length))
    return f"hole at {begin}"


def _cut(path: Path, chance: random.Random) -> str:
    size = chance.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size}"


@pytest.mark.parametrize(
    ("hurt", "rounds"), [(_bit, 1500), (_hole, 300), (_cut, 300)], ids=["bit", "hole", "cut"]
)
def test_random_damage_in_any_file_is_found(
    tmp_path: Path, hurt: Callable[[Path, random.Random], str], rounds: int
) -> None:
    """In headers, payload, tables of contents, manifests and the record alike."""
    path = make_checkpoint(tmp_path, 20)
    originals = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    record = restart.read_record(path)
    chance = random.Random(rounds)
    seen = set()
    for number in range(rounds):
        file = list(originals)[number % len(originals)]
        what = hurt(file, chance)
        if file.read_bytes() == originals[file]:
            continue  # a hole where zeros were
        is_found = not verify(path, threads=1).is_ok
        # The one change that is none: an E for an e in a number.
        is_same = file.name == restart.RECORD_FILE and restart.read_record(path) == record
        assert is_found or is_same, f"{file.name}: {what} was not found"
        seen.add(file.name)
        file.write_bytes(originals[file])
    assert seen == {p.name for p in originals}
    assert verify(path).is_ok


def test_bits_all_over_the_record_and_a_small_torch_file_count(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 20)
    for name in ("lowtide.json", "layers/layer_2.pt"):
        whole = (path / name).read_bytes()
        record = restart.read_record(path)
        is_record = name == "lowtide.json"
        for place in range(0, 8 * len(whole), 3 if is_record else 5):
            broken = bytearray(whole)
            broken[place // 8] ^= 1 << place % 8
            (path / name).write_bytes(broken)
            if is_record:
                assert restart.read_record(path) in (None, record), place
            else:
                assert verify(path, threads=1, part=(0, 6)).damage, place
        (path / name).write_bytes(whole)


# ---- choose with the deep check


@pytest.mark.parametrize("victim", [MODEL, OPTIM, "layers/layer_2.pt", MANIFEST, "lowtide.json"])
def test_choose_falls_back_when_the_newest_is_damaged(tmp_path: Path, victim: str) -> None:
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    chance = random.Random(victim)
    for step in (30, 20):
        assert restart.choose(tmp_path, find_damage=find_damage).step == step
        _bit(tmp_path / f"global_step{step}" / victim, chance)
    choice = restart.choose(tmp_path, world_size=2, find_damage=find_damage)
    assert (choice.tag, choice.step, len(choice.skipped)) == ("global_step10", 10, 2)
    assert "checkpoint global_step30 is not used: " in choice.skipped[0]
    fast = partial(find_damage, mode="fast", threads=1)
    assert restart.choose(tmp_path, find_damage=fast).step in (10, 20, 30)


def test_package_gives_the_function_also_after_its_home_was_imported() -> None:
    code = (
        "import lowtide.checkpoint.store.integrity, lowtide.checkpoint.store.catalog, sys; "
        "from lowtide.checkpoint import list_checkpoints, verify; "
        "sys.exit(not callable(verify) or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lowtide.checkpoint.nothing


def test_manifests_of_the_helper_are_the_real_ones(checkpoint: Path) -> None:
    names = {
        name
        for i in range(2)
        for name in read_manifest(checkpoint / f"manifest-{i:05d}.json").files
    }
    assert names == {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*.pt")}
