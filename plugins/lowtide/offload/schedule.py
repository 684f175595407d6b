"""Pieces of optimizer state, and the plan that says where and when each one is updated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lowtide.core.errors import ConfigError
from lowtide.offload.rates import STATE_BYTES

GRADIENT_BYTES = (0, 2, 4)
MAX_SLOTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of this rank's optimizer state that is updated in one go: a subgroup, or a slice.

    Attributes:
        numel: Parameters in it.
        low_precision_bytes: Bytes per parameter of the 16-bit weights that the host uploads after
            its update; a device update makes them in place.
        gradient_upload_bytes: Bytes per parameter of gradient that must go to the device before a
            device update: 0 where it never left the device, else 2 or 4.
        is_movable: Whether the device may update it; if not, the host does.
        keeps_gradient: While it is resident, its gradient stays on the device too: nothing to
            upload, and as much more memory.
        path: Number of the storage path where its state lives; None: it is in memory. The host
            updates what is stored.

    Raises:
        ConfigError: A value is out of range.
    """

    numel: int
    low_precision_bytes: int = 2
    gradient_upload_bytes: int = 4
    is_movable: bool = True
    keeps_gradient: bool = False
    path: int | None = None

    def __post_init__(self) -> None:
        if self.path is not None and (self.path < 0 or self.is_movable):
            raise ConfigError(
                f"piece.path: got {self.path!r}, allowed is None, or 0 and more where the piece "
                "is not movable"
            )
        if self.numel < 1:
            raise ConfigError(f"piece.numel: got {self.numel!r}, allowed is a whole number from 1")
        if self.low_precision_bytes < 0:
            raise ConfigError(
                f"piece.low_precision_bytes: got {self.low_precision_bytes!r}, allowed is 0 or more"
            )
        if self.gradient_upload_bytes not in GRADIENT_BYTES:
            raise ConfigError(
                f"piece.gradient_upload_bytes: got {self.gradient_upload_bytes!r}, "
                "allowed is 0, 2 or 4"
            )

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradient that go to the device before a device update."""
        return self.gradient_upload_bytes * self.numel

    @property
    def state_bytes(self) -> int:
        """Bytes of fp32 master and moments."""
        return STATE_BYTES * self.numel

    @property
    def staged_bytes(self) -> int:
        """Bytes loaded into a slot when the piece is staged: state and gradient."""
        return self.state_bytes + self.gradient_bytes

    @property
    def resident_load_bytes(self) -> int:
        """Bytes loaded into a slot when the piece is resident: its gradient, where that leaves."""
        return 0 if self.keeps_gradient else self.gradient_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of device memory that the piece takes as a resident."""
        return self.state_bytes + (self.gradient_bytes if self.keeps_gradient else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Where and in which order pieces are updated. Numbers are indices into the list of pieces.

    Attributes:
        residents: Pieces whose state never leaves the device, ascending.
        device_order: Pieces that the device updates, in this order; residents are among them.
        host_order: Pieces in memory that the host updates, in this order.
        stored_order: Pieces from storage that the host updates, in this order; every other update
            goes through them the other way round.
        buffers: Staging buffers, one stored piece each; 0 where nothing is stored.
        carried: How many of the last of these stay in their buffers until the next update.
        slots: Staging slots; each holds the largest load of a device piece (`slot_bytes`).
            0 where nothing is loaded.
        slot_bytes: Size of one slot.
        resident_bytes: Device memory of the residents: state, and gradients that stay there.
        fraction: Share of the parameters that are not resident which the device updates.
        makespan_s: Predicted time of the whole update, or None where nothing was predicted.
        busy_s: Predicted seconds in which each lane is at work.
        lower_bound_s: No plan within the same memory can be faster at these rates.
    """

    residents: tuple[int, ...]
    device_order: tuple[int, ...]
    host_order: tuple[int, ...]
    slots: int
    stored_order: tuple[int, ...] = ()
    buffers: int = 0
    carried: int = 0
    slot_bytes: int = 0
    resident_bytes: int = 0
    fraction: float = 0.0
    makespan_s: float | None = None
    busy_s: Mapping[str, float] = field(default_factory=dict, hash=False)
    lower_bound_s: float | None = None

    @property
    def staged(self) -> tuple[int, ...]:
        """Pieces that travel to the device and back, in the order of their updates."""
        residents = set(self.residents)
        return tuple(i for i in self.device_order if i not in residents)

    @property
    def is_host_only(self) -> bool:
        """Whether the device updates nothing."""
        return not self.device_order

    @property
    def staging_bytes(self) -> int:
        """Device memory of all slots."""
        return self.slots * self.slot_bytes

    @property
    def device_bytes(self) -> int:
        """Device memory that the plan needs: slots and residents."""
        return self.staging_bytes + self.resident_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Return the plan that `as_dict` has described.

        Raises:
            ConfigError: Keys are missing or unknown.
        """
        orders = ("residents", "device_order", "host_order", "stored_order")
        try:
            changed = {name: tuple(int(i) for i in values[name]) for name in orders}
            return cls(**{**values, **changed})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"plan: {error}; allowed is what Plan.as_dict() returns") from error

    def to_json(self) -> str:
        """Return the plan as one line of JSON."""
        return json.dumps(self.as_dict())

    def __str__(self) -> str:
        stored = f"{len(self.stored_order)} from storage"
        parts = [
            f"{len(self.host_order)} pieces on the host",
            *([stored] if self.stored_order else []),
            f"{len(self.staged)} staged in {self.slots} slot(s)",
            f"{len(self.residents)} resident",
            f"fraction {self.fraction:.3f}",
            f"{self.device_bytes / 2**30:.2f} GiB of device memory",
        ]
        if self.makespan_s is not None:
            parts.append(f"predicted {self.makespan_s * 1e3:.2f} ms")
        if self.lower_bound_s is not None:
            parts.append(f"bound {self.lower_bound_s * 1e3:.2f} ms")
        return "; ".join(parts)


