"""What the update is planned from: how fast each lane is, measured or from a data sheet.

All rates are those of one rank, each lane alone; that lanes disturb each other (one direction of
the link, the host's memory) is the simulator's business.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lowtide.core.errors import ConfigError, UnknownNameError, listed, near

STATE_BYTES = 12  # fp32 master weight and two fp32 moments
HOST_UPDATE_BYTES = 30.0  # read p, m, v, g (16), write p, m, v (12) and the 16-bit weight (2)
UNFUSED_UPDATE_BYTES = 28.0  # the same without the 16-bit weight ...
DOWNCAST_BYTES = 6.0  # ... which a second pass makes: read 4, write 2
DEVICE_UPDATE_BYTES = 30.0  # of device memory, as on the host
USABLE_SHARE = 0.8  # of a memory's data-sheet bandwidth, for a streaming kernel


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _check_rate(name: str, value: Any) -> None:
    if not _is_finite(value) or value <= 0:
        raise ConfigError(f"{name}: got {value!r}, allowed is a finite number above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class PathRates:
    """Speeds of one rank's transfers to and from one storage path, both directions at work.

    Attributes:
        read_bytes_per_s: From the path.
        write_bytes_per_s: To the path.

    Raises:
        ConfigError: A rate is not a positive finite number.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_rate(f"rates.paths.{field.name}", getattr(self, field.name))

    @property
    def turn_s(self) -> float:
        """Seconds per byte that is read and written, one while the other."""
        return 1.0 / min(self.read_bytes_per_s, self.write_bytes_per_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Speeds of one rank's lanes.

    Attributes:
        host_to_device_bytes_per_s: Pinned copies to the device.
        device_to_host_bytes_per_s: Pinned copies from the device.
        is_duplex: Whether both directions reach their full rate at once; otherwise they share
            the link's time.
        host_params_per_s: Adam on this rank's host cores.
        downcast_params_per_s: The pass that makes 16-bit weights on the host; None where the Adam
            kernel writes them itself.
        device_params_per_s: Adam on the device.
        launch_s: Fixed cost of one update on the device.
        host_memory_bytes_per_s: This rank's share of the host's memory bandwidth, which host
            update and copies divide among them; None: never the limit.
        paths: Storage paths.

    Raises:
        ConfigError: A rate is not a positive finite number, or `launch_s` is negative.
    """

    host_to_device_bytes_per_s: float
    device_to_host_bytes_per_s: float
    is_duplex: bool = True
    host_params_per_s: float
    downcast_params_per_s: float | None = None
    device_params_per_s: float
    launch_s: float = 0.0
    host_memory_bytes_per_s: float | None = None
    paths: tuple[PathRates, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("is_duplex", "paths") or (
                value is None and "None" in str(field.type)
            ):
                continue
            if field.name == "launch_s":
                if not _is_finite(value) or value < 0:
                    raise ConfigError(f"rates.launch_s: got {value!r}, allowed are seconds >= 0")
            else:
                _check_rate(f"rates.{field.name}", value)

    @property
    def host_update_bytes(self) -> float:
        """Host memory traffic of the host update, in bytes per parameter."""
        is_fused = self.downcast_params_per_s is None
        return HOST_UPDATE_BYTES if is_fused else UNFUSED_UPDATE_BYTES

    def replace(self, **changes: Any) -> Rates:
        """Return a copy with some rates changed."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the rates for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A GPU and the kind of host it usually sits in: data-sheet figures, nothing measured here.

    Attributes:
        memory_bytes: Device memory.
        device_memory_bytes_per_s: Its bandwidth on the data sheet.
        link_bytes_per_s: What pinned copies reach per direction.
        host_memory_bytes_per_s: The whole host's memory bandwidth on the data sheet.
        host_params_per_s: Adam on all cores of the host.
    """

    memory_bytes: float
    device_memory_bytes_per_s: float
    link_bytes_per_s: float
    host_memory_bytes_per_s: float
    host_params_per_s: float
    launch_s: float = 20e-6

    def rates(self, *, ranks: int = 1) -> Rates:
        """Return the modelled rates of one of `ranks` ranks that share the host evenly.

        Raises:
            ConfigError: `ranks` is below 1.
        """
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise ConfigError(f"ranks: got {ranks!r}, allowed is a whole number from 1")
        share = USABLE_SHARE * self.host_memory_bytes_per_s / ranks
        return Rates(
            host_to_device_bytes_per_s=self.link_bytes_per_s,
            device_to_host_bytes_per_s=self.link_bytes_per_s,
            host_params_per_s=min(self.host_params_per_s / ranks, share / HOST_UPDATE_BYTES),
            device_params_per_s=(
                USABLE_SHARE * self.device_memory_bytes_per_s / DEVICE_UPDATE_BYTES
            ),
            launch_s=self.launch_s,
            host_memory_bytes_per_s=share,
        )


# Links: PCIe 3, 4 and 5 x16 move about 12, 25 and 55 GB/s of pinned memory; NVLink-C2C moves more.
# Hosts: two sockets, 8 channels each of DDR4-3200 (410 GB/s) or DDR5-4800 (614 GB/s); what Adam
# reaches on all their cores is of the order of the public logs of Deep Optimizer States
# (1.0 and 2.8 billion parameters a second on a quarter of the host).
_DDR4 = {"host_memory_bytes_per_s": 409.6e9, "host_params_per_s": 4.0e9}
_DDR5 = {"host_memory_bytes_per_s": 614.4e9, "host_params_per_s": 11.2e9}


def _gpu(gb: float, hbm_bytes_per_s: float, link: float, host: dict[str, float]) -> Profile:
    return Profile(
        memory_bytes=gb * 1e9,
        device_memory_bytes_per_s=hbm_bytes_per_s,
        link_bytes_per_s=link,
        **host,
    )


PROFILES: dict[str, Profile] = {
    "V100-32GB": _gpu(32, 0.90e12, 12e9, _DDR4),
    "A100-40GB": _gpu(40, 1.555e12, 25e9, _DDR4),
    "A100-80GB": _gpu(80, 2.039e12, 25e9, _DDR4),
    "A6000-48GB": _gpu(48, 0.768e12, 25e9, _DDR4),
    "L40S-48GB": _gpu(48, 0.864e12, 25e9, _DDR4),
    "RTX4090-24GB": _gpu(24, 1.008e12, 25e9, _DDR4),
    "H100-80GB": _gpu(80, 3.35e12, 55e9, _DDR5),
    "H200-141GB": _gpu(141, 4.8e12, 55e9, _DDR5),
    "B200-192GB": _gpu(192, 8.0e12, 55e9, _DDR5),
}
"""GPUs by name, for planning ahead. Modelled: measure before you believe a figure."""


def profile(name: str) -> Profile:
    """Return a named profile; upper and lower case are the same.

    Raises:
        UnknownNameError: There is no such profile.
    """
    by_lower = {known.lower(): found for known, found in PROFILES.items()}
    if name.lower() not in by_lower:
        raise UnknownNameError(
            f"gpu: unknown profile {name!r}.{near(name, by_lower)} Known: {listed(PROFILES)}"
        )
    return by_lower[name.lower()]
