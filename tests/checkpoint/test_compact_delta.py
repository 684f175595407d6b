"""References to earlier checkpoints, and files that are damaged or forged."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint.compact import SUFFIX
from lowtide.checkpoint.compact import encode as compact_encode
from lowtide.checkpoint.compact import file as compact_file
from lowtide.checkpoint.compact.copies import bases_of, beside, expand, expand_files, is_compact
from lowtide.checkpoint.compact.file import read_table
from lowtide.checkpoint.store.manifest import manifest_name, read_manifest
from lowtide.core.codec import codecs
from lowtide.core.errors import CheckpointError
from tests.checkpoint.small_copies import (
    MIB,
    NAME,
    Ratios,
    assert_gives,
    checkpoint,
    contents,
    encodings,
    records_of,
    shrink,
)

FILE = f"{NAME}{SUFFIX}"


def frozen(step: int) -> dict[str, Any]:
    """A state of which a third never changes and of a third only its end."""
    noise = torch.Generator().manual_seed(5)
    weights = {"frozen": torch.randn(700_000, generator=noise)}
    weights["embedding"] = torch.randn(700_000, generator=noise)
    weights["embedding"][-5:] = step
    weights["head"] = torch.randn(700_000, generator=torch.Generator().manual_seed(step))
    return {"module": weights, "step": step}


def attempt(step: int) -> str:
    return f"{step:016x}"


def make(folder: Path, step: int, *, state: Any = None) -> Path:
    states = {NAME: frozen(step) if state is None else state}
    return checkpoint(folder / "fast" / f"step{step}", states, step=step, attempt=attempt(step))


def chain(folder: Path, length: int, **settings: Any) -> list[tuple[Path, Path]]:
    """Save `length` checkpoints, each small one beside and on top of the one before."""
    made: list[tuple[Path, Path]] = []
    for step in range(1, length + 1):
        original = make(folder, step)
        base = made[-1][1] if made else None
        small = shrink(original, folder / "slow" / original.name, base=base, delta=True, **settings)
        made.append((original, small))
    return made


def test_what_has_not_changed_is_a_reference(tmp_path: Path) -> None:
    (_, first), (original, second) = chain(tmp_path, 2)
    records = records_of(second)
    assert encodings(records["module/frozen"]) == {"base"}
    assert [b.encoding for b in records["module/embedding"].blocks] == ["base", "base", "codec"]
    assert encodings(records["module/head"]) == {"codec"}
    assert bases_of(first) == set()
    assert bases_of(second) == {("step1", attempt(1))}
    assert sum(map(len, contents(second).values())) < 0.55 * sum(map(len, contents(first).values()))
    assert_gives(second, original, tmp_path / "again")


def test_without_the_setting_there_are_no_references(tmp_path: Path) -> None:
    one, two = make(tmp_path, 1), make(tmp_path, 2)
    first = shrink(one, tmp_path / "slow" / "step1")
    second = shrink(two, tmp_path / "slow" / "step2", base=first)
    assert bases_of(second) == set()


def test_no_base_is_named_when_nothing_is_the_same(tmp_path: Path) -> None:
    states = [{"module": torch.randn(5000)} for _ in range(2)]
    first, second = (make(tmp_path, n, state=state) for n, state in enumerate(states, start=1))
    base = shrink(first, tmp_path / "slow" / "step1", delta=True)
    small = shrink(second, tmp_path / "slow" / "step2", base=base, delta=True)
    assert bases_of(small) == set()
    assert read_table(small / FILE).depth == 0


def test_a_chain_ends_when_it_has_reached_its_limit(tmp_path: Path) -> None:
    made = chain(tmp_path, 6, max_chain=2)
    depths = [read_table(small / FILE).depth for _, small in made]
    assert depths == [0, 1, 2, 0, 1, 2]
    for original, small in made:
        assert_gives(small, original, tmp_path / f"again {original.name}")
    assert bases_of(made[3][1]) == set()
    assert bases_of(made[5][1]) == {("step5", attempt(5))}


def test_equal_checksums_are_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = make(tmp_path, 1), make(tmp_path, 2)
    for module in (compact_encode, compact_file):
        monkeypatch.setattr(module, "crc32", lambda _data, seed=0: 7)
    monkeypatch.setattr(compact_encode._Source, "check", lambda self: None)
    base = shrink(one, tmp_path / "slow" / "step1", delta=True)
    small = shrink(two, tmp_path / "slow" / "step2", base=base, delta=True)
    assert encodings(records_of(small)["module/head"]) == {"codec"}
    assert encodings(records_of(small)["module/frozen"]) == {"base"}


def test_the_base_is_only_read_where_checksums_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shrink(make(tmp_path, 1), tmp_path / "slow" / "step1", delta=True)
    two, read = make(tmp_path, 2), []
    original = compact_file.CompactFile.read

    def noted(self: Any, record: Any, number: int) -> bytes:
        read.append((record.path.removeprefix("module/"), number))
        return original(self, record, number)

    monkeypatch.setattr(compact_file.CompactFile, "read", noted)
    shrink(two, tmp_path / "slow" / "step2", base=base, delta=True)
    same = [("frozen", 0), ("frozen", 1), ("frozen", 2), ("embedding", 0), ("embedding", 1)]
    assert read == same


def test_other_sizes_and_names_are_stored_in_full(tmp_path: Path) -> None:
    same = torch.randn(5000)
    one = make(tmp_path, 1, state={"module": {"a": same, "b": same.clone()}})
    two = make(tmp_path, 2, state={"module": {"a": same[:4000].clone(), "c": same.clone()}})
    base = shrink(one, tmp_path / "slow" / "step1", delta=True)
    small = shrink(two, tmp_path / "slow" / "step2", base=base, delta=True)
    assert_gives(small, two, tmp_path / "again")
    # A checkpoint without this file, or that is not compact, is no base either.
    for name in ("none", "fast/step1"):
        small = shrink(two, tmp_path / name.replace("/", " "), base=tmp_path / name, delta=True)
        assert bases_of(small) == set()


# ---- links that are gone


def test_expanding_names_the_link_when_it_is_missing(tmp_path: Path) -> None:
    made = chain(tmp_path, 3)
    shutil.rmtree(made[0][1])
    for _, small in made[1:]:
        with pytest.raises(CheckpointError, match=r"step1/.*cannot be read .*checkpoint step1 is"):
            expand(small, tmp_path / "again", find_base=beside(small))
    assert not (tmp_path / "again").exists()


def test_expanding_names_the_link_when_it_is_damaged(tmp_path: Path) -> None:
    made = chain(tmp_path, 3)
    path = made[0][1] / FILE
    raw = bytearray(path.read_bytes())
    record = next(r for r in read_table(path).records if r.path == "module/frozen")
    raw[record.position + 900] ^= 1
    path.write_bytes(raw)
    for original, small in made[1:]:
        with pytest.raises(CheckpointError, match=r"step1/.*: block 0 of module/frozen"):
            expand(small, tmp_path / "again", find_base=beside(small))
        assert not (tmp_path / "again").exists()
        # Such a checkpoint is not referred to any more, and what is made of it is whole.
        fresh = shrink(
            original, tmp_path / "slow" / f"fresh {small.name}", base=made[0][1], delta=True
        )
        found = records_of(fresh)["module/frozen"].blocks
        assert [b.encoding for b in found] == ["codec", "base", "base"]
    raw[-1] ^= 1
    path.write_bytes(raw)
    fresh = shrink(made[2][0], tmp_path / "slow" / "whole", base=made[0][1], delta=True)
    assert bases_of(fresh) == set()
    assert_gives(fresh, made[2][0], tmp_path / "whole")


def test_expanding_refuses_a_link_of_another_attempt(tmp_path: Path) -> None:
    made = chain(tmp_path, 2)
    other = checkpoint(tmp_path / "other" / "step1", {NAME: frozen(1)}, attempt="f" * 16)
    shutil.rmtree(made[0][1])
    shrink(other, made[0][1])
    text = f"attempt {'f' * 16}, not .* of attempt {attempt(1)} of checkpoint step1"
    with pytest.raises(CheckpointError, match=text):
        expand(made[1][1], tmp_path / "again", find_base=beside(made[1][1]))


# ---- damage


def expands(small: Path, target: Path) -> None:
    manifest = read_manifest(small / manifest_name(0))
    target.mkdir(exist_ok=True)
    expand_files(small, target, manifest=manifest, find_base=beside(small))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small checkpoint with every encoding but lossy, and a base."""
    noise = torch.frombuffer(bytearray(random.Random(0).randbytes(6000)), dtype=torch.uint8)
    same = torch.arange(1500)
    states = {
        n: {"module": {"raw": noise * n, "same": same, "n": torch.arange(n, 1100 + n)}}
        for n in (1, 3)
    }
    one, two = (make(tmp_path, n, state=state) for n, state in states.items())
    base = shrink(one, tmp_path / "slow" / "step1", delta=True)
    made = shrink(two, tmp_path / "slow" / "step3", base=base, delta=True)
    kinds = set().union(*(encodings(r) for r in records_of(made).values()))
    assert kinds == {"raw", "codec", "base"}
    return made


