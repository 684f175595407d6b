"""Committed checkpoints and their small copies, and codecs with an error bound."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.checkpoint import verify
from lowtide.checkpoint.compact import SUFFIX
from lowtide.checkpoint.compact.copies import CompactConfig, beside, compact, expand
from lowtide.checkpoint.compact.file import read_table
from lowtide.checkpoint.compact.table import Record
from lowtide.checkpoint.store.manifest import Manifest, read_manifest, write_manifest
from lowtide.core.codec import ArrayData, Bound, Codec, StreamHeader
from lowtide.core.restart import read_record, write_record
from lowtide.core.stream import numpy_dtype
from tests.helpers.checkpoints import certify

MIB = 1 << 20
NAME = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
Save = Callable[[Any, Path], Any]


class Steps(Codec):
    """Rounds to whole steps: an error of half a step at most; `shift` makes a liar of it."""

    codec_id = "test.steps"

    def __init__(self, step: float = 1e-3, shift: float = 0.0) -> None:
        self.step = step
        self.shift = shift

    @property
    def bound(self) -> Bound:
        # Half a step, and what rounding to float32 and bfloat16 adds to values below 8.
        return Bound("abs", self.step / 2 + 2.0**-5)

    def _encode(self, data: ArrayData) -> bytes:
        values = data.values
        if data.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        steps = np.round(
            np.nan_to_num(values, posinf=1, neginf=1).astype(np.float64) / self.step + self.shift
        )
        return zlib.compress(steps.astype(np.int16).tobytes(), 1)

    def _decode(self, header: StreamHeader, payload: memoryview) -> NDArray[Any]:
        steps = np.frombuffer(zlib.decompress(payload), np.int16)
        values = (steps * self.step).astype(np.float32)
        if header.dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(numpy_dtype(header.dtype))


class Ratios(Codec):
    """Rounds the logarithms: the error of every value is relative to that value."""

    codec_id = "test.ratios"

    def __init__(self, value: float = 2.0**-4) -> None:
        self.value = value

    @property
    def bound(self) -> Bound:
        return Bound("pw_rel", self.value)

    def _encode(self, data: ArrayData) -> bytes:
        values = data.values
        if data.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        is_zero = values == 0
        logs = np.log2(np.where(is_zero, 1, np.abs(values)).astype(np.float64))
        steps = np.where(is_zero, -(2**15), np.round(logs / np.log2(1 + self.value)))
        signs = np.packbits(np.signbit(values)).tobytes()
        return zlib.compress(steps.astype(np.int16).tobytes() + signs, 1)

    def _decode(self, header: StreamHeader, payload: memoryview) -> NDArray[Any]:
        raw, count = zlib.decompress(payload), int(np.prod(header.shape))
        steps = np.frombuffer(raw, np.int16, count)
        signs = np.unpackbits(np.frombuffer(raw, np.uint8)[2 * count :])[:count]
        sizes = np.exp2(steps * np.log2(1 + self.value)) * (steps != -(2**15))
        values = (sizes * np.where(signs == 1, -1.0, 1.0)).astype(np.float32)
        if header.dtype == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(numpy_dtype(header.dtype))


class Sz3(Codec):
    """SZ3 through pysz; its bound is relative to the range of what it is given."""

    codec_id = "test.sz3"

    def __init__(self, value: float = 1e-3) -> None:
        self.value = value

    @property
    def bound(self) -> Bound:
        return Bound("rel", self.value)

    def _encode(self, data: ArrayData) -> bytes:
        from pysz import sz, szConfig, szErrorBoundMode

        config = szConfig()
        config.errorBoundMode = szErrorBoundMode.REL
        config.relErrorBound = self.value
        packed, _ = sz.compress(data.values.reshape(-1).copy(), config)
        return bytes(packed.tobytes())

    def _decode(self, header: StreamHeader, payload: memoryview) -> NDArray[Any]:
        from pysz import sz

        count = int(np.prod(header.shape))
        packed = np.frombuffer(payload, np.uint8).copy()
        values, _ = sz.decompress(packed, np.dtype(header.dtype), (count,))
        return np.asarray(values)


def adam(seed: int = 0, *, count: int = 600_000, dtype: torch.dtype = torch.float32) -> Any:
    """Return what ZeRO 3 keeps of one rank."""
    torch.manual_seed(seed)
    first = torch.randn(count).to(dtype)
    state = {"step": 3, "exp_avg": first, "exp_avg_sq": (torch.randn(count) ** 2 / 9).to(dtype)}
    inner = {"state": {0: state}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    outer = {
        "zero_stage": 3,
        "optimizer_state_dict": inner,
        "fp32_flat_groups": [torch.randn(count)],
    }
    return {"optimizer_state_dict": outer, "ds_version": "0"}


def checkpoint(folder: Path, states: dict[str, Any], *, save: Save = torch.save, step: int = 1,
               attempt: str = "a" * 16) -> Path:  # fmt: skip
    """Write a committed checkpoint of one rank."""
    folder.mkdir(parents=True)
    for name, state in states.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(state, bytes):
            (folder / name).write_bytes(state)
        else:
            save(state, folder / name)
    certify(folder, [folder / n for n in states], step=step, attempt=attempt, ranks=1)
    return folder


def shrink(source: Path, target: Path, *, base: Path | None = None, **settings: Any) -> Path:
    """Bring a checkpoint to another folder in the small form and commit it there."""
    target.mkdir(parents=True)
    record = read_record(source)
    assert record is not None
    manifests, sizes = {}, {}
    for name in record["manifests"]:
        manifest = read_manifest(source / name)
        config = CompactConfig(**settings)
        results = compact(source, target, manifest=manifest, config=config, base=base)
        small = Manifest.of_results(
            target, results, attempt=manifest.attempt, rank=manifest.rank, step=manifest.step
        )
        _, size_bytes, crc = write_manifest(target, small)
        manifests[name] = {"size_bytes": size_bytes, "crc32": crc}
        sizes |= {n: sums.size_bytes for n, sums in small.files.items()}
    write_record(
        target, step=record["step"], world_size=record["world_size"], config=record["config"],
        client_keys=record["client_keys"], files=sizes, attempt=record["attempt"], tag=target.name,
        manifests=manifests,
    )  # fmt: skip
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.endswith(".json")
    }


def assert_gives(small: Path, original: Path, target: Path) -> None:
    """Fail unless `small` gives the same files again, under the same checksums."""
    results = expand(small, target, find_base=beside(small))
    assert {r.path.relative_to(target).as_posix() for r in results} == contents(target).keys()
    assert contents(target) == contents(original)
    assert verify(target).is_ok
    found, wanted = read_record(target), read_record(original)
    assert found is not None
    assert wanted is not None
    assert found["files"] == wanted["files"]
    same = ("step", "world_size", "config", "client_keys", "attempt")
    assert [found[key] for key in same] == [wanted[key] for key in same]
    for name in wanted["manifests"]:
        assert (
            read_manifest(target / name).files.keys() == read_manifest(original / name).files.keys()
        )


def records_of(small: Path, name: str = NAME) -> dict[str, Record]:
    return {r.path: r for r in read_table(small / f"{name}{SUFFIX}").records}


def encodings(record: Record) -> set[str]:
    return {block.encoding for block in record.blocks}


def role(small: Path, wanted: str) -> Record:
    (found,) = [r for r in records_of(small).values() if r.role == wanted]
    return found


def moments(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    state = torch.load(folder / NAME, weights_only=False)["optimizer_state_dict"]
    of = state["optimizer_state_dict"]["state"][0]
    return of["exp_avg"], of["exp_avg_sq"], state["fp32_flat_groups"][0]
