"""What the host adapters share: version and symbol checks, the rank, opening a session."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from lowtide.core.config import load_block, load_config
from lowtide.core.errors import ConfigError, HostError
from lowtide.core.lifecycle import Session

logger = logging.getLogger("lowtide")
_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Symbol:
    """One piece of a host's private interface that an adapter leans on.

    Attributes:
        module: Module to import.
        path: Attribute path inside it ("DeepSpeedEngine._take_model_step").
        parameters: Leading parameter names that a function must still have.
    """

    module: str
    path: str
    parameters: tuple[str, ...] = ()


def check_host(package: str, tested: Iterable[str], symbols: Iterable[Symbol]) -> str:
    """Return the installed version of `package` after checking every symbol.

    An untested version is logged once and used; a moved symbol is refused.

    Raises:
        HostError: the package is not installed, or a symbol is gone or takes other parameters.
    """
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise HostError(
            f"{package} is not installed; install {package}=={next(iter(tested))}"
        ) from None
    known = tuple(tested)
    if version not in known and package not in _warned:
        _warned.add(package)
        logger.warning(
            "lowtide is tested with %s %s, found %s; every symbol it uses is checked, "
            "behaviour behind them is not",
            package, " and ".join(known), version,
        )  # fmt: skip
    for symbol in symbols:
        _check_symbol(package, version, known, symbol)
    return version


def _check_symbol(package: str, version: str, tested: tuple[str, ...], symbol: Symbol) -> None:
    name = f"{symbol.module}.{symbol.path}"
    advice = f"install {package}=={tested[-1]} or a newer lowtide"
    try:
        found: Any = importlib.import_module(symbol.module)
        for part in symbol.path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise HostError(
            f"{package} {version} has no {name}, which lowtide needs; {advice}"
        ) from error
    if symbol.parameters:
        parameters = tuple(inspect.signature(found).parameters)[: len(symbol.parameters)]
        if parameters != symbol.parameters:
            raise HostError(
                f"{package} {version}: {name} takes {', '.join(parameters)}; lowtide knows it with "
                f"{', '.join(symbol.parameters)}; {advice}"
            )


def open_session(config: str | os.PathLike[str] | Mapping[str, Any], *, host: str) -> Session:
    """Open the session of a host whose user asks for Lowtide explicitly.

    Raises:
        ConfigError: `config` has no ``"lowtide"`` block, or it cannot be used.
    """
    host_config = load_config(config)
    block = load_block(host_config)
    if block is None:
        raise ConfigError('config: has no "lowtide" block; add one ({} is enough)')
    rank, world_size = process_rank()
    session = Session.open(
        block, host=host, rank=rank, world_size=world_size, host_config=host_config
    )
    if session.stop is not None:
        if session.stop.config.then == "exit":
            session.close(status="failed")
            raise ConfigError(
                f'lowtide.stop.then: "exit" is for DeepSpeed, whose checkpoints Lowtide can write; '
                f'under host "{host}" set it to "tell" and look at session.stop.requested'
            )
        session.stop.connect()
    return session


def process_rank() -> tuple[int, int]:
    """Return (rank, world size): from torch.distributed once it is up, else from the launcher."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    pairs = [
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ]
    if "SLURM_STEP_ID" in os.environ:  # set by srun only: sbatch's own shell is not a rank
        pairs.append(("SLURM_PROCID", "SLURM_NTASKS"))
    for rank, size in pairs:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1
