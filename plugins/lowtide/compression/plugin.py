"""Glue between the lifecycle of a run and compressed activations."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowtide.compression.activations.excluding import Excluding, Hook
from lowtide.compression.activations.saving import Saving
from lowtide.compression.config import ActivationsConfig, CompressionConfig
from lowtide.core.lifecycle import Event, Moment, Plugin, Session

logger = logging.getLogger("lowtide")

_LAST = 1000  # another listener that fails must not leave autograd's hooks behind


class CompressionPlugin(Plugin):
    """Activations in fewer bits. ``engine.lowtide.compression`` for scripts."""

    name = "compression"
    Config = CompressionConfig
    config: CompressionConfig

    def __init__(self, config: CompressionConfig) -> None:
        super().__init__(config)
        self._session: Session | None = None
        self._settings: ActivationsConfig | None = None
        self._saving: Saving | None = None
        self._watched: weakref.WeakKeyDictionary[torch.nn.Module, _Watched]
        self._watched = weakref.WeakKeyDictionary()
        self._open: list[bool] = []  # forwards that run, and whether each saves: models may nest
        self._forwards = 0  # since the last update
        self._last: dict[str, Any] = {}
        self._has_told: set[str] = set()

    def attach(self, session: Session) -> None:
        """Subscribe, where activations are to be compressed."""
        settings = self.config.activations
        if settings is None or not settings.enabled:
            return
        self._session, self._settings = session, settings
        self._saving = Saving(settings.quantiser(), settings.min_bytes)
        if settings.bound is None and settings.bits == "auto":
            session.config.decide("compression.activations.bits", settings.resolved_bits())
        on = session.hooks.on
        on(Event.BEFORE_FORWARD, self._begin, plugin=self.name, order=_LAST)
        on(Event.AFTER_FORWARD, self._end, plugin=self.name, order=-_LAST)
        on(Event.AFTER_UPDATE, self._updated, plugin=self.name)

    def detach(self) -> None:
        """Take autograd's hooks and those of modules away."""
        self._leave()
        for each in self._watched.values():
            each.close()
        self._watched.clear()

    def summary(self) -> dict[str, Any]:
        """Return what the last training forward held.

        Returns:
            ``packed``, ``shared``, ``saved_bytes``, ``held_bytes``, ``ratio``, ``raw`` and
            ``raw_bytes`` by reason, as `Counts` has them; ``bits``; and ``live_bytes``, of all
            codes that some backward pass has still to read.
        """
        if self._saving is None:
            return {}
        bits, live = self._saving.quantiser.bits, self._saving.live_bytes()
        return {"activations": {"bits": bits, "live_bytes": live, **self._last}}

    # -- events -----------------------------------------------------------------------------

    def _begin(self, moment: Moment) -> None:
        saving, settings = self._saving, self._settings
        is_saving = moment.data.get("training", True) and torch.is_grad_enabled()
        if saving is None or settings is None or not is_saving:
            self._open.append(False)
            return
        if saving.is_active:
            self._open.append(True)
            return
        model = moment.model
        watched = self._watched.get(model)
        if watched is None:
            watched = _Watched(model, settings.exclude, saving, self._failed)
            self._watched[model] = watched
            self._tell_unused(watched.excluding.unused)
        parameters = list(model.parameters())
        divided = {id(each) for each in parameters if hasattr(each, "ds_status")}
        find = _finder(parameters) if divided else None
        # Not model.buffers(): Megatron's data parallelism has a list of that name.
        buffers = torch.nn.Module.buffers(model)
        whole = [each for each in parameters if id(each) not in divided]
        saving.begin((*whole, *buffers), self._seed(settings, moment), find)
        self._forwards += 1
        self._open.append(True)

    def _end(self, _moment: Moment) -> None:
        if self._open and self._open.pop() and not any(self._open):
            self._leave()

    def _failed(self) -> None:
        """End a forward that raised: AFTER_FORWARD does not come then."""
        self._leave()

    def _updated(self, moment: Moment) -> None:
        self._forwards = 0
        if self._last and self._last["held_bytes"]:
            gauge = moment.session.telemetry.gauge
            gauge("lowtide.compression.activations_saved_bytes", self._last["saved_bytes"])
            gauge("lowtide.compression.activations_held_bytes", self._last["held_bytes"])

    def _leave(self) -> None:
        saving = self._saving
        self._open.clear()
        if saving is None or not saving.is_active:
            return
        saving.end()
        self._last = saving.counts.as_dict()
        session = self._session
        if session is None or session.rank != 0:
            return
        if saving.has_seen_compiled:
            self._tell(
                logging.WARNING,
                "compression: what compiled code (torch.compile) saves is held as it is",
            )
        if self._last["packed"]:
            before, after = self._last["saved_bytes"] / 1e6, self._last["held_bytes"] / 1e6
            self._tell(
                logging.INFO,
                f"compression: activations of a forward pass: {before:.1f} MB in {after:.1f} MB, "
                f"{self._last['packed']} tensors of {saving.quantiser.bits} bits",
            )

    def _tell(self, level: int, text: str) -> None:
        """Log `text`, the first time that it begins like this."""
        start = text[:40]
        if start not in self._has_told:
            self._has_told.add(start)
            logger.log(level, "%s", text)

    def _tell_unused(self, patterns: list[str]) -> None:
        if patterns and self._session is not None and self._session.rank == 0:
            # Not an error: under pipeline parallelism, another rank may have that module.
            logger.warning(
                "lowtide.compression.activations.exclude: no module here is named %s",
                ", ".join(f'"{pattern}"' for pattern in patterns),
            )

    def _seed(self, settings: ActivationsConfig, moment: Moment) -> int:
        """Return the seed of one forward: a run that resumes draws what it would have drawn."""
        rank = moment.session.rank
        seed = settings.seed
        for part in (rank, moment.step, self._forwards):
            seed = (seed * 1_000_003 + part + 1) % (2**61 - 1)
        return seed


class _Watched:
    """The hooks on one model: on its modules by name, and on itself for forwards that raise."""

    def __init__(
        self,
        model: torch.nn.Module,
        exclude: tuple[str, ...],
        saving: Saving,
        failed: Callable[[], None],
    ) -> None:
        self.excluding = Excluding(model, exclude, saving)
        self._failed = failed
        self._handle = model.register_forward_hook(Hook(self._after), always_call=True)

    def close(self) -> None:
        self.excluding.close()
        self._handle.remove()

    def _after(self, _module: Any, _inputs: Any, _outputs: Any) -> None:
        # Torch calls this while it handles the exception, or after a forward that went well.
        if not torch.compiler.is_compiling() and sys.exc_info()[0] is not None:
            self._failed()


def _finder(parameters: list[Any]) -> Callable[[Tensor], Callable[[], Tensor] | None]:
    from lowtide.compression.adapters import zero3

    divided = zero3.partitioned(parameters)
    return lambda tensor: zero3.find(tensor, divided)
