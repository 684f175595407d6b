"""The made-up trainer of bench_checkpoint.py, and those who save it: Lowtide and its rivals."""

from __future__ import annotations

import concurrent.futures
import mmap
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20
STEP = {"config": {}, "client_keys": []}

# -- the made-up trainer -----------------------------------------------------------------------


class Trainer:
    """Computes for a while without touching the state, then updates all of it."""

    def __init__(self, sizes_bytes: list[int], iteration_s: float) -> None:
        torch.set_num_threads(1)
        self.state = {f"t{i}": torch.randn(n // 4) for i, n in enumerate(sizes_bytes)}
        self._a = torch.randn(512, 512)
        begin_s = time.perf_counter()
        for _ in range(50):
            self._a @ self._a
        self._products = round(50 * iteration_s / (time.perf_counter() - begin_s))

    @property
    def total_bytes(self) -> int:
        return sum(t.numel() * 4 for t in self.state.values())

    def forward_backward(self) -> float:
        begin_s = time.perf_counter()
        for _ in range(self._products):
            self._a @ self._a
        return time.perf_counter() - begin_s

    def update(self) -> None:
        with torch.no_grad():
            for tensor in self.state.values():
                tensor.mul_(0.999)


# -- rivals: each is save() -> (what comes before the update, what waits until it is durable) -----

Pending = tuple[Callable[[], None], Callable[[], float]]  # the latter says when that was


def nothing() -> None:
    return None


def at_once() -> float:
    return time.perf_counter()


class Lowtide:
    """The saver behind the plugin, with the buffer that it chooses for such a state."""

    def __init__(self, trainer: Trainer, folder: Path, buffer_bytes: int | None = None) -> None:
        from lowtide.checkpoint.board import Board
        from lowtide.checkpoint.config import CHUNK_BYTES, CheckpointConfig
        from lowtide.checkpoint.saver import Saver

        self.trainer, self.folder, self.step = trainer, folder, 0
        wanted = buffer_bytes or trainer.total_bytes
        chunks = max(4, -(-wanted // CHUNK_BYTES) + 1)
        config = CheckpointConfig(keep=2)
        self._buffer_bytes = chunks * CHUNK_BYTES
        self.saver = Saver(config, Board(), buffer_bytes=self._buffer_bytes)

    def wait_ready(self) -> None:
        """Wait until the buffer has its memory."""
        while self.saver.writer.facts()["touched_bytes"] < self._buffer_bytes:
            time.sleep(0.01)

    def save(self) -> Pending:
        from lowtide.checkpoint.saving import Stage

        self.step += 1
        self.saver.begin(self.folder, f"step{self.step}", step=self.step, details=STEP)
        self.saver.add(self.trainer.state, "state.pt", is_stable=lambda _tensor: True)
        saving = self.saver.end()

        def durable() -> float:
            if not saving.wait(Stage.COMMITTED, 600):
                raise RuntimeError(str(saving.error))
            return saving.times_s[Stage.COMMITTED]

        return lambda: void(self.saver.wait_captured()), durable

    def close(self) -> None:
        self.saver.close(60.0)


def void(_value: Any) -> None:
    return None


class TorchSave:
    """torch.save, then fsync: what DeepSpeed's own engine does, made durable."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.path = trainer, folder / "state.pt"

    def save(self) -> Pending:
        self.path.unlink(missing_ok=True)
        with open(self.path, "wb") as file:
            torch.save(self.trainer.state, file)
            file.flush()
            os.fsync(file.fileno())
        now_s = time.perf_counter()
        return nothing, lambda: now_s

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


class Dcp:
    """torch.distributed.checkpoint.async_save in one of its three ways."""

    def __init__(self, trainer: Trainer, folder: Path, way: str) -> None:
        import torch.distributed.checkpoint as dcp

        self.dcp, self.trainer, self.folder, self.way = dcp, trainer, folder, way
        self.count = 0
        self.stager: Any = None
        if way == "stager":
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            options = StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=True,
                use_non_blocking_copy=False,
            )  # fmt: skip
            self.stager = DefaultStager(options)

    def save(self) -> Pending:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType as Kind

        shutil.rmtree(self.folder / str(self.count), ignore_errors=True)
        self.count += 1
        writer = self.dcp.FileSystemWriter(self.folder / str(self.count), sync_files=True)
        extra: dict[str, Any] = {}
        if self.way == "process":
            extra["async_checkpointer_type"] = Kind.PROCESS
        if self.stager is not None:
            extra["async_stager"] = self.stager
        response = self.dcp.async_save(self.trainer.state, storage_writer=writer, **extra)
        before_update: Callable[[], None] = nothing
        uploaded: Any = response
        if self.stager is not None:
            staged, uploaded = response.staging_completion, response.upload_completion
            before_update = lambda: void(staged.result())  # noqa: E731
        ends_s: list[float] = []
        uploaded.add_done_callback(lambda _future: ends_s.append(time.perf_counter()))

        def durable() -> float:
            uploaded.result()
            return ends_s[0] if ends_s else time.perf_counter()

        return before_update, durable

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class DeepSpeedWriter:
    """DeepSpeed's own fast writer (``"checkpoint": {"writer": ...}``), made durable.

    It needs memory that can be pinned, so without a GPU it says why it does not start.
    """

    def __init__(self, trainer: Trainer, folder: Path, *, is_decoupled: bool) -> None:
        import deepspeed
        from deepspeed.runtime.checkpoint_engine import utils
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.utils import groups

        deepspeed.init_distributed("gloo")
        writer = {"type": "fast", "decoupled": is_decoupled, "data_parallel": "replica"}
        config = DeepSpeedConfig({"train_batch_size": 1, "checkpoint": {"writer": writer}})
        self.trainer, self.folder, self.is_decoupled = trainer, folder, is_decoupled
        if is_decoupled:  # else it starts, and its process dies of the same, seen at the commit
            torch.empty(1).pin_memory()
        self.engine: Any = utils.create_checkpoint_engine(
            config_params=config, groups=groups, zero_stage=1, has_moe_layers=False,
            optimize_dp_state=False,
        )  # fmt: skip

    def save(self) -> Pending:
        from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo

        path = self.folder / "last" / "state.pt"
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        info = CheckpointCommitInfo("last", str(self.folder), save_latest=False)
        self.engine.create(info)
        self.engine.save(self.trainer.state, str(path))
        ends_s: list[float] = []

        def commit() -> None:
            self.engine.commit(info)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            ends_s.append(time.perf_counter())

        if not self.is_decoupled:
            commit()
            return nothing, lambda: ends_s[0]
        return commit, lambda: ends_s[0]

    def close(self) -> None:
        self.engine.cleanup()


def raw_write_s(folder: Path, total_bytes: int) -> float:
    """Seconds to bring `total_bytes` to the disk past the page cache, synced, by four threads."""
    path, chunk = folder / "raw.bin", 4 * MIB
    total_bytes = -(-total_bytes // chunk) * chunk
    buffer = mmap.mmap(-1, chunk)
    buffer.write(os.urandom(chunk))
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT)
    begin_s = time.perf_counter()
    os.posix_fallocate(descriptor, 0, total_bytes)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        offsets = range(0, total_bytes, chunk)
        list(pool.map(lambda offset: os.pwrite(descriptor, buffer, offset), offsets))
    os.fsync(descriptor)
    elapsed_s = time.perf_counter() - begin_s
    os.close(descriptor)
    path.unlink()
    return elapsed_s
