"""The bytes of ``lowtide.sz``: old streams are read for ever, hostile ones never crash."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.compression import compress, decompress, inspect
from lowtide.compression.chunks import Grid, collapsed
from lowtide.compression.payload import Record, pack_positions, parse_positions
from lowtide.core.codec import decode_stream, read_header
from lowtide.core.errors import CorruptStreamError
from tests.helpers.codec_suite import bits, forge


def waves(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    count = int(np.prod(shape))
    return np.asarray(3 * np.sin(np.arange(count) * 0.37).reshape(shape)).astype(dtype)


def spiked(shape: tuple[int, ...]) -> np.ndarray:
    x = waves(shape)
    x.reshape(-1)[::17] = np.nan
    x.reshape(-1)[5::41] = 1e30
    return x


ARRAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "differences": (waves((6, 7, 8)), {"bound": 1e-2, "predictor": "differences"}),
    "interpolation": (waves((11, 23), "float64"), {"bound": 1e-2, "predictor": "interpolation"}),
    "exceptions": (spiked((15, 16)), {"mode": "rel", "bound": 1e-3, "fill_value": 1e30}),
    "logarithmic": (waves((400,)), {"mode": "pw_rel", "bound": 1e-2}),
    "chunks": (torch.from_numpy(waves((20, 30))).bfloat16(), {"bound": 0.1, "chunk_elements": 90}),
    "half": (waves((4, 3, 2, 9), "float16"), {"bound": 0.1, "predictor": "interpolation"}),
    "lossless": (waves((50,)), {"bound": 0}),
}


def stream(name: str) -> bytes:
    x, parameters = ARRAYS[name]
    return compress(x, **parameters)


def payload_of(blob: bytes) -> bytes:
    return blob[read_header(blob).payload_offset :]


# ---- what was written by earlier releases

GOLDEN = json.loads((Path(__file__).parent / "golden_sz.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_streams_of_version_1_are_read_for_ever(name: str) -> None:
    case = GOLDEN[name]
    decoded = decode_stream(bytes.fromhex(case["stream"]))
    assert list(decoded.shape) == case["shape"]
    assert decoded.tobytes().hex() == case["decoded"]


def test_the_old_streams_are_of_every_kind() -> None:
    found = [inspect(bytes.fromhex(case["stream"])) for case in GOLDEN.values()]
    assert {chunk["kind"] for each in found for chunk in each["chunks"]} == {
        "lossless", "differences", "interpolation"
    }  # fmt: skip
    assert {each["dtype"] for each in found} == {"float16", "bfloat16", "float32", "float64"}
    assert {each["domain"] for each in found} == {"linear", "logarithmic"}
    assert max(each["exceptions"] for each in found) > 5


# ---- what damaged and hostile streams do


@pytest.mark.parametrize("name", ARRAYS)
def test_mutated_streams_are_refused_or_give_the_right_shape(name: str) -> None:
    blob = stream(name)
    header, payload = read_header(blob), payload_of(blob)
    rng = random.Random(0)
    refused = 0
    for _ in range(250):
        mutated = bytearray(payload)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(mutated))
            mutated[place] = rng.choice((0, 1, 0x7F, 0xFF, mutated[place] ^ 1 << rng.randrange(8)))
        if rng.random() < 0.3:
            cut = rng.randrange(len(mutated))
            mutated = (
                mutated[:cut] + rng.randbytes(rng.randrange(6)) + mutated[cut + rng.randrange(6) :]
            )
        forged = forge(blob, payload=bytes(mutated))
        try:
            inspect(forged)
            decoded = decode_stream(forged)
        except CorruptStreamError:
            refused += 1
            continue
        assert (decoded.shape, decoded.nbytes) == (header.shape, header.nbytes)
    assert refused > 50


def put(format_: str, offset: int, value: Any) -> Any:
    def change(payload: bytes) -> bytes:
        changed = bytearray(payload)
        struct.pack_into(format_, changed, offset, value)
        return bytes(changed)

    return change


RECORD = 24 + 8  # where the only record begins
WRONG = [
    (put("<B", 0, 2), "version 2.*newer Lowtide"),
    (put("<B", 1, 2), "domain 2"),
    (put("<H", 2, 1), "version 1, domain 0 and 1"),
    (put("<I", 4, 2), "has 2 chunks.*makes 1"),
    (put("<d", 8, 0.0), "a step of 0.0"),
    (put("<d", 8, -1.0), "a step of -1.0"),
    (put("<d", 8, float("nan")), "a step of nan"),
    (put("<d", 8, 5e-324), "a step of 5e-324"),
    (put("<d", 8, float("inf")), "a step of inf"),
    (put("<Q", 16, 0), "chunks of 0 elements"),
    (put("<Q", 16, (1 << 26) + 1), "allowed are 1 to 67108864"),
    (put("<Q", 16, 100), "makes 6"),
    (put("<Q", 24, 1 << 60), "chunks claim 1152921504606846976 bytes"),
    (put("<B", RECORD, 3), "kind 3"),
    (put("<B", RECORD + 3, 3), "orders of differences are"),
    (put("<B", RECORD + 4, 1), "orders of differences are.*for 3 axes"),
    (put("<I", RECORD + 5, 500), "500 exceptions of 336"),
    (put("<I", RECORD + 5, 1), "1 exceptions"),
    (put("<I", RECORD + 9, 1 << 31), "sections claim"),
    (lambda payload: payload[:20], "has 20 bytes, allowed are 24 up"),
    (lambda payload: payload[:24], "has 1 chunks in 24 bytes"),
    (lambda payload: payload + b"x", "bytes are there|are there"),
    (lambda payload: payload[:24] + struct.pack("<Q", 9) + payload[32:41], "kind 1 and 9 bytes"),
    (lambda payload: payload[:24] + bytes(8), "kind -1 and 0 bytes"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=[text for _, text in WRONG])
def test_what_is_wrong_is_named(change: Any, text: str) -> None:
    blob = stream("differences")
    forged = forge(blob, payload=change(payload_of(blob)))
    for read in (decompress, inspect):
        with pytest.raises(CorruptStreamError, match=text):
            read(forged)


def record_of(name: str, **changes: Any) -> bytes:
    """Return a stream of one chunk with other parts in its record."""
    from lowtide.compression.chunks import Chunk
    from lowtide.compression.payload import PayloadHeader, pack_payload, parse_payload, parse_record

    blob = stream(name)
    header = read_header(blob)
    head, [(chunk, raw)] = parse_payload(memoryview(payload_of(blob)), header.shape)
    assert isinstance(head, PayloadHeader)
    assert isinstance(chunk, Chunk)
    record = parse_record(raw, head, chunk)
    parts = {key: value for key, value in vars(record).items() if not key.startswith("_")}
    return forge(blob, payload=pack_payload(head, [Record(**{**parts, **changes}).pack()]))


MANY = {"exceptions": 300, "positions_bytes": 300}
LONG = b"\x80" * 5 + bytes(21)  # 21 numbers, the first of 6 bytes


def test_sections_that_lie_are_refused() -> None:
    import zstandard

    def zipped(raw: bytes) -> bytes:
        return zstandard.ZstdCompressor().compress(raw)

    bomb = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + b"\1\0\0"
    for name, changes, text in (
        ("exceptions", {"positions": bomb, "positions_bytes": 21}, "claim to hold 1099511627776"),
        ("exceptions", {"positions": zipped(b"\x80" * 25), "positions_bytes": 25}, "0 positions"),
        ("exceptions", {"positions": zipped(b"\x7f" * 21)}, "an exception at 2687 of 240"),
        ("exceptions", {"positions": zipped(bytes(20) + b"\x80")}, "20 positions of 21"),
        ("exceptions", {"positions": zipped(LONG), "positions_bytes": len(LONG)}, "than 5 bytes"),
        ("exceptions", {"values": zipped(bytes(8))}, "the header says 84"),
        ("exceptions", {"values": b""}, "21 exceptions of 240"),
        ("exceptions", {**MANY, "positions": zipped(bytes(300))}, "300 exceptions of 240"),
        ("exceptions", {"signs": zipped(bytes(30))}, "in sections of"),
        ("logarithmic", {"signs": zipped(bytes(49))}, "the header says 50"),
        ("logarithmic", {"signs": b"nonsense"}, "damaged payload"),
        ("differences", {"codes": b""}, "damaged codes"),
        ("differences", {"codes": bytes(300)}, "damaged codes"),
    ):  # fmt: skip
        with pytest.raises(CorruptStreamError, match=text):
            decompress(record_of(name, **changes))
    assert decompress(record_of("exceptions")).shape == (15, 16)


def test_a_stream_of_another_element_type_is_refused() -> None:
    with pytest.raises(CorruptStreamError, match=r"elements are int32.*not written by Lowtide"):
        decompress(forge(stream("differences"), dtype="int32"))
    for shape in ([336, 2], [6, 7, 9], [1 << 40], [0]):
        with pytest.raises(CorruptStreamError):
            decompress(forge(stream("lossless"), shape=shape))


def test_streams_of_strangers_may_be_limited() -> None:
    blob = stream("differences")
    assert decompress(blob, max_bytes=336 * 4).size == 336
    with pytest.raises(CorruptStreamError, match="allowed are max_bytes=1000"):
        decompress(blob, max_bytes=1000)
    with pytest.raises(CorruptStreamError, match="max_bytes=10"):
        decompress(stream("chunks"), max_bytes=10)


# ---- parts


def naive_chunks(shape: tuple[int, ...], most: int) -> list[tuple[int, tuple[int, ...]]]:
    """Cut as FORMAT section 1 says, by counting elements one by one."""
    axes = collapsed(shape)
    at = 0
    while int(np.prod(axes[at + 1 :], dtype=int)) > most:
        at += 1
    rest = int(np.prod(axes[at + 1 :], dtype=int))
    parts = -(-axes[at] // max(1, most // rest))
    rows = -(-axes[at] // parts)
    numbers = np.arange(int(np.prod(axes))).reshape(axes)
    found = []
    for outer in np.ndindex(axes[:at]):
        for begin in range(0, axes[at], rows):
            part = numbers[outer][begin : begin + rows]
            found.append((int(part.reshape(-1)[0]), part.shape))
    return found


@pytest.mark.parametrize("most", [1, 2, 5, 12, 60, 61, 10**6])
@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (13, 1), (5, 6), (3, 4, 5), (2, 3, 4, 5), (2, 2, 3, 2, 5), (1, 60, 1)]
)
def test_chunks_are_cut_as_the_format_says(shape: tuple[int, ...], most: int) -> None:
    grid = Grid(shape, most)
    found = [(chunk.begin, chunk.shape) for chunk in grid]
    assert found == naive_chunks(shape, most)
    assert len(found) == grid.count
    assert max(chunk.count for chunk in grid) <= most
    assert [n for chunk in grid for n in range(chunk.begin, chunk.begin + chunk.count)] == [
        *range(int(np.prod(shape)))
    ]


def test_shapes_collapse_to_four_axes() -> None:
    assert collapsed((2, 1, 3, 1, 4, 5, 6)) == (6, 4, 5, 6)
    assert collapsed((1, 1)) == (1,)
    assert Grid((3, 0, 5), 10).count == Grid((0,), 10).count == 0
    assert [*Grid((0, 7), 10)] == []


@pytest.mark.parametrize("largest_gap", [1, 100, 127, 128, 300, 1 << 14, 1 << 21, 1 << 28, 1 << 33])
def test_positions_come_back(largest_gap: int) -> None:
    rng = np.random.default_rng(0)
    gaps = rng.integers(1, largest_gap + 1, size=50)
    gaps[7] = largest_gap
    positions = np.cumsum(gaps) - 1
    packed, raw_bytes = pack_positions(positions, 3)
    record = Record(None, exceptions=50, positions=packed, positions_bytes=raw_bytes)
    np.testing.assert_array_equal(parse_positions(record, int(positions[-1]) + 1), positions)
    with pytest.raises(CorruptStreamError, match="an exception at"):
        parse_positions(record, int(positions[-1]))


# ---- both back ends

OTHER = """
import json, sys
import numpy as np
from pathlib import Path
from lowtide.compression import compress, decompress
from lowtide.core.codec import decode_stream
folder = Path(sys.argv[1])
for name, parameters in json.loads((folder / "parameters.json").read_text()).items():
    decoded = decode_stream((folder / f"{name}.native").read_bytes())
    (folder / f"{name}.decoded").write_bytes(decoded.tobytes())
    x = decompress((folder / f"{name}.exact").read_bytes())
    (folder / f"{name}.reference").write_bytes(compress(x, **parameters))
"""


def test_the_reference_reads_and_writes_the_same(tmp_path: Path) -> None:
    parameters = {name: settings for name, (_, settings) in ARRAYS.items()}
    (tmp_path / "parameters.json").write_text(json.dumps(parameters))
    for name, (x, _) in ARRAYS.items():
        (tmp_path / f"{name}.native").write_bytes(stream(name))
        (tmp_path / f"{name}.exact").write_bytes(compress(x, "lowtide.zstd"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OTHER, str(tmp_path)],
        env={**os.environ, "LOWTIDE_NATIVE": "0"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ARRAYS:
        native = (tmp_path / f"{name}.native").read_bytes()
        wanted = bits(decode_stream(native)).tobytes()
        assert (tmp_path / f"{name}.decoded").read_bytes() == wanted
        reference = (tmp_path / f"{name}.reference").read_bytes()
        assert bits(decode_stream(reference)).tobytes() == wanted
        assert reference == native


def test_elements_that_find_no_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = stream("differences")

    def empty(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(CorruptStreamError, match="set max_bytes for streams of strangers"):
        decompress(blob)
