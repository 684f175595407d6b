"""Settings of the ``offload`` key."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lowtide.core.config import Auto, PluginConfig
from lowtide.core.errors import ConfigError

MAX_PATHS = 8
MAX_BUFFERS = 64
RANDOM = re.compile(r"random:(\d+)")


class EmulatedConfig(BaseModel):
    """Rates of the emulated device; null does not slow down."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    host_to_device_bytes_per_s: float | None = Field(default=None, gt=0)
    """Copies to the device."""

    device_to_host_bytes_per_s: float | None = Field(default=None, gt=0)
    """Copies from the device."""

    device_params_per_s: float | None = Field(default=None, gt=0)
    """Updates on the device."""

    host_params_per_s: float | None = Field(default=None, gt=0)
    """Updates on the host, so that a slow machine can show the proportions of a fast one."""


class StoragePath(BaseModel):
    """One folder that holds optimizer state."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    path: str
    """An existing folder, ~ for the home folder; scratch files there have no name and go with the
    process."""

    read_bytes_per_s: float | Auto = "auto"
    """One rank's reads, while it writes too. Auto: measured at the start."""

    write_bytes_per_s: float | Auto = "auto"
    """One rank's writes, while it reads too. Auto: measured at the start."""

    @model_validator(mode="after")
    def _check(self) -> StoragePath:
        for name in ("read_bytes_per_s", "write_bytes_per_s"):
            value = getattr(self, name)
            if value != "auto" and not 0 < value < math.inf:
                raise ValueError(f'"{name}" must be above 0, or "auto"')
        return self

    @property
    def given(self) -> tuple[float | None, float | None]:
        """Rates that need not be measured."""
        read, write = self.read_bytes_per_s, self.write_bytes_per_s
        return (
            None if isinstance(read, str) else read,
            None if isinstance(write, str) else write,
        )


