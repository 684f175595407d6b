"""What will be loaded is read once: the bytes that were checked are the bytes that are loaded."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.store import finding, scan
from lowtide.checkpoint.store.finding import Finder
from lowtide.checkpoint.store.integrity import Share, verify_share
from lowtide.checkpoint.store.scan import HeldRun
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import read_record
from tests.checkpoint.ranks import DETAILS, file_name, make_boards, on_all, savers
from tests.checkpoint.test_saver import wait_all
from tests.checkpoint.test_torch_file import assert_same
from tests.helpers.checkpoints import make_checkpoint

MODEL = "mp_rank_00_model_states.pt"
OTHER = "layers/layer_1.pt"  # which no rank says that it will load
BIG = 3 << 20  # elements: chunks of 4 MiB, and storages that are mapped page by page


def states(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        file_name(0): {"flat": some(BIG // 8), "step": step},
        file_name(1): {"flat": some(BIG), "small": [torch.ones(7) * step], "step": step},
        MODEL: {"module": {"w": some(50, 50), "b": some(50)}, "step": step},
        OTHER: {"x": some(1000)},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the checkpoints of steps 1 and 2, of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    with savers(2) as all_savers:
        for step in (1, 2):

            def save_one(saver: Any, step: int = step) -> None:
                rank = saver.board.rank
                saver.begin(folder, f"step{step}", step=step, details=DETAILS)
                for name, state in states(step).items():
                    if (name == file_name(1)) == (rank == 1):
                        saver.add(state, name, is_stable=lambda _: True)
                saver.end()

            on_all([lambda s=saver: save_one(s) for saver in all_savers])  # type: ignore[misc]
            assert wait_all(all_savers) == [True, True]
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "checkpoints")


def wanted_by(rank: int) -> Callable[[Path], Collection[str]]:
    return lambda _checkpoint: [MODEL, file_name(rank), "not_there.pt"]


def finders(mode: Any = "full", world_size: int = 2) -> list[Finder]:
    boards = make_boards(world_size)
    return [Finder(board, mode, wanted=wanted_by(board.rank)) for board in boards]


def find(all_finders: list[Finder], folder: Path, tag: str | None = None) -> list[Any]:
    def one(finder: Finder) -> Any:
        try:
            return finder.find([folder], tag, parts=2)
        except CheckpointError as error:
            return str(error)

    return on_all([lambda f=finder: one(f) for finder in all_finders])  # type: ignore[misc]


def held(finder: Finder, checkpoint: Path) -> dict[str, Any]:
    """Take everything; return what is in it, by name."""
    images = {name: finder.take(checkpoint / name) for name in states(1)}
    return {name: image.load() for name, image in images.items() if image is not None}


def test_each_rank_gets_what_it_will_load(folder: Path) -> None:
    both = finders()
    found = find(both, folder)
    assert [each.name for each in found] == ["step2", "step2"]
    for rank, finder in enumerate(both):
        expected = {name: states(2)[name] for name in (file_name(rank), MODEL)}
        loaded = held(finder, folder / "step2")
        assert loaded.keys() == expected.keys()
        for name in expected:
            assert_same(loaded[name], expected[name])
        assert finder.take(folder / "step2" / MODEL) is None, "a second time it is somebody else's"


def test_nothing_is_held_after_the_load_or_the_next_search(folder: Path) -> None:
    both = finders()
    find(both, folder)
    both[0].forget()
    assert held(both[0], folder / "step2") == {}
    shutil.rmtree(folder / "step1")
    shutil.rmtree(folder / "step2")
    find(both, folder)
    assert held(both[1], folder / "step2") == {}


def flip(path: Path, place: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def check_fallback(folder: Path, text: str) -> None:
    both = finders()
    first, second = find(both, folder)
    assert first == second
    assert first.name == "step1"
    assert text in "".join(first.skipped)
    for rank, finder in enumerate(both):
        assert held(finder, folder / "step2") == {}
        loaded = held(finder, folder / "step1")
        assert_same(loaded[file_name(rank)], states(1)[file_name(rank)])
    both = finders()
    asked = find(both, folder, tag="step2")
    assert asked[0] == asked[1]
    assert [held(finder, folder / "step2") for finder in both] == [{}, {}]
    assert isinstance(asked[0], str)
    assert text in asked[0]


def places(whole: Path, name: str) -> list[int]:
    """Return places in every record and every part of a file's structure."""
    reader = torch._C.PyTorchFileReader(str(whole / "step2" / name))
    size = (whole / "step2" / name).stat().st_size
    found = [0, 30, size - 1, size - 23]
    for record in reader.get_all_records():
        begin = reader.get_record_offset(record)
        found += [begin, begin - 1]
    return found


