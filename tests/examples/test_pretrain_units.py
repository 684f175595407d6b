"""The parts of the pretraining example, each against something independent of it."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pretrain"
_MODULES = [
    "errors",
    "model",
    "tokenizer",
    "sources",
    "data",
    "batches",
    "validation",
    "checkpoints",
    "pace",
    "run_folder",
]


def _load_example() -> SimpleNamespace:
    """Import the example's files, which are a script's neighbours and not a package."""
    hidden = {name: sys.modules.pop(name, None) for name in _MODULES}
    sys.path.insert(0, str(EXAMPLE))
    try:
        loaded = {name: importlib.import_module(name) for name in _MODULES}
    finally:
        sys.path.remove(str(EXAMPLE))
        for name, module in hidden.items():  # another example may have files of these names
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
    return SimpleNamespace(**loaded)


job = _load_example()
UsageError = job.errors.UsageError
TEXTS = ["def first(x):\n    return x + 1\n" * 8, "grüße 日本 \x07 \U0001f30a\r\n", " \t\n", "é"]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return job.tokenizer.train_tokenizer(TEXTS, 300)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    (root / "inner").mkdir(parents=True)
    for number in range(40):
        name = f"inner/{number}.txt" if number % 2 else f"{number}.txt"
        words = " ".join(str((number * 7919 + k) % 1009) for k in range(60))
        (root / name).write_text(f"document {number}\n{words}\n", encoding="utf-8")
    (root / "copy_of_3.md").write_bytes((root / "inner/3.txt").read_bytes())
    (root / "binary.dat").write_bytes(b"\xff\xfe\x00binary")
    (root / "nul.txt").write_bytes(b"a\0b")
    for skipped in (".hidden", "__pycache__", "site-packages"):
        (root / skipped).mkdir()
        (root / skipped / "x.txt").write_text("must not be used")
    return root


def _prepare(root: Path, folder: Path, vocabulary: int = 400) -> object:
    source = job.sources.find_source(str(root))
    job.data.prepare(folder, source, vocabulary=vocabulary, limit_bytes=2**20)
    return job.data.load(folder)


def _text_of(folder: Path, tokens: np.ndarray) -> list[str]:
    tokenizer = job.tokenizer.load_tokenizer(folder / "tokenizer.json")
    ends = np.flatnonzero(tokens == job.tokenizer.END_OF_TEXT_ID)
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


# tokenizer


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_tokenizer_gives_any_text_back_and_counts_its_bytes(text: str, tokenizer: object) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert job.tokenizer.token_lengths(tokenizer)[ids].sum() == len(text.encode())


def test_tokenizer_is_the_same_when_trained_twice(tokenizer: object) -> None:
    assert job.tokenizer.train_tokenizer(list(TEXTS), 300).to_str() == tokenizer.to_str()


# data


def test_split_puts_each_document_on_one_side_and_loses_none(corpus: Path, tmp_path: Path) -> None:
    data = _prepare(corpus, tmp_path / "data")
    sides = {split: _text_of(tmp_path / "data", np.array(getattr(data, split)))
             for split in ("train", "validation")}  # fmt: skip
    assert not set(sides["train"]) & set(sides["validation"])
    files = [p for p in corpus.rglob("*.txt") if p.stem.isdigit()]
    assert sorted(sides["train"] + sides["validation"]) == sorted(p.read_text() for p in files)
    assert len(sides["validation"]) >= 1
    for split, texts in sides.items():
        assert data.manifest.text_bytes[split] == sum(len(t.encode()) for t in texts)
        assert data.token_bytes[getattr(data, split)].sum() == data.manifest.text_bytes[split]


def test_split_does_not_depend_on_names(corpus: Path, tmp_path: Path) -> None:
    first = _prepare(corpus, tmp_path / "data").manifest
    moved = tmp_path / "moved"
    moved.mkdir()
    for number, path in enumerate(sorted(corpus.rglob("*.txt"), reverse=True)):
        if path.stem.isdigit():
            shutil.copy(path, moved / f"z{number}.md")
    second = _prepare(moved, tmp_path / "data2").manifest
    assert (second.fingerprint, second.tokens) == (first.fingerprint, first.tokens)


def test_prepared_folder_is_used_again_and_checked(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    _prepare(corpus, folder)
    written = (folder / "train.bin").stat().st_mtime_ns
    _prepare(corpus, folder)
    assert (folder / "train.bin").stat().st_mtime_ns == written
    with (folder / "train.bin").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(UsageError, match=r"train\.bin: not the \d+ bytes"):
        job.data.load(folder)


def test_preparation_starts_again_when_it_was_killed(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (tmp_path / "data.tmp-1").mkdir()
    folder.mkdir()
    (folder / "train.bin").write_bytes(b"half")
    assert _prepare(corpus, folder).manifest.documents["train"] > 30
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_other_ranks_see_why_rank_0_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "text"
    root.mkdir()
    (root / "only.txt").write_text("one document")
    monkeypatch.setenv("MASTER_PORT", "1234")
    options = {"vocabulary": 300, "limit_bytes": 2**20}
    source = job.sources.find_source(str(root))
    for rank in (0, 1):
        with pytest.raises(UsageError, match="at least 2 are needed"):
            job.data.prepare_on_rank_0(tmp_path / "data", source, rank=rank, **options)
    monkeypatch.setenv("MASTER_PORT", "1235")  # another launch does not read the old message
    monkeypatch.setattr(job.data, "WAIT_S", 0.0)
    with pytest.raises(UsageError, match="rank 0 has not prepared"):
        job.data.prepare_on_rank_0(tmp_path / "data", source, rank=1, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "nothing there"),
        (lambda p: p.mkdir(), "holds no file"),
        (lambda p: p.write_text("text"), r"neither \.bin nor \.idx"),
        (lambda p: p.with_name("here.bin").write_bytes(b""), r"needs .*here\.idx too"),
    ],
)
def test_find_source_says_what_is_wrong(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "here")
    with pytest.raises(UsageError, match=message):
        job.sources.find_source(str(tmp_path / "here"))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_indexed_dataset_of_megatron_is_read(tmp_path: Path, dtype: type) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 5000, size=n).astype(dtype) for n in (300, 1, 700, 40, 90)]
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=dtype)
    for ids in documents:  # the third document consists of two sequences
        lengths = [len(ids) - 200, 200] if len(ids) == 700 else [len(ids)]
        builder.add_document(torch.from_numpy(ids.astype(np.int64)), lengths)
    builder.finalize(str(tmp_path / "set.idx"))
    for name in ("set", "set.bin", "set.idx"):
        source = job.sources.find_source(str(tmp_path / name))
        read = list(source.documents())
        assert [ids.tolist() for ids in read] == [ids.tolist() for ids in documents]
    job.data.prepare(tmp_path / "data", source, vocabulary=9, limit_bytes=1)
    data = job.data.load(tmp_path / "data")
    assert data.manifest.vocabulary == max(int(ids.max()) for ids in documents) + 1
    assert sum(data.manifest.tokens.values()) == 1131
    assert data.token_bytes is None
    assert data.manifest.xz_bits_per_byte is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:20], "the header alone"),
        (lambda raw: b"X" + raw[1:], "does not start as a Megatron index"),
        (lambda raw: raw[:17] + b"\x06" + raw[18:], "type code is 6"),
        (lambda raw: raw[:18] + b"\xff" * 8 + raw[26:], "its counts ask for"),
        (lambda raw: raw[:34] + b"\xff\xff\xff\x7f" + raw[38:], "ends after the 20 tokens"),
        (lambda raw: raw[:34] + b"\xff" * 4 + raw[38:], "negative or odd place"),
        (lambda raw: raw[:-8] + b"\x09" + raw[-7:], "out of order"),
    ],
)
def test_damaged_index_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    np.arange(20, dtype="<u2").tofile(tmp_path / "set.bin")
    header = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08"
    counts = (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    places = np.array([10, 10], "<i4").tobytes() + np.array([0, 20, 0, 1, 2], "<i8").tobytes()
    (tmp_path / "set.idx").write_bytes(header + counts + places)
    source = job.sources.find_source(str(tmp_path / "set"))
    assert [len(ids) for ids in source.documents()] == [10, 10]
    (tmp_path / "set.idx").write_bytes(damage(header + counts + places))
    with pytest.raises(UsageError, match=message):
        list(source.documents())


# batches and validation


def _batches(readers: int = 2, seed: int = 0, tokens: int = 1000) -> object:
    return job.batches.TrainingBatches(
        np.arange(tokens, dtype=np.uint16),
        sequence=16, seed=seed, micro_batch=3, readers=readers, accumulation=2,
    )  # fmt: skip


def test_batches_are_a_function_of_seed_step_and_rank() -> None:
    first, second = _batches(), _batches()
    wanted = [(step, micro, rank) for step in range(30) for micro in (0, 1) for rank in (0, 1)]
    expected = {key: first.batch(*key) for key in wanted}
    for key in reversed(wanted):  # a resumed run starts anywhere
        for got, want in zip(second.batch(*key), expected[key], strict=True):
            assert torch.equal(got, want)
    assert not torch.equal(_batches(seed=1).batch(0, 0, 0)[0], expected[0, 0, 0][0])


def test_batches_use_each_window_once_per_epoch_and_shift_targets_by_one() -> None:
    batches = _batches()
    windows = (1000 - 1) // 16 - 1
    starts = []
    for step in range(12):
        for micro in (0, 1):
            for rank in (0, 1):
                inputs, targets = batches.batch(step, micro, rank)
                assert torch.equal(targets, inputs + 1)
                starts += inputs[:, 0].tolist()
    epoch = starts[:windows]
    assert len(set(epoch)) == windows
    assert len({start % 16 for start in epoch}) == 1
    second = starts[windows : 2 * windows]
    assert len(second) == windows
    assert [s // 16 for s in second] != [s // 16 for s in epoch]
    assert batches.tokens_per_step == 16 * 3 * 2 * 2


def test_batches_refuse_too_little_text() -> None:
    with pytest.raises(UsageError, match="has 32 tokens, at least 33 are needed"):
        _batches(tokens=32)


@pytest.mark.parametrize("length", [2, 16, 17, 33, 200, 1000])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_validation_predicts_every_token_but_the_first_once(length: int, readers: int) -> None:
    tokens = np.arange(length, dtype=np.uint16)
    options = {"sequence": 16, "micro_batch": 2, "readers": readers}
    parts = [list(job.batches.validation_batches(tokens, reader=reader, **options))
             for reader in range(readers)]  # fmt: skip
    assert len({len(part) for part in parts}) == 1  # ranks must call the model together
    targets = torch.cat([targets.flatten() for part in parts for _, targets in part])
    assert sorted(targets[targets != job.model.IGNORED].tolist()) == list(range(1, length))


class _Bigram(torch.nn.Module):
    """Gives 1/2 to the token one higher and 1/8 to the others: a loss one can do by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        used = targets != job.model.IGNORED
        bits = torch.where(targets == tokens + 1, 1, 3).double()
        loss = bits * math.log(2)
        return loss[used].mean()


