"""The pack and unpack hooks: what of a forward pass is quantised, shared, or left as it is."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter

from lowtide.compression.activations.held import Held, Reader, Released, Shared
from lowtide.compression.activations.layout import describe, elements
from lowtide.compression.activations.operations import Operation, Watch, caller
from lowtide.compression.activations.quantiser import DTYPES, Quantiser

Find = Callable[[Tensor], Callable[[], Tensor] | None]
ATTENTION_BITS = 8
"""Of what attention saves, whatever the others have: with 4, training suffers (see
``benchmarks/results/2026-11-27-activations-attention-in-few-bits-2-cores.md``)."""
_COPY_STEPS = 3  # operations that make a copy of a parameter, as in weight.to(dtype).t()


@dataclass(slots=True)
class Counts:
    """What happened in one forward pass.

    Attributes:
        packed: Tensors that were quantised.
        shared: Saved again by another operation, and found.
        saved_bytes: What stock would hold, without parameters.
        held_bytes: What is held of it.
        raw: Tensors left as they are, by reason.
        raw_bytes: Their bytes, by reason; what lies in parameters costs none.
    """

    packed: int = 0
    shared: int = 0
    saved_bytes: int = 0
    held_bytes: int = 0
    raw: Counter[str] = field(default_factory=Counter)
    raw_bytes: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, with the ratio of the bytes, as plain values."""
        return {
            "packed": self.packed,
            "shared": self.shared,
            "saved_bytes": self.saved_bytes,
            "held_bytes": self.held_bytes,
            "ratio": self.saved_bytes / self.held_bytes if self.held_bytes else None,
            "raw": dict(self.raw),
            "raw_bytes": dict(self.raw_bytes),
        }


