"""Small copies of checkpoints give back every bit, whatever the files are."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lowtide.checkpoint import verify
from lowtide.checkpoint.compact import SUFFIX
from lowtide.checkpoint.compact.copies import beside, expand, is_compact
from lowtide.checkpoint.compact.file import read_table
from lowtide.checkpoint.compact.records import find_records
from lowtide.cli import app
from lowtide.core.codec import codecs
from lowtide.core.errors import CheckpointError
from tests.checkpoint import plans
from tests.checkpoint.small_copies import (
    MIB,
    NAME,
    Save,
    Steps,
    adam,
    assert_gives,
    checkpoint,
    contents,
    records_of,
    role,
    shrink,
)
from tests.helpers.checkpoints import make_checkpoint

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)


@pytest.fixture(autouse=True)
def _steps_codec() -> Iterator[None]:
    codecs.register(Steps.codec_id, Steps)
    yield
    codecs.unregister(Steps.codec_id)


@pytest.mark.parametrize("save", [torch.save, plans.save], ids=["torch", "lowtide"])
def test_every_bit_comes_back_when_lossless(tmp_path: Path, save: Save) -> None:
    model = {
        "module": {"w": torch.randn(400_000).bfloat16()},
        "note": "x" * 9000,
        "n": np.arange(5),
    }
    states = {NAME: adam(), "layers/model.pt": model, "empty.bin": b"", "notes.txt": b'{"a": 1}'}
    original = checkpoint(tmp_path / "fast" / "step1", states, save=save)
    small = shrink(original, tmp_path / "slow" / "step1")
    assert is_compact(small)
    assert not is_compact(original)
    assert verify(small).is_ok
    assert_gives(small, original, tmp_path / "again")
    assert sum(map(len, contents(small).values())) < 0.95 * sum(
        map(len, contents(original).values())
    )


def test_all_ranks_come_back_when_there_are_several(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path, 7, ranks=3)
    small = shrink(original, tmp_path / "slow" / "global_step7")
    assert_gives(small, original, tmp_path / "again" / "global_step7")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_bit_comes_back_when_states_are_random(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("random")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    state: dict[Any, Any] = {}
    for number in range(data.draw(st.integers(0, 5))):
        dtype = data.draw(st.sampled_from(DTYPES))
        count = data.draw(st.sampled_from([0, 1, 2, 511, 512, 513, 1024, 4096, 140_001, 600_000]))
        nbytes = count * dtype.itemsize
        # Any bits at all: NaNs with payloads, infinities, denormals; or something compressible.
        is_noise = data.draw(st.booleans())
        raw = rng.bytes(nbytes) if is_noise else bytes(rng.integers(0, 3, nbytes, dtype=np.uint8))
        empty = torch.empty(count, dtype=dtype)
        bits = torch.frombuffer(bytearray(raw), dtype=dtype) if count else empty
        state[data.draw(st.sampled_from([number, f"k{number}", "exp_avg"]))] = bits
        if data.draw(st.booleans()):
            state[f"view {number}"] = bits[count // 2 :]
    save = data.draw(st.sampled_from([torch.save, plans.save]))
    original = checkpoint(folder / "step1", {NAME: {"state": {0: state}}}, save=save)
    small = shrink(original, folder / "slow" / "step1", moments="test.steps")
    table = read_table(small / f"{NAME}{SUFFIX}")
    if table.is_lossy:
        expand(small, folder / "again", find_base=beside(small))
        assert verify(folder / "again").is_ok
    else:
        assert_gives(small, original, folder / "again")


def test_other_files_come_back_when_they_are_no_torch_files(tmp_path: Path) -> None:
    legacy, packed = tmp_path / "legacy.pt", tmp_path / "packed.pt"
    torch.save({"x": torch.randn(90_000)}, legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(3 * MIB))
        archive.writestr("archive/data.pkl", b"no pickle at all")
    with zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
        archive.writestr("archive/data/0", bytes(2 * MIB))
        archive.filelist *= 2  # one member under two entries: they overlap
    noise = random.Random(0).randbytes(2 * MIB + 5)
    states = {"a.pt": legacy.read_bytes(), "b.pt": packed.read_bytes(), "c.pt": noise,
              "d.pt": packed.read_bytes()[:-30], "e.pt": b"PK\5\6" + bytes(18),
              "f.pt": (tmp_path / "twice.pt").read_bytes()}  # fmt: skip
    original = checkpoint(tmp_path / "step1", states)
    small = shrink(original, tmp_path / "slow" / "step1", moments="test.steps")
    assert_gives(small, original, tmp_path / "again")
    assert all(r.role == "other" for n in states for r in records_of(small, n).values())


def test_memory_is_a_few_blocks_when_a_file_is_large(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "step1", {NAME: {"x": torch.zeros(64 * MIB // 4)}})
    small_bytes = 24 * MIB
    tracemalloc.start()
    try:
        small = shrink(original, tmp_path / "slow" / "step1")
        expand(small, tmp_path / "again", find_base=beside(small))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < small_bytes


@pytest.mark.parametrize("save", [torch.save, plans.save], ids=["torch", "lowtide"])
def test_roles_are_read_from_the_pickle(tmp_path: Path, save: Save) -> None:
    big = lambda: torch.randn(2000)  # noqa: E731
    shared, twice = big(), {"exp_avg": big()}
    state = {
        "module": {"exp_avg": big(), "state": {"exp_avg_sq": big()}},
        "optimizer_state_dict": {
            "base_optimizer_state": [{"exp_avg": big(), "exp_avg_sq": big(), "other": big()}],
            "single_partition_of_fp32_groups": [big(), torch.nn.Parameter(big())],
            "state": {1: {"exp_avg": shared, "twice": twice}},
        },
        "alias": shared,
        "ema": {"exp_avg": big(), "module": big()},
        "elsewhere": twice,
        "tiny": torch.randn(3),
    }
    save(state, tmp_path / "x.pt")
    found = find_records(tmp_path / "x.pt", (tmp_path / "x.pt").stat().st_size)
    inner = "optimizer_state_dict"
    roles = {r.path: r.role for r in found if r.path not in ("alias", f"{inner}/state/1/exp_avg")}
    for path in ("elsewhere/exp_avg", f"{inner}/state/1/twice/exp_avg"):
        assert roles.pop(path, "other") == "other", "memory with two roles has none"
    assert roles == {
        "module/exp_avg": "weights",
        "module/state/exp_avg_sq": "weights",
        f"{inner}/base_optimizer_state/0/exp_avg": "moment",
        f"{inner}/base_optimizer_state/0/exp_avg_sq": "second moment",
        f"{inner}/base_optimizer_state/0/other": "other",
        f"{inner}/single_partition_of_fp32_groups/0": "master",
        f"{inner}/single_partition_of_fp32_groups/1": "master",
        "ema/exp_avg": "other",
        "ema/module": "other",
    }
    assert [r.role for r in found if r.path in ("alias", f"{inner}/state/1/exp_avg")] == ["other"]
    assert {r.dtype for r in found} == {"float32"}


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    states = {NAME: {"evil": Evil(tmp_path / "touched"), "module": torch.zeros(5000)}}
    small = shrink(checkpoint(tmp_path / "step1", states), tmp_path / "slow" / "step1")
    assert role(small, "weights").size_bytes == 20_000
    expand(small, tmp_path / "again", find_base=beside(small))
    assert not (tmp_path / "touched").exists()


def test_a_damaged_source_is_not_copied(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "step1", {NAME: adam(count=20_000)})
    raw = (original / NAME).read_bytes()
    for number, place in enumerate([0, 70, 30_000, len(raw) // 2, len(raw) - 1]):
        hurt = bytearray(raw)
        hurt[place] ^= 4
        (original / NAME).write_bytes(hurt)
        begin = place // 4096 * 4096
        with pytest.raises(CheckpointError, match=f"bytes {begin} to .* have changed on its disk"):
            shrink(original, tmp_path / "slow" / f"step{number}", moments="test.steps")
    (original / NAME).write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match=f"has {len(raw) - 1} bytes, {len(raw)} were written"):
        shrink(original, tmp_path / "slow" / "short")
    (original / NAME).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read or written \(No such file"):
        shrink(original, tmp_path / "slow" / "gone")


def test_expanding_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "fast" / "step1", {"a.txt": b"{}", NAME: adam(count=9000)})
    with pytest.raises(CheckpointError, match="is not a complete compact checkpoint"):
        expand(original, tmp_path / "again", find_base=beside(original))
    small = shrink(original, tmp_path / "slow" / "step1")
    with pytest.raises(CheckpointError, match=r"slow: exists; remove it"):
        expand(small, tmp_path / "slow", find_base=beside(small))
    (small / f"{NAME}{SUFFIX}").unlink()
    with pytest.raises(CheckpointError, match=f"{NAME}{SUFFIX}: cannot be read"):
        expand(small, tmp_path / "out" / "again", find_base=beside(small))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "step1", {NAME: adam(count=9000)})
    two = checkpoint(tmp_path / "step2", {NAME: adam(count=9000)}, attempt="b" * 16)
    small, other = (shrink(c, tmp_path / "slow" / c.name) for c in (one, two))
    os.replace(other / f"{NAME}{SUFFIX}", small / f"{NAME}{SUFFIX}")
    with pytest.raises(CheckpointError, match=f"attempt {'b' * 16}, not of {'a' * 16}"):
        expand(small, tmp_path / "again", find_base=beside(small))


@pytest.mark.parametrize("is_json", [False, True])
def test_the_command_expands(tmp_path: Path, is_json: bool) -> None:
    original = checkpoint(tmp_path / "step1", {NAME: adam(count=9000)})
    small = shrink(original, tmp_path / "slow" / "step1")
    arguments = ["checkpoint", "expand", str(small), str(tmp_path / "again")]
    result = CliRunner().invoke(app, [*arguments, "--json"] if is_json else arguments)
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "again") == contents(original)
    if is_json:
        size_bytes = (original / NAME).stat().st_size
        assert json.loads(result.stdout)["files"] == {NAME: size_bytes}
    else:
        assert "again: 1 files, " in result.stdout