def test_bits_per_byte_equals_a_hand_computation() -> None:
    tokens = np.array([1, 2, 3, 9, 4, 5, 0, 1], dtype=np.uint16)
    # predicted:         2  3  9  4  5  0  1     bits: 1 1 3 3 1 3 1 = 13
    token_bytes = np.array([0, 1, 2, 3, 4, 5, 0, 0, 0, 7], dtype=np.int32)
    # bytes:             2  3  7  4  5  0  1                           = 22
    data = SimpleNamespace(validation=tokens, token_bytes=token_bytes)
    options = {"sequence": 3, "micro_batch": 2, "limit_windows": 100}
    score = job.validation.validate(_Bigram(), data, **options)
    assert score.tokens == 7
    assert score.bits_per_byte == pytest.approx(13 / 22, rel=1e-12)
    assert score.loss == pytest.approx(13 / 7 * math.log(2), rel=1e-12)
    data.token_bytes = None
    assert job.validation.validate(_Bigram(), data, **options).bits_per_byte is None


# model


def _model(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"vocabulary": 50, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "sequence": 20}
    return job.model.Decoder(job.model.ModelConfig(**{**shape, **changes})).double()


@pytest.mark.parametrize("changed", [1, 10, 19])
def test_model_does_not_look_ahead(changed: int) -> None:
    model = _model()
    tokens = torch.randint(0, 50, (2, 20))
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.allclose(before[:, changed], after[:, changed])