@pytest.mark.parametrize("name", [file_name(0), file_name(1), MODEL, OTHER])
def test_a_flipped_bit_in_any_record_is_found_by_all(whole: Path, folder: Path, name: str) -> None:
    path = folder / "step2" / name
    random.seed(0)
    size = path.stat().st_size
    for place in [*places(whole, name), *(random.randrange(size) for _ in range(3))]:
        bit = random.randrange(8)
        flip(path, place, bit)
        found = find(finders(), folder)
        assert found[0] == found[1]
        assert found[0].name == "step1", f"bit {bit} of byte {place}"
        flip(path, place, bit)
    flip(path, size // 2)
    check_fallback(folder, f"{name} bytes ")


@pytest.mark.parametrize("name", [file_name(1), MODEL, OTHER])
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, "),
        (lambda path: os.truncate(path, path.stat().st_size // 2 // 4096 * 4096), "bytes, "),
        (lambda path: os.truncate(path, 0), "bytes, "),
        (lambda path: os.truncate(path, path.stat().st_size + 1), "bytes, "),
        (lambda path: shutil.copy(str(path).replace("step2", "step1"), path), ""),
        (lambda path: (path.unlink(), path.mkdir()), ""),
    ],
)
def test_missing_cut_and_older_files_are_found_by_all(
    folder: Path, name: str, damage: Callable[[Path], Any], text: str
) -> None:
    damage(folder / "step2" / name)
    check_fallback(folder, text)


def test_a_file_that_is_cut_while_it_is_read_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "step2" / file_name(1)
    read = HeldRun._crc32

    def late(run: HeldRun, descriptor: int, byte_range: tuple[int, int]) -> int | None:
        if run.path == path and byte_range[0] > 0:
            os.truncate(path, byte_range[0] + 4096)
        return read(run, descriptor, byte_range)

    monkeypatch.setattr(HeldRun, "_crc32", late)
    check_fallback(folder, f"{file_name(1)} ")


def test_a_disk_that_fails_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, buffers: Any, offset: int) -> int:
        if offset == 4 << 20 and os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, buffers, offset)

    path, preadv = folder / "step2" / file_name(1), os.preadv
    monkeypatch.setattr(os, "preadv", fail)
    check_fallback(folder, f"{file_name(1)} cannot be read (Input/output error)")


def test_a_file_replaced_after_the_check_is_not_what_is_loaded(folder: Path) -> None:
    both = finders()
    find(both, folder)
    for name in (file_name(0), file_name(1), MODEL):
        path = folder / "step2" / name
        for place in range(0, path.stat().st_size, 1000):
            flip(path, place)
        path.unlink()
        path.write_bytes(b"something else")
    for rank, finder in enumerate(both):
        loaded = held(finder, folder / "step2")
        for name in (file_name(rank), MODEL):
            assert_same(loaded[name], states(2)[name])


def test_shares_together_read_everything_and_each_byte_once_but_for_what_many_load(
    folder: Path,
) -> None:
    checkpoint = folder / "step2"
    sizes = {name: (checkpoint / name).stat().st_size for name in states(2)}
    reports = [verify_share(checkpoint, Share(rank=rank), world_size=2) for rank in range(2)]
    assert sum(report.read_bytes for report in reports) == sum(sizes.values())
    shares = [Share(rank=rank, wanted=list(wanted_by(rank)(checkpoint))) for rank in range(2)]
    reports = [verify_share(checkpoint, share, world_size=2) for share in shares]
    assert sum(report.read_bytes for report in reports) == sum(sizes.values()) + sizes[MODEL]
    for share in shares:
        for name, image in share.images.items():
            assert image.view(0, sizes[name]) == (checkpoint / name).read_bytes()


def test_files_are_checked_but_not_held_where_that_is_not_possible(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    def nothing_held(all_finders: list[Finder]) -> None:
        assert [each.name for each in find(all_finders, folder)] == ["step2"] * len(all_finders)
        for finder in all_finders:
            assert held(finder, folder / "step2") == {}

    nothing_held(finders(world_size=1))  # two ranks wrote it
    nothing_held(finders(world_size=3))
    nothing_held(finders("fast"))
    nothing_held(finders("off"))
    with monkeypatch.context() as patch:
        patch.setattr("lowtide.checkpoint.files.image.mmap.mmap", no_memory)
        nothing_held(finders())
    monkeypatch.setattr(finding, "memory_share_bytes", lambda _divisor: 1000)
    nothing_held(finders())
    flip(folder / "step2" / file_name(1), 5_000_000)
    assert find(finders(), folder)[0].name == "step1"
    assert find(finders(world_size=3), folder)[0].name == "step1"


def test_files_without_checksums_are_checked_as_before(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 5)
    assert read_record(checkpoint) is not None
    finder = Finder(Board(), "full", wanted=lambda _: [MODEL])
    assert finder.find([tmp_path], None, parts=None).name == checkpoint.name


@pytest.mark.parametrize("is_refused", [True, False], ids=["refused", "unknown"])
def test_file_systems_without_direct_io_are_read_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    def fcntl(descriptor: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real_fcntl(descriptor, command, flags)

    real_fcntl = scan.fcntl.fcntl
    if is_refused:
        monkeypatch.setattr(scan.fcntl, "fcntl", fcntl)
    else:
        monkeypatch.setattr(scan, "_O_DIRECT", 0)
    both = finders()
    find(both, folder)
    assert_same(held(both[1], folder / "step2")[file_name(1)], states(2)[file_name(1)])
    flip(folder / "step2" / file_name(1), 5_000_000)
    check_fallback(folder, f"{file_name(1)} bytes 4194304 to 8388608 are not what was written")
