"""A file in memory gives what `torch.load` gives, without a copy, and goes away piece by piece."""

from __future__ import annotations

import gc
import io
import mmap
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint.files.image import Image
from tests.checkpoint.plans import save
from tests.checkpoint.test_torch_file import assert_same, rich_state


def image_of(raw: bytes) -> Image:
    image = Image(len(raw))
    if raw:
        image.view(0, len(raw))[:] = raw
    return image


def image_of_state(state: Any, path: Path) -> Image:
    save(state, path)
    return image_of(path.read_bytes())


def saved_by_torch(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.pt"


def test_it_gives_back_the_state(path: Path) -> None:
    state = rich_state()
    assert_same(image_of_state(state, path).load(), state)
    assert_same(image_of_state(state, path).load("cpu"), torch.load(path, weights_only=False))


def test_files_that_torch_has_written_are_read_too() -> None:
    state = rich_state()
    assert_same(image_of(saved_by_torch(state)).load(), state)


def test_files_without_a_zip_are_read_too() -> None:
    state = {"x": torch.arange(5), "text": "y"}
    raw = saved_by_torch(state, _use_new_zipfile_serialization=False)
    assert_same(image_of(raw).load(), state)


def test_files_of_the_other_byte_order_are_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"x": torch.arange(5)}
    raw = saved_by_torch(state)
    monkeypatch.setattr("lowtide.checkpoint.files.image.sys.byteorder", "big")
    other = image_of(raw).load()  # torch looks at the same value, and swaps
    assert other["x"].tolist() == [value << 56 for value in range(5)]


def test_a_text_that_is_no_torch_file_raises() -> None:
    for raw in (b"", b"PK\3\4 and no more", b"text"):
        with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):
            image_of(raw).load()


def test_map_location_means_what_it_means_for_torch(path: Path) -> None:
    state = {"x": torch.arange(4.0), "y": torch.ones(2)}
    save(state, path)
    seen: list[str] = []

    def load(map_location: Any) -> Any:
        return image_of(path.read_bytes()).load(map_location)

    def keep(storage: Any, location: str) -> Any:
        seen.append(location)
        return storage

    assert_same(load(keep), state)
    assert seen == ["cpu", "cpu"]
    for location in (None, "cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda *_: None):
        assert_same(load(location), state)
    assert load("meta")["x"].is_meta
    assert load({"cpu": "meta"})["x"].is_meta
    to_meta = lambda storage, _: torch.UntypedStorage(storage.nbytes(), device="meta")  # noqa: E731
    assert load(to_meta)["x"].is_meta


def test_a_second_time_it_is_the_tensors_memory(path: Path) -> None:
    image = image_of_state({"x": torch.ones(2)}, path)
    image.load()
    with pytest.raises(RuntimeError, match="has been loaded"):
        image.load()


def test_tensors_lie_in_the_memory_of_the_file_and_keep_it(path: Path) -> None:
    large = torch.randn(1 << 20)
    image = image_of_state({"large": large, "small": torch.ones(3), "none": torch.empty(0)}, path)
    begin = torch.frombuffer(image.memory, dtype=torch.uint8).data_ptr()
    loaded = image.load()
    for name in ("large", "small"):
        assert begin <= loaded[name].data_ptr() < begin + image.size_bytes
    del image
    gc.collect()
    assert torch.equal(loaded["large"], large)
    loaded["large"].add_(1.0)
    assert torch.equal(loaded["large"], large + 1.0)
    assert loaded["small"].tolist() == [1.0, 1.0, 1.0]


def test_pages_of_a_large_tensor_go_back_with_it_and_no_others(path: Path) -> None:
    state = {str(i): torch.full((1 << 18,), float(i + 1)) for i in range(3)}
    image = image_of_state(state, path)
    begin = torch.frombuffer(image.memory, dtype=torch.uint8).data_ptr()
    loaded = image.load()
    middle = loaded["1"].data_ptr() - begin
    kept = loaded["1"][5:7]
    del loaded["1"]
    gc.collect()
    assert kept.tolist() == [2.0, 2.0], "the storage is in use still"
    del kept
    gc.collect()
    first = -(-middle // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (middle + (1 << 20)) // mmap.PAGESIZE * mmap.PAGESIZE
    assert not any(image.view(first, last)), "its pages are new ones"
    assert_same(loaded, {name: state[name] for name in ("0", "2")})
    raw = path.read_bytes()
    assert image.view(0, first) == raw[:first]
    assert image.view(last, len(raw)) == raw[last:]
