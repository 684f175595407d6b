"""The files are torch's: read by torch.load in every way, by zip tools, and like torch.save's."""

from __future__ import annotations

import gc
import io
import pickle
import shutil
import subprocess
import warnings
import weakref
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowtide.checkpoint.files import opcodes, torch_file
from lowtide.checkpoint.files.archive import Archive, Record
from lowtide.checkpoint.files.memo import Memo
from lowtide.checkpoint.files.torch_file import Layout, lay_out
from lowtide.checkpoint.writer.plan import LITERAL, FilePlan
from lowtide.checkpoint.writer.plan_check import check_begins_with, check_plan
from tests.checkpoint.plans import save, write_plan

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@dataclass
class Holder:
    """A tensor in an object that a walk through dicts does not see."""

    tensor: torch.Tensor


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_same(found: Any, expected: Any) -> None:
    """Fail unless both are the same in type, and tensors in every property and bit."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.requires_grad == expected.requires_grad
        if expected.is_sparse:
            return assert_same(found.to_dense(), expected.to_dense())
        assert found.stride() == expected.stride()
        assert bits(found) == bits(expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Holder):
        assert_same(found.tensor, expected.tensor)
    else:
        assert found == expected
    return None


def archive_of(path: Path, records: list[Record]) -> FilePlan:
    archive = Archive(path)
    archive.add_records(records)
    archive.close(pickle.dumps(None, 2))
    return archive.plan()


def rich_state() -> dict[str, Any]:
    torch.manual_seed(0)
    flat = torch.randn(70_000).bfloat16()
    frozen = torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)
    by_dtype = {str(d): torch.arange(12).reshape(3, 4).to(d) for d in DTYPES}
    with_attribute = torch.nn.Parameter(torch.randn(3))
    with_attribute.note = "kept by torch's own way to pickle"
    return {
        "slices": [flat[:10], flat[10:100].view(9, 10), flat[40_000:40_100]],
        "by dtype": by_dtype,
        "parameters": (torch.nn.Parameter(torch.randn(2, 2)), frozen, with_attribute),
        "transposed": torch.randn(4, 5).t(),
        "strided": torch.randn(100)[::7],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "empty": torch.empty(0),
        "empty 2-d": torch.empty(3, 0),
        "scalar": torch.tensor(3.5),
        "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
        "sparse": torch.eye(3).to_sparse(),
        "large": torch.randn(1 << 19),
        "module": torch.nn.BatchNorm1d(3).state_dict(),
        "held": Holder(torch.arange(5)),
        "others": [1, 2.5, None, "text", b"bytes", (1, [2, {"three": 3}]), {1, 2}, OrderedDict()],
        "array": np.arange(4).tolist(),
        7: {"digit key": True},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.pt"


def test_native_and_python_headers_are_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    edges = [0, 1, 63, 64, (1 << 20) - 1, 1 << 20, (1 << 32) - 2, (1 << 32) - 1, 5 << 30]
    sizes = [*edges, *random.integers(0, 1 << 21, 3000).tolist(), *edges, 1, 2]
    starts = (random.integers(1, 1 << 20, len(sizes)) * random.choice([1, 64, 4096])).tolist()
    records = [Record(None, start, size) for start, size in zip(starts, sizes, strict=True)]

    def plan() -> FilePlan:
        archive = Archive(path)
        for part in (records[:7], [], records[7:200], records[200:]):
            archive.add_records(part)
        archive.close(b"pickle")
        return archive.plan()

    plans = [plan()]
    monkeypatch.setenv("LOWTIDE_NATIVE", "0")
    plans.append(plan())
    for name in ("offsets", "lengths", "entries", "patches", "literals"):
        assert np.array_equal(*(getattr(each, name) for each in plans)), name
    is_live = plans[0].entries != LITERAL
    assert np.array_equal(*(each.addresses[is_live] for each in plans))


def test_tensors_can_be_on_their_way_before_the_rest_is_laid_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowtide.checkpoint.files.ranges.FIRST_BATCH_BYTES", 1)
    monkeypatch.setattr("lowtide.checkpoint.files.ranges.BATCH_GROWTH", 1.01)
    monkeypatch.setattr("lowtide.checkpoint.files.ranges.BLOCK", 1)
    whole, other = torch.randn(300), torch.randn(300)
    shared = {
        "part": whole[5:9],
        "whole": whole,
        "same": whole.view(300),
        "again": whole[100:],
        "bits": whole.view(torch.int32),
    }
    state = {**rich_state(), **shared, "first": other, "then": other.view(30, 10).t(), "a": other}
    layout = Layout(state, path, is_stable=lambda tensor: tensor.dtype is not torch.int64)
    beginnings = list(layout.beginnings())
    assert len(beginnings) > 3
    laid_out = layout.finish()
    for one, longer in zip(beginnings, [*beginnings[1:], laid_out.plan], strict=True):
        check_plan(one)
        check_begins_with(longer, one)
        assert one.expected_bytes == 0
    assert laid_out.plan.size_bytes > beginnings[-1].size_bytes
    of_whole = laid_out.plan.addresses == whole.data_ptr()
    assert of_whole.sum() == 2, "once as floats and once as integers"
    write_plan(laid_out.plan)
    loaded = torch.load(path, weights_only=False)
    assert_same(loaded, state)
    base = loaded["whole"].data_ptr()
    assert [loaded[name].data_ptr() - base for name in ("part", "again")] == [20, 400]
    assert loaded["then"].data_ptr() == loaded["first"].data_ptr()
    assert loaded["a"] is loaded["first"]
    lazy = {id(tensor) for tensor in laid_out.lazy}
    assert {id(state[name]) for name in (*shared, "first", "then")} <= lazy


def test_the_beginning_of_a_file_says_what_it_will_be(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowtide.checkpoint.files.ranges.FIRST_BATCH_BYTES", 1)
    state, memo = _many(), Memo()
    guesses = []
    for _ in range(2):
        layout = Layout(state, path, is_stable=lambda _tensor: True, memo=memo)
        expected = {each.expected_bytes for each in layout.beginnings()}
        size = layout.finish().plan.size_bytes
        assert len(expected) == 1
        guesses.append(expected.pop())
    assert guesses == [0, size], "as large as the one before"


@pytest.mark.parametrize("options", [{}, {"mmap": True}], ids=["read", "mmap"])
@pytest.mark.parametrize("is_stable", [True, False], ids=["lazy", "eager"])
def test_torch_load_gives_back_the_state(path: Path, options: Any, is_stable: bool) -> None:
    state = rich_state()
    save(state, path, is_stable=is_stable)
    assert_same(torch.load(path, weights_only=False, **options), state)


def test_tensors_of_inference_mode_have_no_version(path: Path) -> None:
    with torch.inference_mode():
        made = torch.arange(4.0)
    changed = torch.ones(3).add_(1.0)
    laid_out = lay_out({"made": made, "changed": changed}, path, is_stable=lambda _tensor: True)
    assert laid_out.versions == [0, 1]
    assert [id(tensor) for tensor in laid_out.lazy] == [id(made), id(changed)]
    write_plan(laid_out.plan)
    assert_same(torch.load(path), {"made": made, "changed": changed})


def test_result_equals_that_of_torch_save(path: Path) -> None:
    state = rich_state()
    save(state, path)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    stock = torch.load(buffer, weights_only=False)
    assert_same(torch.load(path, weights_only=False), stock)


def test_weights_only_load_accepts_it(path: Path) -> None:
    state = {"module": torch.nn.Linear(4, 4).state_dict(), "p": torch.nn.Parameter(torch.ones(2))}
    save(state, path)
    assert_same(torch.load(path, weights_only=True), state)


def test_zip_tools_find_every_checksum_right(path: Path) -> None:
    save(rich_state(), path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == len(set(archive.namelist()))
    if shutil.which("unzip"):
        done = subprocess.run(["unzip", "-tq", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_bytes_that_are_seen_are_kept(path: Path) -> None:
    buffer = torch.randn(1 << 20)
    plan = save({"a": buffer[1000:1010], "b": buffer[900_000:900_020]}, path)
    assert plan.size_bytes < 8192


def test_overlapping_tensors_still_share_memory(path: Path) -> None:
    buffer = torch.randn(5000)
    save({"a": buffer[:300], "b": buffer[200:400], "c": buffer[4000:]}, path)
    loaded = torch.load(path, weights_only=False)
    loaded["a"][250] = 7.0
    assert loaded["b"][50] == 7.0
    assert loaded["a"].untyped_storage().data_ptr() != loaded["c"].untyped_storage().data_ptr()


def test_one_memory_seen_as_two_types_keeps_both_values(path: Path) -> None:
    floats = torch.randn(64)
    state = {"float": floats, "int": floats.view(torch.int32)}
    save(state, path)
    assert_same(torch.load(path, weights_only=False), state)


def test_tied_weights_stay_tied(path: Path) -> None:
    weight = torch.randn(300, 300)
    save({"embedding": weight, "head": weight}, path)
    loaded = torch.load(path, weights_only=False)
    assert loaded["embedding"].data_ptr() == loaded["head"].data_ptr()


def test_nothing_stable_is_copied(path: Path) -> None:
    lazy, eager = torch.randn(1000), torch.randn(500)
    laid_out = lay_out(
        {"lazy": lazy, "eager": eager}, path, is_stable=lambda tensor: tensor is lazy
    )
    assert laid_out.eager_bytes == 2000
    assert [each.data_ptr() for each in laid_out.lazy] == [lazy.data_ptr()]
    lazy.fill_(1.0)
    eager.fill_(1.0)
    write_plan(laid_out.plan)
    loaded = torch.load(path)
    assert bool((loaded["lazy"] == 1.0).all()), "a stable tensor was read too early"
    assert not bool((loaded["eager"] == 1.0).any()), "an unstable tensor was read too late"


def test_large_tensors_lie_where_the_disk_can_take_them_from_memory(path: Path) -> None:
    state = [torch.randn(300_000 + 16 * i) for i in range(8)]
    plan = save(state, path)
    for offset, length, address, entry in zip(
        plan.offsets, plan.lengths, plan.addresses, plan.entries, strict=True
    ):
        if entry != LITERAL and length >= 1 << 20:
            assert (int(address) - int(offset)) % 4096 == 0


def test_what_cannot_be_pickled_raises(path: Path) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        lay_out({"function": lambda: None}, path, is_stable=lambda _tensor: True)


def test_same_state_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    state = {"x": torch.arange(1000.0), "step": 4}
    save(state, path)
    save(state, tmp_path / "again.pt")
    assert path.read_bytes() == (tmp_path / "again.pt").read_bytes()


def test_files_beyond_four_gigabytes_are_found_by_zip_and_torch(path: Path) -> None:
    # Only the literals are written; the tensors are holes, so this takes no space and no time.
    big = 5 << 30
    records = [Record(None, 64, big), Record(None, 64, 1 << 16), Record(None, 64, 1 << 20)]
    write_plan(archive_of(path, records), is_sparse=True)
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        for name in ("archive/data/0", "archive/data/1", "archive/data/2"):
            with archive.open(name) as member:  # reads the local header, far behind 4 GiB
                assert member.read(4) == bytes(4)
    assert (sizes["archive/data/0"], sizes["archive/data/1"]) == (big, 1 << 16)
    reader = torch._C.PyTorchFileReader(str(path))
    assert reader.get_record_offset("data/1") > big
    assert torch.load(path, weights_only=False) is None


def test_more_members_than_a_plain_zip_can_count(path: Path) -> None:
    values = np.arange(70_000, dtype=np.uint8)
    records = [Record(values, values.ctypes.data + i, 1) for i in range(len(values))]
    write_plan(archive_of(path, records))
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/data/69999") == values[69_999:70_000].tobytes()
    assert torch.load(path, weights_only=False) is None


shapes = st.lists(st.integers(0, 5), max_size=3)
tensors = st.builds(
    lambda shape, dtype, seed: (torch.rand(shape) * seed).to(dtype),
    shapes, st.sampled_from(DTYPES[:10]), st.integers(0, 100),
)  # fmt: skip
leaves = st.one_of(
    tensors, st.integers(), st.text(max_size=5), st.none(), st.floats(allow_nan=False)
)
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.tuples(inner, inner),
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states)
def test_any_nested_state_comes_back(path: Path, state: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, path)
        assert_same(torch.load(path, weights_only=False), state)


def _with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = "not plain"  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize("kind", ["parameter", "tensor"])
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "behind"])
def test_memory_shared_with_a_tensor_that_has_attributes_stays_shared(
    path: Path, kind: str, is_first: bool
) -> None:
    whole = torch.randn(3000)
    part = whole[100:900]
    held = torch.nn.Parameter(part) if kind == "parameter" else part
    named = {"odd": _with_attribute(held), "plain": whole[50:500]}
    state = named if is_first else dict(reversed(named.items()))
    laid_out = lay_out(state, path, is_stable=lambda _tensor: True)
    assert laid_out.eager_bytes == 0
    write_plan(laid_out.plan)
    loaded = torch.load(path, weights_only=False)
    assert_same(loaded, state)
    assert loaded["odd"].note == "not plain"
    loaded["odd"].data[0] = 7.0
    assert loaded["plain"][50] == 7.0


def _many(count: int = 600) -> dict[str, Any]:
    values = torch.randn(count, 7)
    tensors: dict[str, Any] = {f"t{i}": values[i].clone() for i in range(count)}
    return {"module": tensors, "step": 1, "frozen": torch.nn.Parameter(torch.ones(3))}


CHANGES: dict[str, Any] = {
    "nothing": lambda _state: None,
    "a number": lambda state: state.update(step=2),
    "values": lambda state: state["module"]["t9"].add_(1.0),
    "a tensor": lambda state: state["module"].update(t9=torch.randn(7)),
    "a shape": lambda state: state["module"].update(t9=state["module"]["t9"].view(7, 1)),
    "a gradient": lambda state: state["module"]["t300"].requires_grad_(True),
    "a class": lambda state: state["module"].update(t9=torch.nn.Parameter(state["module"]["t9"])),
    "an attribute": lambda state: _with_attribute(state["module"]["t9"]),
    "memory": lambda state: state["module"]["t9"].set_(torch.randn(9)),
    "a dtype": lambda state: state["module"].update(t9=state["module"]["t9"].view(torch.int32)),
    "order": lambda state: state.update(module=dict(reversed(state["module"].items()))),
    "a name": lambda state: state["module"].update(x=state["module"].pop("t9")),
    "fewer": lambda state: [state["module"].pop(f"t{i}") for i in range(40, 400)],
    "more": lambda state: state["module"].update(_many(300)["module"]),
    "two of one memory": lambda state: state["module"].update(t3=state["module"]["t500"]),
    "a part before": lambda state: state["module"].update(t3=state["module"]["t500"][2:4]),
    "a part behind": lambda state: state["module"].update(t500=state["module"]["t3"][2:4]),
    "a part of another": lambda state: state["module"].update(t3=torch.randn(50)[3:9]),
    "as integers": lambda state: state.update(i=state["module"]["t3"].view(torch.int32)),
    "no storage": lambda state: state["module"].update(t3=torch.eye(3).to_sparse()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_memo_of_the_file_before_changes_no_byte(path: Path, change: str) -> None:
    def lazily(state: Any, memo: Memo | None) -> tuple[bytes, list[int]]:
        laid_out = Layout(state, path, is_stable=lambda _tensor: True, memo=memo).finish()
        assert len({id(each) for each in laid_out.lazy}) == len(laid_out.lazy)
        write_plan(laid_out.plan)
        return path.read_bytes(), [each.data_ptr() for each in laid_out.lazy]

    state, memo = _many(), Memo()
    lazily(state, memo)
    CHANGES[change](state)
    for _ in range(2):
        assert lazily(state, memo) == lazily(state, None)
    assert_same(torch.load(path, weights_only=False), state)


def test_a_memo_does_not_part_what_has_come_to_share_memory(path: Path) -> None:
    x, u, memo = torch.randn(9), torch.randn(9), Memo()
    saves: list[Any] = [
        ({"a": x, "b": u}, lambda _tensor: True),
        ({"a": u, "b": x}, lambda tensor: tensor is x),
        ({"a": x.detach(), "b": x.detach()}, lambda _tensor: True),
    ]
    for state, is_stable in saves:
        write_plan(Layout(state, path, is_stable=is_stable, memo=memo).finish().plan)
        loaded = torch.load(path)
        assert_same(loaded, state)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_text_that_looks_like_the_pickle_inside_stays_text(path: Path) -> None:
    mark = torch_file._mark
    name = f"c{mark.__module__}\n{mark.__qualname__}\n"
    memo = Memo()
    state = {"note": f"{name}q\x05X", name: 1, "w": torch.ones(3), "again": [name], **_many(40)}
    for _ in range(2):
        write_plan(Layout(state, path, is_stable=lambda _tensor: True, memo=memo).finish().plan)
        assert_same(torch.load(path), state)
    memo.token = "another"
    with pytest.raises(pickle.PicklingError, match="0 of 42 tensors"):
        Layout({**state, "more": 1}, path, is_stable=lambda _tensor: True, memo=memo).finish()


def test_one_storage_inside_several_objects_keeps_all_types(path: Path) -> None:
    whole = torch.arange(4.0)
    state = {
        "a": _with_attribute(whole.view(4)),
        "b": _with_attribute(whole.view(torch.int32)),
        "c": _with_attribute(whole.view(torch.int16)),
    }
    write_plan(lay_out(state, path, is_stable=lambda _tensor: True).plan)
    loaded = torch.load(path, weights_only=False)
    for name, value in state.items():
        assert loaded[name].dtype is value.dtype
        assert torch.equal(loaded[name], value)


def test_what_is_no_longer_stable_is_copied_in_spite_of_a_memo(path: Path) -> None:
    state, memo = _many(), Memo()
    Layout(state, path, is_stable=lambda _tensor: True, memo=memo).finish()
    touchy = state["module"]["t44"]
    laid_out = Layout(state, path, is_stable=lambda t: t is not touchy, memo=memo).finish()
    assert laid_out.eager_bytes == touchy.nbytes
    expected = touchy.clone()
    touchy.fill_(0.0)
    write_plan(laid_out.plan)
    assert torch.equal(torch.load(path)["module"]["t44"], expected)


def test_a_memo_saves_the_work_for_what_is_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, memo = _many(), Memo()
    Layout(state, path, is_stable=lambda _tensor: True, memo=memo).finish()
    described: list[int] = []
    stock = opcodes.around_number
    monkeypatch.setattr(opcodes, "around_number", lambda *a: described.append(1) or stock(*a))
    pickled = memo.pickled
    Layout(state, path, is_stable=lambda _tensor: True, memo=memo).finish()
    assert memo.pickled is pickled
    assert not described
    state["step"] = 2
    Layout(state, path, is_stable=lambda _tensor: True, memo=memo).finish()
    assert memo.pickled != pickled
    state["text"] = "x" * (17 << 20)
    Layout(state, path, is_stable=lambda _tensor: True, memo=memo).finish()
    assert len(memo.pickled) < 1 << 20, "what is so large is not kept"


def test_a_memo_keeps_no_tensor_and_no_graph(path: Path) -> None:
    state = _many()
    weight = torch.nn.Parameter(torch.ones(4))
    view = weight.view(4)
    with torch.no_grad():
        state["leaf"] = weight
        state["computed"] = (weight * 2).requires_grad_(True)
    state["of a graph"] = weight * 3
    gone = [weakref.ref(state["module"]["t9"]), weakref.ref(weight), weakref.ref(view)]
    memo = Memo()
    for _ in range(2):
        Layout(state, path, is_stable=lambda _tensor: True, memo=memo).finish()
    del state, weight, view
    gc.collect()
    assert [each() for each in gone] == [None] * 3