class StorageConfig(BaseModel):
    """Optimizer state that does not fit in host memory: in files, on several paths at once."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    paths: list[StoragePath | str] = Field(min_length=1, max_length=MAX_PATHS)
    """Folders, each as text or with its rates. State is divided in proportion to their speed."""

    host_memory_bytes: float = Field(gt=0)
    """Each rank's host memory for masters, moments and staging buffers. What does not fit lives
    in the paths."""

    buffers: int | Auto = "auto"
    """Staging buffers of one piece each. Auto: two per path, one being read and one being written,
    one that is updated, and, by the rates measured at the start, up to eight more where that makes
    updates faster, as where one path is much slower than another."""

    stall_s: float = Field(default=60.0, gt=0)
    """A path that gets no further for so long, at the start or in an update, ends the run with an
    error that names it, instead of hanging."""

    direct_io: bool = True
    """Leave the page cache out where the file system can do that."""

    adapt: bool = True
    """Let state move to another path where that turns out faster than the one it is on. False:
    paths keep what the rates at the start give them, as long as they take writes."""

    @model_validator(mode="after")
    def _check(self) -> StorageConfig:
        if not all(each.path for each in self.folders):
            raise ValueError('"paths" names no folder; write "." for the current one')
        if self.buffers != "auto" and not 1 <= self.buffers <= MAX_BUFFERS:
            raise ValueError(f'"buffers" must be 1 to {MAX_BUFFERS}, or "auto"')
        return self

    @property
    def folders(self) -> list[StoragePath]:
        """The paths, all written out."""
        return [StoragePath(path=e) if isinstance(e, str) else e for e in self.paths]


class OffloadConfig(PluginConfig):
    """Optimizer state updated where it is fastest: host, device, or both (docs/offload.md)."""

    device: Literal["auto", "cuda", "cpu", "emulated"] = "auto"
    """What updates beside the host. Auto: the GPU where there is one. Cpu: nothing, the host does
    all. Emulated: a second memory behind slow copies, for trying schedules without a GPU."""

    fraction: float | Auto = Field(default="auto")
    """Share of the optimizer state, beside what stays on the device, that is brought there for its
    update. Auto: what the measured rates say."""

    plan: str = "auto"
    """Auto: the best plan for the measured rates. ``"random:<seed>"``: another valid plan in every
    step, to show that plans change times and no bit."""

    device_memory_bytes: int | Auto = "auto"
    """Device memory for staging and residents. Auto: what training leaves free."""

    residents: bool = True
    """Keep optimizer state on the device from step to step where memory allows."""

    max_slots: int = Field(default=2, ge=1, le=16)
    """Most subgroups that are on their way to, on, or on their way from the device at once."""

    subgroup_params: int = Field(default=100_000_000, ge=1024)
    """Larger subgroups, and the undivided partitions of ZeRO 1 and 2, are cut into pieces of about
    this many parameters."""

    replan_every_n_steps: int = Field(default=10, ge=1)
    """How often the ranks compare their measured rates and plan again where they have changed."""

    storage: StorageConfig | None = None
    """Optimizer state in files, beside host memory. Null: all of it is in host memory."""

    emulated: EmulatedConfig = EmulatedConfig()
    """Rates of the emulated device."""

    @field_validator("plan")
    @classmethod
    def _check_plan(cls, value: str) -> str:
        if value != "auto" and not RANDOM.fullmatch(value):
            raise ValueError(
                f'got {value!r}, allowed are "auto" and "random:<seed>" with a whole number'
            )
        return value

    @field_validator("fraction")
    @classmethod
    def _check_fraction(cls, value: float | Auto) -> float | Auto:
        if isinstance(value, float) and not 0.0 <= value <= 1.0:
            raise ValueError(f'got {value!r}, allowed are "auto" and numbers from 0 to 1')
        return value

    @model_validator(mode="after")
    def _check(self) -> OffloadConfig:
        if isinstance(self.device_memory_bytes, int) and self.device_memory_bytes < 0:
            raise ValueError('"device_memory_bytes" must be 0 or more, or "auto"')
        if self.device != "emulated" and self.emulated != EmulatedConfig():
            raise ValueError('"emulated" holds rates but "device" is not "emulated"; set it too')
        return self

    @property
    def random_seed(self) -> int | None:
        """The seed of ``"plan": "random:<seed>"``."""
        found = RANDOM.fullmatch(self.plan)
        return int(found[1]) if found else None

    def check_host(self, host_config: Mapping[str, Any]) -> None:
        """Refuse what DeepSpeed cannot, or should not, do together with this plugin."""
        if not host_config:
            return
        zero = _mapping(host_config.get("zero_optimization"))
        offload = _mapping(zero.get("offload_optimizer"))
        stage, place = zero.get("stage", 0), offload.get("device", "none")
        if stage in (1, 2, 3) and place == "nvme":
            raise ConfigError(
                'lowtide.offload: offload_optimizer.device is "nvme", which has a schedule of its '
                'own; set it to "cpu" and name the folders in the block: "offload": {"storage": '
                '{"paths": ["/nvme/scratch"], "host_memory_bytes": 64000000000}}'
            )
        if stage not in (1, 2, 3) or place != "cpu":
            raise ConfigError(
                f"lowtide.offload: schedules an optimizer that is in CPU memory, and this is stage "
                f'{stage} with offload_optimizer.device "{place}"; set "zero_optimization": '
                f'{{"stage": 3, "offload_optimizer": {{"device": "cpu"}}}}, or remove '
                f"lowtide.offload"
            )
        rivals = {
            "zero_optimization.offload_optimizer.super_offload": offload.get("super_offload"),
            "zero_optimization.zenflow": zero.get("zenflow") is not None,  # {} is on, too
            "zero_optimization.offload_optimizer.ratio": offload.get("ratio", 1.0) != 1.0,
            "zero_optimization.mics_shard_size": (zero.get("mics_shard_size") or -1) > 0,
        }
        for key, is_set in rivals.items():
            if is_set:
                raise ConfigError(
                    f"lowtide.offload: {key} is set too, and both decide where the optimizer "
                    f"runs; remove one of them"
                )
        kind = _mapping(host_config.get("optimizer")).get("type")
        if kind is not None and str(kind).lower() not in ("adam", "adamw"):
            raise ConfigError(
                f'lowtide.offload: optimizer.type is "{kind}", allowed are "Adam" and "AdamW"'
            )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
