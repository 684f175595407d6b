"""``lowtide.aesz``: the bound whatever the model says, never larger, the same bits everywhere."""

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
from lowtide.compression.learned import predictor, selection
from lowtide.compression.learned.blocks import BlockGrid, takes
from lowtide.compression.learned.model import Model, load_model, pack_model
from lowtide.compression.learned.predictor import LearnedBlocks, LearnedKind, bits_of_mean
from lowtide.compression.payload import Record, pack_payload, parse_payload, parse_record
from lowtide.compression.predictors import KINDS
from lowtide.core.codec import Bound, decode_stream, get_codec, read_header
from lowtide.core.errors import CodecError, ConfigError, CorruptStreamError
from tests.compression.learned.tiny import MODEL, field, model_of
from tests.helpers.codec_suite import assert_bound, bits, forge

HERE = Path(__file__).parent


def mixed(shape: tuple[int, ...] = (40, 36)) -> np.ndarray:
    """Return blocks that the model predicts on the left, and a random walk on the right."""
    x = field((shape[0] // 4, shape[1] // 4))
    walk = np.cumsum(np.random.default_rng(1).normal(size=(shape[0], shape[1] // 2)), axis=1)
    x[:, shape[1] // 2 :] = walk[:, : shape[1] - shape[1] // 2]
    return x


def holes() -> np.ndarray:
    x = field((7, 9))[:26, :33].copy()
    x[3, 4:9] = np.nan
    x[10, 10] = np.inf
    x[20:, 30:] = 1e30
    return x


# Name: array, parameters without the model.
ARRAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "all learned": (field((6, 7)), {"bound": 0.02}),
    "mixed": (mixed(), {"mode": "rel", "bound": 1e-2}),
    "three axes": (np.stack([field((3, 4), seed=n) for n in range(3)]), {"bound": 0.05}),
    "exceptions": (holes(), {"mode": "rel", "bound": 1e-2, "fill_value": 1e30}),
    "chunks": (field((9, 5)).astype(np.float64), {"bound": 0.01, "chunk_elements": 200}),
    "half": (torch.from_numpy(field((5, 5))).bfloat16(), {"bound": 0.1}),
    "none learned": (
        np.cumsum(np.random.default_rng(0).normal(size=(20, 20)), axis=0),
        {"bound": 1e-2, "predictor": "autoencoder"},
    ),
}


def stream(name: str) -> bytes:
    x, parameters = ARRAYS[name]
    return compress(x, "lowtide.aesz", model=MODEL, **parameters)


def kinds(blob: bytes) -> set[str]:
    return {chunk["kind"] for chunk in inspect(blob)["chunks"]}


# ---- what is promised


@pytest.mark.parametrize("name", ARRAYS)
def test_the_bound_holds(name: str) -> None:
    x, parameters = ARRAYS[name]
    blob = stream(name)
    assert "autoencoder" in kinds(blob)
    decoded = decompress(blob)
    kept = x.numpy() if not isinstance(x, np.ndarray) and x.dtype != torch.bfloat16 else x
    if "fill_value" in parameters:
        is_fill = kept == np.float32(1e30)
        assert (decoded[is_fill] == np.float32(1e30)).all()
        kept, decoded = kept[~is_fill], decoded[~is_fill]
    dtype = str(x.dtype).removeprefix("torch.")
    assert_bound(kept, decoded, dtype, Bound(parameters.get("mode", "abs"), parameters["bound"]))


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_holds_for_a_model_that_predicts_nonsense(seed: int) -> None:
    wild = model_of(seed=seed, deep=10.0**seed)
    rng = np.random.default_rng(seed)
    for scale in (1e-30, 1.0, 1e30):
        x = (rng.normal(size=(9, 10)) * scale).astype(np.float32)
        x[0, 0] = np.nan
        blob = compress(x, "lowtide.aesz", model=wild, bound=0.1 * scale, predictor="autoencoder")
        assert_bound(x, decompress(blob, models=[wild]), "float32", Bound("abs", 0.1 * scale))


def test_learned_blocks_make_streams_smaller() -> None:
    x = field((40, 40))
    blob = compress(x, "lowtide.aesz", model=MODEL, bound=0.02)
    assert 2 * len(blob) < len(compress(x, bound=0.02))
    (chunk,) = inspect(blob)["chunks"]
    assert chunk["kind"] == "autoencoder"
    assert len(chunk["orders"]) == 2
    assert chunk["latent_step"] > 0


@pytest.mark.parametrize("goal", ["size", "psnr"])
def test_it_is_never_larger_than_without(goal: str) -> None:
    rng = np.random.default_rng(0)
    for x in (
        mixed(),
        rng.normal(size=(50, 41)),
        np.cumsum(rng.normal(size=3000)),
        np.ones((9, 9)),
    ):
        for bound in (1e-1, 1e-2, 1e-4):
            parameters = {"mode": "rel", "bound": bound, "goal": goal}
            plain = compress(x, **parameters)
            found = compress(x, "lowtide.aesz", model=MODEL, **parameters)
            payload = len(found) - read_header(found).payload_offset
            assert payload <= len(plain) - read_header(plain).payload_offset
            # The header has the name of the codec and of the model.
            assert len(found) <= len(plain) + 90


def test_for_a_smaller_error_the_model_must_not_make_it_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = field((20, 20))
    parameters = {"bound": 0.05, "goal": "psnr"}
    assert kinds(compress(x, "lowtide.aesz", model=MODEL, **parameters)) == {"autoencoder"}
    errors = iter([2.0, 1.0])  # of what is learned, of what is not
    monkeypatch.setattr("lowtide.compression.coding._error", lambda *_: next(errors))
    assert kinds(compress(x, "lowtide.aesz", model=MODEL, **parameters)) != {"autoencoder"}


def test_the_model_is_of_no_use_for_logarithms_and_on_a_lattice() -> None:
    x = np.abs(field((6, 6))) + 1
    blob = compress(x, "lowtide.aesz", model=MODEL, mode="pw_rel", bound=1e-2)
    assert kinds(blob) <= {"differences", "interpolation", "lossless"}
    whole = np.rint(field((20, 20)) * 8)
    blob = compress(whole, "lowtide.aesz", model=MODEL, bound=0.4, predictor="autoencoder")
    assert kinds(blob) <= {"differences", "lossless"}
    assert (decompress(blob) == whole).all()


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            blobs = [stream(name) for name in ARRAYS]
            found.append([(blob, bits(decompress(blob)).tobytes()) for blob in blobs])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


# ---- parameters


def test_parameters_are_checked() -> None:
    codec = get_codec({"id": "lowtide.aesz", "bound": 1, "model": MODEL.sha256})
    assert codec.get_config()["model"] == MODEL.sha256
    for parameters, text in (
        ({}, "model is missing.*train-codec"),
        ({"model": MODEL, "predictor": "autoencodr"}, 'mean "autoencoder"'),
        ({"model": MODEL, "predictor": "autoencoder", "mode": "pw_rel"}, "logarithms"),
        ({"model": "gone.safetensors"}, "gone.safetensors: cannot be read"),
    ):
        with pytest.raises(ConfigError, match=f'"lowtide.aesz".*{text}'):
            compress(field((2, 2)), "lowtide.aesz", bound=1, **parameters)
    with pytest.raises(ConfigError, match=r'codec "lowtide\.sz".*predictor'):
        compress(field((2, 2)), bound=1, predictor="autoencoder")


# ---- streams

GOLDEN = json.loads((HERE / "golden_aesz.json").read_text())
GOLDEN_MODEL = HERE / "golden_model.safetensors"


@pytest.mark.parametrize("name", GOLDEN)
def test_streams_of_version_1_are_read_for_ever(name: str) -> None:
    case = GOLDEN[name]
    blob = bytes.fromhex(case["stream"])
    decoded = bits(decompress(blob, models=[GOLDEN_MODEL]))
    assert decoded.tobytes().hex() == case["decoded"]
    assert kinds(blob) == {"autoencoder"}


def test_the_old_model_is_this_one() -> None:
    model = load_model(GOLDEN_MODEL)
    assert {
        inspect(bytes.fromhex(each["stream"]))["model"]["sha256"] for each in GOLDEN.values()
    } == {model.sha256}
    assert pack_model(model) == GOLDEN_MODEL.read_bytes()


@pytest.mark.parametrize("name", ARRAYS)
def test_mutated_streams_are_refused_or_give_the_right_shape(name: str) -> None:
    blob = stream(name)
    header = read_header(blob)
    payload = blob[header.payload_offset :]
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        mutated = bytearray(payload)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(mutated))
            mutated[place] = rng.choice((0, 1, 0x7F, 0xFF, mutated[place] ^ 1 << rng.randrange(8)))
        if rng.random() < 0.3:
            cut = rng.randrange(len(mutated))
            mutated = mutated[:cut] + rng.randbytes(rng.randrange(6)) + mutated[cut + 3 :]
        forged = forge(blob, payload=bytes(mutated))
        try:
            inspect(forged)
            decoded = decode_stream(forged)
        except CorruptStreamError:
            refused += 1
            continue
        assert (decoded.shape, decoded.nbytes) == (header.shape, header.nbytes)
    assert refused > 50


def record_of(name: str, change: Any) -> bytes:
    """Return a stream of one chunk, with a changed section of codes."""
    blob = stream(name)
    header = read_header(blob)
    known = {**KINDS, 3: LearnedKind(MODEL)}
    payload = memoryview(blob)[header.payload_offset :]
    head, [(chunk, raw)] = parse_payload(payload, header.shape)
    record = parse_record(raw, head, chunk, known)
    parts = {**vars(record), "codes": change(bytes(record.codes))}
    return forge(blob, payload=pack_payload(head, [Record(**parts).pack()]))


def put(place: int, value: int) -> Any:
    def change(section: bytes) -> bytes:
        numbers = list(struct.unpack_from("<IIII", section))
        numbers[place] = value
        return struct.pack("<IIII", *numbers) + section[16:]

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put(0, 41), "42 of 42 blocks are flagged, and 41 claimed"),
        (put(0, 43), "43 learned blocks of 42"),
        (put(0, 0), "0 learned blocks of 42, flags of"),
        (put(1, 0), "flags of 0 bytes"),
        (put(1, 1 << 31), "flags of 2147483648 bytes"),
        (put(2, 1 << 31), "latents of 2147483648"),
        (put(3, 12345), "predicts other values here than where the stream was written"),
        (lambda section: section[:15], "codes of 15 bytes"),
        (lambda section: section + b"x", "damaged codes"),
        (lambda section: section[:-1], "damaged codes"),
    ],
)
def test_sections_that_lie_are_refused(change: Any, text: str) -> None:
    with pytest.raises(CorruptStreamError, match=text):
        decompress(record_of("all learned", change))


def test_a_network_that_gives_other_numbers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = stream("mixed")
    right = Model.outputs

    def off(model: Model, latents: Any) -> Any:
        outputs = right(model, latents)
        outputs[-1, -1] = np.nextafter(outputs[-1, -1], np.float32(9))
        return outputs

    monkeypatch.setattr(Model, "outputs", off)
    with pytest.raises(CorruptStreamError, match="predicts other values here"):
        decompress(blob)


def test_latent_steps_and_hashes_that_are_none_are_refused() -> None:
    for latent_step in (0.0, -1.0, np.nan, np.inf, 5e-324):
        raw = LearnedBlocks((1, 1), latent_step, None).pack()
        with pytest.raises(CorruptStreamError, match="a latent step of"):
            LearnedKind(None).parse(raw, 2)
    blob = stream("mixed")
    config = read_header(blob).codec
    for name in ("short", None, MODEL.sha256.upper(), 3):
        forged = forge(blob, codec={**config, "model": name})
        with pytest.raises(CorruptStreamError):
            inspect(forged)
        with pytest.raises((CorruptStreamError, CodecError)):
            decode_stream(forged)


def test_records_of_this_kind_are_not_read_as_those_of_the_other_codec() -> None:
    blob = stream("mixed")
    config = {key: value for key, value in read_header(blob).codec.items() if key != "model"}
    forged = forge(blob, codec={**config, "id": "lowtide.sz"})
    for read in (decompress, inspect):
        with pytest.raises(CorruptStreamError, match="a record of kind 3"):
            read(forged)


def test_chunks_that_are_too_narrow_have_no_blocks() -> None:
    assert takes((4, 4), (4, 4))
    assert takes((2, 2), (4, 4))
    assert not takes((1, 2), (4, 4))
    assert not takes((400,), (4, 4))
    narrow = np.ones((1000, 1), np.float32) * np.arange(2, dtype=np.float32)
    blob = compress(narrow, "lowtide.aesz", model=model_of((8, 8)), bound=0.1)
    assert "autoencoder" not in kinds(blob)
    with pytest.raises(CorruptStreamError, match=r"shape \(5,\) has no blocks"):
        LearnedBlocks((1,), 1.0, MODEL).from_section(b"", (5,), 1.0, is_double=False)


# ---- parts


@pytest.mark.parametrize(
    ("shape", "block"), [((9, 5), (4, 4)), ((7,), (4,)), ((2, 3, 9, 5), (2, 4)), ((8, 8), (8, 8))]
)
def test_blocks_are_cut_as_the_format_says(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    values = np.arange(int(np.prod(shape)), dtype=np.int32)
    grid = BlockGrid(shape, block)
    blocks = grid.cut(values)
    assert blocks.shape == (grid.count, int(np.prod(block)))
    assert (grid.join(blocks) == values).all()
    chunk = values.reshape(shape)
    edges = (1,) * (len(shape) - len(block)) + block
    sums, flags = [], np.arange(grid.count) % 2
    mask = np.zeros(shape, np.uint8)
    for number, place in enumerate(np.ndindex(grid.counts)):
        cut = tuple(slice(at * e, at * e + e) for at, e in zip(place, edges, strict=True))
        inside = chunk[cut]
        index = np.ix_(*[
            np.minimum(np.arange(at * e, at * e + e), n - 1)
            for at, e, n in zip(place, edges, shape, strict=True)
        ])  # fmt: skip
        assert blocks[number].tolist() == chunk[index].reshape(-1).tolist()
        sums.append(float(inside.sum()))
        mask[cut] = flags[number]
    assert grid.sums(values).tolist() == sums
    assert (grid.spread(flags) == mask.reshape(-1)).all()


def test_bits_are_the_entropy_of_a_two_sided_geometric_distribution() -> None:
    k = np.arange(-2000, 2001)
    for ratio in (0.01, 0.5, 0.98):
        p = (1 - ratio) / (1 + ratio) * ratio ** np.abs(k)
        entropy = -(p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum()
        assert bits_of_mean(np.array((p * np.abs(k)).sum())) == pytest.approx(entropy, rel=1e-6)
    assert bits_of_mean(np.array(0.0)) < 1e-9
    with np.errstate(all="raise"):
        assert np.isfinite(bits_of_mean(np.array([0.0, 1e-300, 1e9]))).all()


def test_the_latent_step_is_the_best_of_those_around() -> None:
    x = field((30, 30))
    found = selection.choose_learned(x.reshape(-1), x.shape, 0.04, MODEL, (1, 1))
    assert found is not None
    sizes = {}
    for factor in (0.25, 0.5, 1, 2, 4):
        other = LearnedBlocks((1, 1), factor * found.latent_step, MODEL)
        sizes[factor] = len(other.to_section(x.reshape(-1), x.shape, 0.04)[0])
    assert min(sizes.values()) > 0.97 * sizes[1]
    noise = np.random.default_rng(0).normal(size=900).astype(np.float32)
    assert selection.choose_learned(noise, (30, 30), 1e-3, MODEL, (0, 0)) is None


def test_each_block_is_predicted_in_the_better_way() -> None:
    x = mixed()
    blob = compress(x, "lowtide.aesz", model=MODEL, mode="rel", bound=1e-2)
    step = inspect(blob)["step"]
    learned = LearnedBlocks((1, 1), inspect(blob)["chunks"][0]["latent_step"], MODEL)
    section, _ = learned.to_section(x.reshape(-1), x.shape, step)
    count = predictor._HEAD.unpack_from(section)[0]
    grid = BlockGrid(x.shape, MODEL.architecture.block)
    assert grid.count * 0.35 < count < grid.count * 0.65
    sizes = []
    for choice in (np.zeros(grid.count, bool), np.ones(grid.count, bool)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(predictor, "better_learned", lambda *_, choice=choice: choice)
            sizes.append(len(learned.to_section(x.reshape(-1), x.shape, step)[0]))
    assert len(section) < 0.9 * min(sizes)


# ---- both back ends

OTHER = """
import json, sys
from pathlib import Path
from lowtide.compression import compress, decompress
from lowtide.core.codec import decode_stream
folder = Path(sys.argv[1])
model = folder / "m.safetensors"
for name, parameters in json.loads((folder / "parameters.json").read_text()).items():
    x = decompress((folder / f"{name}.exact").read_bytes())
    blob = compress(x, "lowtide.aesz", model=model, **parameters)
    (folder / f"{name}.reference").write_bytes(blob)
    decoded = decode_stream((folder / f"{name}.native").read_bytes())
    (folder / f"{name}.decoded").write_bytes(decoded.tobytes())
"""


def test_the_reference_reads_and_writes_the_same(tmp_path: Path) -> None:
    parameters = {name: settings for name, (_, settings) in ARRAYS.items()}
    (tmp_path / "parameters.json").write_text(json.dumps(parameters))
    (tmp_path / "m.safetensors").write_bytes(pack_model(MODEL))
    for name, (x, _) in ARRAYS.items():
        (tmp_path / f"{name}.native").write_bytes(stream(name))
        (tmp_path / f"{name}.exact").write_bytes(compress(x, "lowtide.zstd"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OTHER, str(tmp_path)],
        env={**os.environ, "LOWTIDE_NATIVE": "0", "LOWTIDE_MODELS": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ARRAYS:
        native = (tmp_path / f"{name}.native").read_bytes()
        assert (tmp_path / f"{name}.decoded").read_bytes() == bits(decode_stream(native)).tobytes()
        assert (tmp_path / f"{name}.reference").read_bytes() == native