def slot_bytes(pieces: Sequence[Piece], device: Iterable[int], residents: Iterable[int]) -> int:
    """Return the size of one slot: the largest load. A resident loads its gradient at most."""
    held, largest = set(residents), 0
    for i in device:
        piece = pieces[i]
        largest = max(largest, piece.resident_load_bytes if i in held else piece.staged_bytes)
    return largest


def build_plan(
    pieces: Sequence[Piece],
    *,
    residents: Iterable[int],
    device_order: Iterable[int],
    host_order: Iterable[int],
    slots: int,
    stored_order: Iterable[int] | None = None,
    buffers: int = 1,
    carried: int = 0,
) -> Plan:
    """Return the plan with its sizes worked out; nothing is predicted.

    Stored pieces may stand in `host_order` too; their own order is `stored_order`, None: by number.
    """
    held, device = tuple(sorted(residents)), tuple(device_order)
    largest = slot_bytes(pieces, device, held)
    kept = set(held)
    staged = sum(pieces[i].numel for i in device if i not in kept)
    stored = [i for i, piece in enumerate(pieces) if piece.path is not None]
    apart = set(stored)
    host = tuple(i for i in host_order if i not in apart) if apart else tuple(host_order)
    movable = staged + sum(pieces[i].numel for i in (*host, *stored))
    return Plan(
        residents=held,
        device_order=device,
        host_order=host,
        slots=slots if largest else 0,
        stored_order=tuple(stored if stored_order is None else stored_order),
        buffers=buffers if stored else 0,
        carried=min(carried, buffers, len(stored)),
        slot_bytes=largest,
        resident_bytes=sum(pieces[i].resident_bytes for i in held),
        fraction=staged / movable if movable else 0.0,
    )


def check_plan(pieces: Sequence[Piece], plan: Plan, *, memory_bytes: float | None = None) -> None:
    """Make sure that a plan fits its pieces and the memory.

    Raises:
        ConfigError: A piece is missing or there twice, a resident is not updated on the device, a
            piece that may not move is on the device, something is loaded without a slot, or the
            device memory exceeds `memory_bytes`.
    """
    everywhere = sorted((*plan.device_order, *plan.host_order, *plan.stored_order))
    if everywhere != list(range(len(pieces))):
        raise ConfigError(
            f"plan: device_order, host_order and stored_order name the pieces {everywhere[:20]}, "
            f"allowed is each of 0 to {len(pieces) - 1} once"
        )
    misplaced = [i for i in plan.host_order if pieces[i].path is not None]
    misplaced += [i for i in plan.stored_order if pieces[i].path is None]
    if misplaced:
        raise ConfigError(
            f"plan: pieces {misplaced} are in the wrong order; stored_order has those with a path"
        )
    strangers = set(plan.residents) - set(plan.device_order)
    if strangers:
        raise ConfigError(f"plan.residents: {sorted(strangers)} are not in device_order")
    fixed = [i for i in plan.device_order if not pieces[i].is_movable]
    if fixed:
        raise ConfigError(f"plan.device_order: pieces {fixed} are not movable")
    largest = slot_bytes(pieces, plan.device_order, plan.residents)
    if largest and not 1 <= plan.slots <= MAX_SLOTS:
        raise ConfigError(f"plan.slots: got {plan.slots}, allowed is 1 to {MAX_SLOTS}")
    needed = plan.slots * largest + sum(pieces[i].resident_bytes for i in plan.residents)
    if memory_bytes is not None and needed > memory_bytes:
        raise ConfigError(
            f"plan: needs {needed} bytes of device memory, allowed are {memory_bytes:.0f}"
        )
