"""Settings of the ``checkpoint`` key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lowtide.checkpoint.compact.copies import CompactConfig
from lowtide.core.config import Auto, PluginConfig
from lowtide.core.errors import ConfigError

MIB = 1 << 20
CHUNK_BYTES = 4 * MIB  # of one write and one checksum, on every level
NODE = "{node}"  # in a path: the number of the node


class TierConfig(BaseModel):
    """One level of storage: a folder, and how it is used."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    path: str = Field(min_length=1)
    """Folder of this level, ~ for the home folder. ``/dev/shm/...`` is host memory that outlives
    the trainer."""

    every: int | Auto = 1
    """Only every this many-th checkpoint comes to this level. Auto, for all but the first: as often
    as loses least time (Young/Daly), from what bringing one here costs the training and
    `mean_time_between_failures_s`, and not before the last one is here."""

    mean_time_between_failures_s: float | None = Field(default=None, gt=0)
    """How often happens what destroys the faster levels, for ``"every": "auto"``; null takes the
    plugin's."""

    keep: int | None = Field(default=None, ge=1)
    """Newest checkpoints kept at this level; null takes the plugin's `keep`."""

    bytes_per_s: float | None = Field(default=None, gt=0)
    """Highest rate at which one rank writes to this level; null is no limit."""

    scope: Literal["shared", "node"] = "shared"
    """Who sees `path`. Shared: all ranks see one folder. Node: each node has a folder of its own
    there, on a local disk or in host memory; ``{node}`` in the path is the node's number."""

    copies: Literal[0, 1] = 0
    """With ``"scope": "node"``: 1 keeps each rank's files on the next node too, so that the loss
    of one node loses nothing."""

    @field_validator("path")
    @classmethod
    def _expand(cls, path: str) -> str:
        return os.path.expanduser(path)

    @model_validator(mode="after")
    def _check(self) -> TierConfig:
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError(f'"every" is {self.every} at {self.path}; at least 1, or "auto"')
        if self.scope == "shared" and self.copies:
            raise ValueError(
                f'"copies" is {self.copies} at {self.path}, whose "scope" is "shared": all nodes '
                f'see that folder already; set "scope" to "node" or "copies" to 0'
            )
        if self.scope == "shared" and NODE in self.path:
            raise ValueError(
                f'"path" is {self.path}, which is another folder on each node, but "scope" is '
                f'"shared"; set "scope" to "node" or name one folder'
            )
        return self

    compact: CompactConfig | None = None
    """Store small copies here: compressed, and only what has changed. Only for the last level, when
    there is one above it. They are expanded before they are loaded."""