@pytest.mark.parametrize(("kv_heads", "is_tied"), [(4, True), (2, False), (1, True)])
def test_model_equals_llama_of_transformers(kv_heads: int, is_tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = _model(kv_heads=kv_heads, tied_embeddings=is_tied)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=model.config.inner_width,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5, rope_theta=10_000.0, tie_word_embeddings=is_tied,
        max_position_embeddings=20, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).double()
    llama.load_state_dict(_llama_weights(model))
    tokens = torch.randint(0, 50, (3, 20))
    ours = model(tokens)
    theirs = llama(input_ids=tokens).logits
    # Both tables of angles are float32, so agreement ends there and not at float64.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    labels = torch.cat((torch.full((3, 1), -100), tokens[:, 1:]), dim=1)
    loss = model(tokens[:, :-1], tokens[:, 1:]).float()  # theirs is computed in float32
    torch.testing.assert_close(loss, llama(input_ids=tokens, labels=labels).loss, rtol=1e-6, atol=0)


def _llama_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.unembedding.weight,
    }
    for number, block in enumerate(model.blocks):
        key, value = block.attention.key_value.weight.chunk(2)
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        parts = {
            "self_attn.q_proj": block.attention.query.weight,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": block.attention.output.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.feed_forward.down.weight,
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.feed_forward_norm.weight,
        }
        weights |= {f"model.layers.{number}.{name}.weight": w for name, w in parts.items()}
    return weights


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = _model()
    decayed, plain = job.model.parameter_groups(model, 0.1)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    ids = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "whole even number"),
        ({"kv_heads": 3}, "does not divide"),
        ({"layers": 0}, "at least 1"),
    ],
)
def test_model_refuses_impossible_shapes(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model(**changes)


# checkpoints, plan, run folder


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    """Three complete checkpoints of two ranks."""
    for step in (10, 20, 30):
        folder = tmp_path / job.checkpoints.tag_of(step)
        folder.mkdir()
        for rank in (0, 1):
            for kind in ("optim", "model"):
                path = folder / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
                torch.save({"x": torch.arange(1000)}, path)
    return tmp_path


def test_newer_half_written_checkpoints_are_removed(saved: Path) -> None:
    job.checkpoints.remove_newer(saved, 20)
    assert job.checkpoints.steps_on_disk(saved) == [20, 10]


def test_old_checkpoints_are_removed_and_two_stay(saved: Path) -> None:
    job.checkpoints.remove_old(saved, 30)
    assert job.checkpoints.steps_on_disk(saved) == [30, 20]
    job.checkpoints.remove_old(saved, 20)  # 30 is not known to be complete: not ours to touch
    assert job.checkpoints.steps_on_disk(saved) == [30, 20]


def test_budget_becomes_steps() -> None:
    plan = job.pace.plan_from_budget(
        minutes=5,
        done_steps=15,
        left_s=258.0,
        step_s=0.5,
        validation_s=2.0,
        final_validation_s=34.0,
    )
    # 258 - 34 - 8 - 8 * 2 = 200 s, of which 95 % = 190 s = 380 steps
    assert (plan.total_steps, plan.save_every, plan.validate_every) == (395, 60, 49)
    late = job.pace.plan_from_budget(
        minutes=5, done_steps=15, left_s=1.0, step_s=0.5, validation_s=2.0, final_validation_s=3.0
    )
    assert late.total_steps == 25


def test_run_folder_refuses_other_settings_and_knows_when_it_is_finished(tmp_path: Path) -> None:
    settings_of_run = {"seed": 0, "world_size": 2}
    folder = job.run_folder.RunFolder(tmp_path / "run", settings_of_run)
    assert not folder.is_finished(minutes=None, steps=None)
    plan = job.pace.plan_from_steps(40)
    folder.save(job.run_folder.Progress(status="finished", step=40, used_s=90.0, plan=plan))
    again = job.run_folder.RunFolder(tmp_path / "run", settings_of_run)
    assert again.progress == folder.progress
    wanted = [
        (None, None, True),
        (None, 40, True),
        (None, 41, False),
        (1, None, True),
        (2, None, False),
    ]
    for minutes, steps, answer in wanted:
        assert again.is_finished(minutes=minutes, steps=steps) is answer
    with pytest.raises(UsageError, match=r"--nproc-per-node 2, now it is 4"):
        job.run_folder.RunFolder(tmp_path / "run", {**settings_of_run, "world_size": 4})
    (tmp_path / "run" / "run.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(UsageError, match="format 9"):
        job.run_folder.RunFolder(tmp_path / "run", settings_of_run)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        job.run_folder.RunFolder(tmp_path / "run", settings_of_run)