class Saving:
    """Holds what autograd saves between `begin` and `end`. One for a session.

    Args:
        quantiser: How values become codes.
        min_bytes: Smaller tensors stay as they are.
    """

    def __init__(self, quantiser: Quantiser, min_bytes: int) -> None:
        self.quantiser = quantiser
        self._fine = replace(quantiser, bits=ATTENTION_BITS)
        self.counts = Counts()
        self.excluded = 0  # modules that are running now and were named in "exclude"
        self.has_seen_compiled = False
        self._min_bytes = min_bytes
        self._watch = Watch()
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._entered: contextlib.ExitStack | None = None
        self._shared = Shared()
        self._live: weakref.WeakSet[Held] = weakref.WeakSet()
        self._seen: set[tuple[int, int, int]] = set()
        self._exact: dict[int, torch.UntypedStorage] = {}
        self._find: Find | None = None
        self._seed = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def is_active(self) -> bool:
        """Whether autograd's hooks are set."""
        return self._entered is not None

    def begin(self, exact: Iterable[Tensor], seed: int, find: Find | None = None) -> None:
        """Set autograd's hooks.

        Args:
            exact: Parameters and buffers: what shares their memory stays as it is.
            seed: Of this forward pass's random rounding.
            find: For parameters that are taken away after the forward: how to get one again.
        """
        storages = [each.untyped_storage() for each in exact if each.layout is torch.strided]
        # Kept, so that nothing else can get the address of one that is given up meanwhile.
        self._exact = {each._cdata: each for each in storages}
        self._find = find
        self._seed = seed
        self._generators.clear()
        self._seen.clear()
        self.counts = Counts()
        self.excluded = 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._hooks)
            stack.enter_context(self._watch)
            self._entered = stack.pop_all()

    def end(self) -> None:
        """Take the hooks away again. Idempotent."""
        entered, self._entered = self._entered, None
        self._exact.clear()
        self._find = None
        if entered is not None:
            entered.close()

    def live_bytes(self) -> int:
        """Return the bytes of all codes that some backward pass has still to read."""
        return sum(held.codes.nbytes for held in self._live if held.codes is not None)

    def _pack(self, tensor: Tensor) -> Reader | Released:
        if (type(tensor) is not Tensor and type(tensor) is not Parameter) or _is_wrapped(tensor):
            return self._raw(tensor, "subclass")
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return self._raw(tensor, "layout")
        if self._find is not None:
            fetch = self._find(tensor)
            if fetch is not None:
                self.counts.raw["parameter"] += 1
                return Released(fetch)
        if tensor.untyped_storage()._cdata in self._exact:
            return self._raw(tensor, "parameter")
        if tensor.dtype not in DTYPES or tensor.is_neg():
            return self._raw(tensor, "dtype")
        if tensor.numel() * tensor.element_size() < self._min_bytes:
            return self._raw(tensor, "small")
        if _is_copy_of_parameter(tensor.grad_fn):
            return self._raw(tensor, "parameter")
        operation = Operation(self._watch, caller())
        quantiser = self._fine if operation.is_attention() else self.quantiser
        return self._pack_activation(tensor, self._reason(tensor, operation), quantiser)

    def _reason(self, tensor: Tensor, operation: Operation) -> str | None:
        """Return why an activation must stay as it is, if it must."""
        if self.excluded:
            return "excluded"
        if operation.is_compiled:
            self.has_seen_compiled = True
            return "compiled"
        if operation.needs_exactly(tensor):
            return "exact"
        if operation.is_statistic(tensor):
            return "statistic"
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return "graph"
        return None

    def _pack_activation(self, tensor: Tensor, reason: str | None, quantiser: Quantiser) -> Reader:
        described = describe(tensor)
        if described is None:
            return self._raw(tensor, reason or "layout")
        region, form = described
        key = self._shared.key(tensor, region)
        held = self._shared.find(key)
        if reason is not None or (held is not None and held.codes is None):
            if held is None or held.codes is not None:
                held = Held(None)
                self._shared.put(key, tensor, held)
            return self._raw(tensor, reason or "exact", held)
        if held is not None and held.codes is not None and held.codes.is_enough_for(quantiser):
            self.counts.shared += 1
            return Reader(tensor, held, form)
        flat = elements(tensor, region)
        codes = quantiser.encode(flat, self._generator(tensor.device))
        if codes.nbytes >= flat.nbytes:  # many groups could not be quantised
            return self._raw(tensor, "values")
        held = Held(codes)
        self._shared.put(key, tensor, held)
        self._live.add(held)
        self.counts.packed += 1
        self.counts.saved_bytes += flat.nbytes
        self.counts.held_bytes += codes.nbytes
        return Reader(tensor, held, form)

    def _raw(self, tensor: Tensor, reason: str, held: Held | None = None) -> Reader:
        counts = self.counts
        counts.raw[reason] += 1
        if reason not in ("parameter", "subclass") and tensor.layout is torch.strided:
            begin = int(tensor.storage_offset())
            place = (tensor.untyped_storage()._cdata, begin, tensor.numel())
            if place not in self._seen:
                self._seen.add(place)
                nbytes = tensor.numel() * tensor.element_size()
                counts.raw_bytes[reason] += nbytes
                counts.saved_bytes += nbytes
                counts.held_bytes += nbytes
        return Reader(tensor, held)

    def _generator(self, device: torch.device) -> torch.Generator:
        """Return the device's own source of random numbers: torch's global one is the model's."""
        generator = self._generators.get(device)
        if generator is None:
            generator = torch.Generator(device).manual_seed(self._seed)
            self._generators[device] = generator
        return generator


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by vmap, without memory of its own


def _unpack(held: Reader | Released) -> Tensor:
    return held.read()


def _is_copy_of_parameter(node: Any) -> bool:
    """Whether `node`, of a tensor's history, leads back to a parameter and to nothing else."""
    for _ in range(_COPY_STEPS):
        if node is None:
            return False
        sources = [source for source, _ in node.next_functions if source is not None]
        if len(sources) != 1:
            return False
        node = sources[0]
        if hasattr(node, "variable"):  # the end of the graph
            return isinstance(node.variable, Parameter)
    return False