class CheckpointConfig(PluginConfig):
    """Lazy, asynchronous checkpoints on several levels of storage (see docs/checkpoint.md)."""

    tiers: tuple[TierConfig, ...] = ()
    """Levels, fastest first; the last is the folder that the script saves to and loads from.
    Empty: only that folder. Saves to any other folder are written there directly."""

    every_n_steps: int | Auto | None = Field(default=None)
    """Save by itself after every this many optimizer steps, to the last of `tiers`. Auto: the
    interval that loses least time (Young/Daly), from the measured cost and
    `mean_time_between_failures_s`. Null: only when the script saves."""

    mean_time_between_failures_s: float = Field(default=14_400.0, gt=0)
    """How often the whole job fails, for ``"every_n_steps": "auto"``."""

    keep: int | None = Field(default=None, ge=1)
    """Newest complete checkpoints kept in each folder; older ones are removed. Null: all."""

    keep_every_n_steps: int | None = Field(default=None, ge=1)
    """Checkpoints whose step is a multiple of this are kept for ever."""

    host_buffer_bytes: int | Auto = "auto"
    """Host memory of each rank that holds bytes on their way to storage. Auto: the size of the
    rank's state, at most an eighth of the memory that is free on the node."""

    pinned_buffer_bytes: int | Auto = "auto"
    """Pinned host memory of each rank, beside `host_buffer_bytes`: the way for tensors on a GPU,
    allocated at the first save of such tensors. Auto: a quarter of `host_buffer_bytes`, 16 to
    256 MiB."""

    lazy: bool = True
    """Copy parameters and optimizer state during the next forward and backward. False copies
    everything before `save_checkpoint` returns."""

    on_error: Literal["warn", "raise"] = "warn"
    """What a checkpoint that cannot be stored does. Raise: the next `save_checkpoint` raises, on
    all ranks alike, and so does `wait`."""

    max_wait_s: float = Field(default=30.0, gt=0)
    """Longest time that an update waits for a copy, or a save for its folder to be made; then the
    checkpoint is given up."""

    stall_timeout_s: float = Field(default=120.0, gt=0)
    """A level that makes no progress for this long has failed."""

    commit_timeout_s: float = Field(default=600.0, gt=0)
    """How long to wait for the other ranks' parts of a checkpoint."""

    close_timeout_s: float = Field(default=1800.0, gt=0)
    """How long the end of a run waits for checkpoints that are still being written."""

    verify: Literal["full", "fast", "off"] = "full"
    """What is checked before loading: all checksums, a sample of them, or only sizes."""

    scrub_every_s: float | None = Field(default=None, gt=0)
    """Read one committed checkpoint again every so many seconds, in the background, and say if it
    is damaged. Null: never."""

    io: Literal["auto", "io_uring", "threads"] = "auto"
    """How files are written. Auto: io_uring where the kernel allows it, else a pool of threads."""

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        if self.every_n_steps is not None and not self.tiers:
            raise ValueError(
                '"every_n_steps" needs to know where to save; add "tiers": [{"path": ...}]'
            )
        if isinstance(self.every_n_steps, int) and self.every_n_steps < 1:
            raise ValueError('"every_n_steps" must be at least 1, "auto" or null')
        if isinstance(self.host_buffer_bytes, int) and self.host_buffer_bytes < 16 * MIB:
            raise ValueError(
                f'"host_buffer_bytes" is {self.host_buffer_bytes}, at least {16 * MIB} (16 MiB) '
                f"are needed"
            )
        least = 2 * CHUNK_BYTES
        if isinstance(self.pinned_buffer_bytes, int) and self.pinned_buffer_bytes < least:
            raise ValueError(
                f'"pinned_buffer_bytes" is {self.pinned_buffer_bytes}, at least {least} '
                f"({least // MIB} MiB) are needed"
            )
        if any(tier.compact for tier in self.tiers[:-1]) or (
            len(self.tiers) == 1 and self.tiers[0].compact
        ):
            raise ValueError(
                '"compact" is for the last of two or more levels: a checkpoint is made small on '
                "its way down, not while training waits; move it there or add a level before it"
            )
        if self.tiers and self.tiers[0].every == "auto":
            raise ValueError(
                f'"every" is "auto" at {self.tiers[0].path}, the first of "tiers", where every '
                f'checkpoint comes; set "every_n_steps" to "auto"'
            )
        paths = [os.path.realpath(tier.path) for tier in self.tiers]
        for number, path in enumerate(paths):
            if (first := paths.index(path)) < number:
                raise ValueError(
                    f'"tiers" names one folder twice: {self.tiers[first].path} and '
                    f"{self.tiers[number].path} are {path}"
                )
        if len(self.tiers) > 1 and self.tiers[-1].scope == "node":
            raise ValueError(
                f'the last of "tiers", {self.tiers[-1].path}, has the "scope" "node"; the last '
                f'must be "shared" where there are several: it is what remains when nodes are lost'
            )
        return self

    def check_host(self, host_config: Mapping[str, Any]) -> None:
        """Refuse what else would decide how DeepSpeed writes its checkpoints."""
        block = host_config.get("checkpoint") or {}
        rivals = [
            (isinstance(block, Mapping) and bool(block.get("writer")), "checkpoint.writer"),
            ("datastates_ckpt" in host_config, "datastates_ckpt"),
            ("nebula" in host_config, "nebula"),
        ]
        for is_set, key in rivals:
            if is_set:
                raise ConfigError(
                    f'lowtide.checkpoint: DeepSpeed\'s own "{key}" is set too, and only one can '
                    f"write checkpoints; remove one of them"
                )