def test_any_flipped_bit_is_noticed(tmp_path: Path, small: Path) -> None:
    raw = (small / FILE).read_bytes()
    expands(small, tmp_path / "again")
    rng = random.Random(1)
    for place in rng.sample(range(8 * len(raw)), 3000):
        hurt = bytearray(raw)
        hurt[place // 8] ^= 1 << place % 8
        (small / FILE).write_bytes(hurt)
        with pytest.raises(CheckpointError, match=FILE):
            expands(small, tmp_path / "again")


def test_any_flipped_bit_is_noticed_when_there_is_no_sum_of_the_whole(tmp_path: Path) -> None:
    codecs.register(Ratios.codec_id, Ratios)
    try:
        noise = torch.frombuffer(bytearray(random.Random(0).randbytes(6000)), dtype=torch.uint8)
        states = {0: {"exp_avg": torch.randn(1500), "other": noise}}
        original = make(tmp_path, 1, state={"state": states})
        small = shrink(original, tmp_path / "slow" / "step1", moments="test.ratios")
        kinds = set().union(*(encodings(r) for r in records_of(small).values()))
        assert kinds == {"lossy", "raw"}
        raw = (small / FILE).read_bytes()
        expands(small, tmp_path / "again")
        for place in random.Random(1).sample(range(8 * len(raw)), 800):
            hurt = bytearray(raw)
            hurt[place // 8] ^= 1 << place % 8
            (small / FILE).write_bytes(hurt)
            with pytest.raises(CheckpointError, match=FILE):
                expands(small, tmp_path / "again")
    finally:
        codecs.unregister(Ratios.codec_id)


def test_every_truncation_and_extension_is_noticed(tmp_path: Path, small: Path) -> None:
    raw = (small / FILE).read_bytes()
    lengths = [*range(30), *range(len(raw) - 40, len(raw)), *range(30, len(raw), 101)]
    for part in [raw[:length] for length in lengths] + [raw + b"\0", raw + raw]:
        (small / FILE).write_bytes(part)
        with pytest.raises(CheckpointError, match=FILE):
            expands(small, tmp_path / "again")


def forge(path: Path, change: Any) -> None:
    """Change the table of a compact file; its checksum holds."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw, len(raw) - 16)
    begin = len(raw) - 16 - length
    table = change(json.loads(raw[begin:-16]))
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    size = struct.pack("<Q", len(text))
    crc = zlib.crc32(raw[:8] + text + size)
    path.write_bytes(raw[:begin] + text + size + struct.pack("<I4s", crc, b"LTCF"))


HUGE = 1 << 62
BLOCK = ["codec", 1, 1]
FORGERIES: dict[str, Any] = {
    "size": lambda t: t | {"size_bytes": HUGE},
    "size and one record": lambda t: t | {"size_bytes": HUGE, "records": [
        t["records"][0] | {"size_bytes": HUGE}]},
    "many chunks": lambda t: t | {"chunk_bytes": 1},
    "no chunks": lambda t: t | {"chunk_bytes": 0},
    "negative": lambda t: t | {"size_bytes": -1},
    "true": lambda t: t | {"depth": True},
    "float": lambda t: t | {"size_bytes": float(t["size_bytes"])},
    "rest": lambda t: t | {"rest": t["rest"] | {"size_bytes": HUGE}},
    "blocks": lambda t: t | {"rest": t["rest"] | {"blocks": [BLOCK] * 9999}},
    "more blocks": lambda t: t | {"rest": t["rest"] | {"blocks": [
        *t["rest"]["blocks"], ["base", 0, 1]]}},
    "long block": lambda t: t | {"rest": t["rest"] | {"blocks": [["raw", HUGE, 1]]}},
    "long codec block": lambda t: t | {"rest": t["rest"] | {"blocks": [["codec", HUGE, 1]]}},
    "short block": lambda t: t | {"rest": t["rest"] | {"blocks": [BLOCK]}},
    "encoding": lambda t: t | {"rest": t["rest"] | {"blocks": [
        ["zip", *t["rest"]["blocks"][0][1:]]]}},
    "first position": lambda t: t | {"records": [
        t["records"][0] | {"position": 0}, *t["records"][1:]]},
    "order": lambda t: t | {"records": [
        r | {"offset": other["offset"]}
        for r, other in zip(t["records"], t["records"][::-1], strict=True)]},
    "position": lambda t: t | {"rest": t["rest"] | {"position": 0}},
    "offset": lambda t: t | {"records": [r | {"offset": 5} for r in t["records"]]},
    "offset beyond": lambda t: t | {"records": [
        *t["records"][:-1], t["records"][-1] | {"offset": HUGE}]},
    "base above": lambda t: t | {"base": ["..", t["base"][1]]},
    "base outside": lambda t: t | {"base": ["../step1", t["base"][1]]},
    "no base": lambda t: t | {"base": None},
    "itself": lambda t: t | {"base": ["step3", t["attempt"]]},
    "depth": lambda t: t | {"depth": 0},
    "name": lambda t: t | {"name": "../x"},
    "attempt": lambda t: t | {"attempt": "0"},
    "checksums": lambda t: t | {"crc32": t["crc32"][::-1]},
    "role": lambda t: t | {"rest": t["rest"] | {"role": "king"}},
    "dtype": lambda t: t | {"rest": t["rest"] | {"dtype": "object"}},
    "more": lambda t: t | {"rest": t["rest"] | {"more": 1}},
    "list": lambda t: [t],
    "null": lambda t: None,
    "brackets": lambda t: b"[" * 200_000,
    "no text": lambda t: b"\xff\xfe",
    "nothing": lambda t: b"",
}  # fmt: skip


# What is not wrong in itself shows when it is used; everything else is refused before that.
USED = {
    "no base": "refers to a checkpoint but names none",
    "itself": "refers to as many others",
    "depth": "refers to as many others",
    "name": f"is ../x of attempt {attempt(3)}, not",
    "attempt": "of attempt 0, not of",
    "checksums": "does not give the file that it was made of",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_table_is_refused_without_much_memory(
    tmp_path: Path, small: Path, name: str
) -> None:
    forge(small / FILE, FORGERIES[name])
    text = USED.get(name, f"{FILE}: is not a whole compact file")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=text):
            expands(small, tmp_path / "again")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB


def test_a_length_beyond_the_file_is_refused(tmp_path: Path, small: Path) -> None:
    raw = bytearray((small / FILE).read_bytes())
    for length in (len(raw), HUGE, (1 << 64) - 1):
        raw[-16:-8] = struct.pack("<Q", length)
        (small / FILE).write_bytes(raw)
        with pytest.raises(CheckpointError, match="does not end with a table"):
            expands(small, tmp_path / "again")


def test_another_format_is_refused(tmp_path: Path, small: Path) -> None:
    raw = bytearray((small / FILE).read_bytes())
    raw[4] = 9
    (small / FILE).write_bytes(raw)
    with pytest.raises(CheckpointError, match="its format is 9, known is 1"):
        expands(small, tmp_path / "again")


def test_a_pipe_or_folder_in_place_of_the_file_is_refused(tmp_path: Path, small: Path) -> None:
    (small / FILE).unlink()
    os.mkfifo(small / FILE)
    with pytest.raises(CheckpointError, match="is not a file"):
        expands(small, tmp_path / "again")
    (small / FILE).unlink()
    (small / FILE).mkdir()
    with pytest.raises(CheckpointError, match=FILE):
        expands(small, tmp_path / "again")
    with pytest.raises(CheckpointError, match=FILE):
        bases_of(small)


def test_a_folder_without_a_record_is_not_compact(small: Path) -> None:
    assert is_compact(small)
    (small / "lowtide.json").unlink()
    assert not is_compact(small)
    assert bases_of(small) == set()
