"""Glue between the lifecycle of a run and codebooks that are fitted while it goes on."""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from lowtide.core.errors import DataError, UncorrectedFaultError
from lowtide.core.lifecycle import Event, Moment, Plugin, Session
from lowtide.kmeans import codebook
from lowtide.kmeans.adapters.replicas import Replicas, is_expert, replicas_of, shape_of
from lowtide.kmeans.codebook import Codebook
from lowtide.kmeans.config import KMeansConfig
from lowtide.kmeans.fitting import Fitter
from lowtide.kmeans.outputs import Outputs
from lowtide.kmeans.vectors import of_parameter

logger = logging.getLogger("lowtide")


class KMeansPlugin(Plugin):
    """Codebooks of a run. ``engine.lowtide.kmeans`` for scripts."""

    name = "kmeans"
    Config = KMeansConfig
    config: KMeansConfig

    def __init__(self, config: KMeansConfig) -> None:
        super().__init__(config)
        self._session: Session | None = None
        self._model: torch.nn.Module | None = None
        self._replicas = Replicas()
        self._outputs: Outputs | None = None
        self._fitter = Fitter(config)
        self._fits = 0
        self._fit_s = 0.0
        self._begin_s = time.perf_counter()
        self._has_told: set[str] = set()

    @property
    def codebooks(self) -> dict[str, Codebook]:
        """The newest codebook of each parameter or module, by name; a copy of the dictionary."""
        return dict(self._fitter.books)

    def attach(self, session: Session) -> None:
        """Subscribe to what tells the model, and to the end of each step."""
        self._session = session
        on = session.hooks.on
        on(Event.OPTIMIZER_BUILT, self._built, plugin=self.name)
        on(Event.AFTER_STEP, self._stepped, plugin=self.name)
        if self.config.use == "activations":
            on(Event.BEFORE_FORWARD, self._before_forward, plugin=self.name)

    def detach(self) -> None:
        """Take the hooks of modules away."""
        if self._outputs is not None:
            self._outputs.close()

    def summary(self) -> dict[str, Any]:
        """Return what was fitted so far, as plain JSON.

        Returns:
            ``fits``, ``fit_s`` and its ``share`` of the time since the start, the ``faults`` that
            were found (see `FaultReport`), and by name ``relative_error``, ``step`` and
            ``iterations`` of each codebook with its ``bits_per_value``.
        """
        elapsed_s = max(time.perf_counter() - self._begin_s, 1e-9)
        return {
            "use": self.config.use,
            "fits": self._fits,
            "fit_s": self._fit_s,
            "share": self._fit_s / elapsed_s,
            "faults": self._fitter.faults.as_dict(),
            "codebooks": {
                name: {
                    "relative_error": book.relative_error,
                    "bits_per_value": book.bits_per_value,
                    "step": book.step,
                    "iterations": book.iterations,
                }
                for name, book in self._fitter.books.items()
            },
        }

    # -- events -----------------------------------------------------------------------------

    def _built(self, moment: Moment) -> None:
        if moment.model is None:
            return
        self._model = moment.model
        self._replicas = replicas_of(moment.session.host, moment.data.get("engine"))
        if self.config.use == "activations":
            names = self._chosen(name for name, _ in moment.model.named_modules() if name)
            self._outputs = Outputs(
                moment.model, names, self.config.sub_dim, self.config.max_vectors, self._replicas
            )
        self._load()

    def _before_forward(self, moment: Moment) -> None:
        if self._outputs is None or moment.model is None:
            return
        is_due = (moment.step + 1) % self.config.every_n_steps == 0
        if is_due and moment.model.training:
            self._outputs.open()
        else:
            self._outputs.close()

    def _stepped(self, moment: Moment) -> None:
        if self._model is None or moment.step % self.config.every_n_steps:
            return
        begin_s = time.perf_counter()
        for name, vectors, replicas in self._vectors():
            self._fit(name, vectors, replicas, moment.step)
        end_s = time.perf_counter()
        self._fits += 1
        self._fit_s += end_s - begin_s
        moment.session.telemetry.add_span("kmeans", "host", begin_s, end_s)
        if self._replicas.rank == 0:
            self._save(moment.session.rank)

    # -- steps of a fit ---------------------------------------------------------------------

    def _vectors(self) -> Iterator[tuple[str, torch.Tensor, Replicas]]:
        if self._outputs is not None:
            for name, values in self._outputs.take():
                yield name, values, self._replicas
        elif self._model is not None:
            parameters = dict(self._model.named_parameters())
            for name in self._chosen(parameters):
                parameter = parameters[name]
                if len(shape_of(parameter)) < 2 or is_expert(parameter):
                    continue
                config = self.config
                found = of_parameter(parameter, config.sub_dim, config.max_vectors, self._replicas)
                if found is not None:
                    yield name, *found

    def _fit(self, name: str, vectors: torch.Tensor, replicas: Replicas, step: int) -> None:
        try:
            book = self._fitter.fit(name, vectors, replicas, step)
        except (DataError, UncorrectedFaultError) as error:  # alike on all ranks
            # Training is not to end for a codebook; the one before stays.
            logger.warning("kmeans: %s at step %d: %s", name, step, error)
            return
        if book is None:
            self._tell_once(f"kmeans: {name} has too few vectors for a codebook, it is left out")
        elif self._session is not None:
            telemetry = self._session.telemetry
            telemetry.scalar(f"kmeans/{name}/relative_error", book.relative_error, step)

    def _chosen(self, names: Iterable[str]) -> list[str]:
        """Return the names that the settings have, in the model's order."""
        known = list(names)
        for pattern in (*self.config.include, *self.config.exclude):
            if not fnmatch.filter(known, pattern):
                kind = "module" if self.config.use == "activations" else "parameter"
                self._tell_once(f'kmeans: "{pattern}" names no {kind} of the model')
        return [
            name
            for name in known
            if any(fnmatch.fnmatchcase(name, each) for each in self.config.include)
            and not any(fnmatch.fnmatchcase(name, each) for each in self.config.exclude)
        ]

    def _file(self, rank: int) -> Path | None:
        if self.config.path is None:
            return None
        return Path(self.config.path) / f"codebooks-rank{rank:05d}.safetensors"

    def _save(self, rank: int) -> None:
        path = self._file(rank)
        if path is None or not self._fitter.books:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            codebook.save(path, self._fitter.books, self.config.model_dump(mode="json"))
        except OSError as error:  # a full disk must not end the training
            logger.warning("kmeans: codebooks cannot be written: %s", error)

    def _load(self) -> None:
        """Take up the codebooks of an earlier run, on all replicas alike."""
        rank = 0 if self._session is None else self._session.rank
        path = self._file(rank)
        books: dict[str, Codebook] = {}
        if path is not None and self._replicas.rank == 0 and path.is_file():
            try:
                books = codebook.load(path)
            except (DataError, OSError) as error:
                logger.warning("kmeans: starting without the codebooks of before: %s", error)
        self._fitter.start_from(books, self._replicas)

    def _tell_once(self, text: str) -> None:
        if text not in self._has_told:
            self._has_told.add(text)
            if self._session is not None and self._session.rank == 0:
                logger.warning(text)
