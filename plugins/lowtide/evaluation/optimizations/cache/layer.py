"""One layer's key-value cache: everything while a prompt is read, then what is to stay.

The interface is that of transformers' ``CacheLayerMixin``; `adapters` tells transformers so.

Letters: B sequences, K key-value heads, T tokens of a forward pass, D size of a head, N entries
held.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import DataError
from lowtide.evaluation.optimizations.base import Runtime, storages
from lowtide.evaluation.optimizations.cache.policies import Prompt
from lowtide.evaluation.optimizations.cache.quantised import Quantised
from lowtide.evaluation.optimizations.cache.rope import Rope

TAG = "_lowtide_layer"
"""Attribute by which keys on their way to attention name the layer they come from."""


class Meter:
    """What the layers of one cache cost together.

    Attributes:
        peak_bytes: Most bytes of keys and values at a time: what all layers hold, and what the
            layer that is attending decodes for it.
        compress_s: Time spent on choosing, moving and quantising entries.
        prompt_entries: Entries that layers and heads had before they chose, added up.
        kept_entries: Those that they kept.
    """

    def __init__(self) -> None:
        self.layers: list[CompressedLayer] = []
        self.peak_bytes = 0
        self.compress_s = 0.0
        self.prompt_entries = self.kept_entries = 0

    def held_bytes(self) -> int:
        """Return bytes of the distinct storages that all layers hold."""
        return sum(storages(t for layer in self.layers for t in layer.tensors()).values())

    def note(self, *transient: Tensor) -> None:
        """Take the present state, with tensors that exist beside it, into the peak."""
        held = [t for layer in self.layers for t in layer.tensors()]
        self.peak_bytes = max(self.peak_bytes, sum(storages([*held, *transient]).values()))


class CompressedLayer:
    """Keys and values of one layer.

    Attributes:
        keys: Entries held as they are, (B, K, N, D), or None before the first forward pass.
        values: Likewise.
        chosen: Which of the prompt's entries were kept, (B, K, N), where `records` was asked for.
        skipped_to: Tokens of the prompt that later layers read, (B, n); None for all.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(
        self, runtime: Runtime, meter: Meter, rope: Rope | None, *, records: bool, seed: int
    ) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.chosen: Tensor | None = None
        self.skipped_to: Tensor | None = None
        self._packed: tuple[Quantised, Quantised] | None = None
        self._runtime, self._meter, self._rope = runtime, meter, rope
        self._records, self._seed = records, seed
        self._seen = self._prompt_end = 0
        self._is_reading = True
        self._index = len(meter.layers)
        meter.layers.append(self)

    @property
    def is_initialized(self) -> bool:
        """The layer holds something."""
        return self.keys is not None

    @property
    def is_answering(self) -> bool:
        """The prompt has been read, and more than its own tokens are there."""
        return self._seen > self._prompt_end

    def tensors(self) -> list[Tensor]:
        """Return all tensors that are held."""
        packed = [t for part in self._packed or () for t in part.tensors()]
        return [t for t in (self.keys, self.values) if t is not None] + packed

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values, (B, K, T, D); return those to attend to, (B, K, N + T, D)."""
        self._seen += keys.shape[2]
        if self.keys is not None and self.values is not None:
            self.keys = torch.cat([self.keys, keys], 2)
            self.values = torch.cat([self.values, values], 2)
        else:
            self.keys, self.values = keys, values
        all_keys, all_values = self.keys, self.values
        if self._packed is not None and self._runtime.quantiser is not None:
            decoded = self._runtime.quantiser.decode(*self._packed, keys.dtype)
            all_keys = torch.cat([decoded[0], all_keys], 2)
            all_values = torch.cat([decoded[1], all_values], 2)
            self._pack()
        else:
            all_keys = all_keys.view_as(all_keys)  # an own object to carry the tag: no cycle
        self._meter.note(all_keys, all_values)
        setattr(all_keys, TAG, self)
        return all_keys, all_values

    def attended(self, queries: Tensor, positions: Tensor | None, scaling: float) -> None:
        """Called after each attention; after that over the prompt, entries are chosen.

        Args:
            queries: (B, H, T, D).
            positions: Of the queries, (B or 1, T); None: one after the other.
            scaling: Of the products of queries and keys.
        """
        if not self._is_reading or self.keys is None or self.values is None:
            return
        begin_s = time.perf_counter()
        self._is_reading = False
        length = self.keys.shape[2]
        if positions is None:
            positions = torch.arange(length, device=queries.device)[None]
        prompt = Prompt(
            queries=queries, keys=self.keys, values=self.values, positions=positions,
            scaling=scaling, layer=self._index, rope=self._rope, seed=self._seed,
        )  # fmt: skip
        heads = self.keys.shape[0] * self.keys.shape[1]
        self._meter.prompt_entries += length * heads
        skipping = self._runtime.skipping
        if skipping is not None and skipping.layer == self._index + 1:
            self.skipped_to = skipping.kept(prompt)
        if self._runtime.policy is not None:
            self._evict(prompt)
        self._meter.kept_entries += self.keys.shape[2] * heads
        self._pack()
        self._prompt_end = self._seen
        self._meter.note()
        self._meter.compress_s += time.perf_counter() - begin_s

    def _evict(self, prompt: Prompt) -> None:
        policy = self._runtime.policy
        if policy is None:
            return
        kept = policy.kept(prompt)
        if self._records:
            self.chosen = kept
        index = kept.unsqueeze(-1).expand(-1, -1, -1, prompt.keys.shape[-1])
        self.keys, self.values = prompt.keys.gather(2, index), prompt.values.gather(2, index)
        if policy.positions == "rerotated" and self._rope is not None:
            old = prompt.positions[:, None].expand(*kept.shape[:2], -1).gather(2, kept)
            new = torch.arange(kept.shape[2], device=kept.device)
            self.keys = self._rope.turn(self.keys, new - old)
            self._seen = kept.shape[2]

    def _pack(self) -> None:
        """Quantise the tokens that fill whole groups."""
        quantiser = self._runtime.quantiser
        if quantiser is None or self.keys is None or self.values is None or self._is_reading:
            return
        whole = self.keys.shape[2] // quantiser.group_size * quantiser.group_size
        if whole == 0:
            return
        new = quantiser.encode(self.keys[:, :, :whole], self.values[:, :, :whole])
        # Copies: a slice would keep the storage of everything alive.
        self.keys, self.values = self.keys[:, :, whole:].clone(), self.values[:, :, whole:].clone()
        old = self._packed
        self._packed = new if old is None else (old[0].joined(new[0]), old[1].joined(new[1]))

    def get_seq_length(self) -> int:
        """Return the position of the next token."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return entries to attend to and the position of the first, as if they were in a row."""
        held = 0 if self.keys is None else self.keys.shape[2]
        if self._packed is not None:
            held += self._packed[0].packed.shape[2] * self._packed[0].packed.shape[3]
        return held + query_length, self._seen - held

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence `repeats` times, one after the other."""
        if self.keys is None or self.values is None:
            raise DataError("an empty cache cannot be repeated; read a prompt first")
        self.keys = self.keys.repeat_interleave(repeats, 0)
        self.values = self.values.repeat_interleave(repeats, 0)
        if self._packed is not None:
            keys, values = (
                part.map(lambda t: t.repeat_interleave(repeats, 0)) for part in self._packed
            )
            self._packed = keys, values
