"""Glue between the lifecycle of a run and evaluations of its model."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from lowtide.core.errors import ConfigError, DataError, LowtideError, listed, near
from lowtide.core.lifecycle import Event, Moment, Plugin, Session
from lowtide.evaluation.config import EvaluationConfig
from lowtide.evaluation.models.torch_model import Decode, Encode, Logits, logits_of
from lowtide.evaluation.suite.loading import Suite, load_suite
from lowtide.evaluation.suite.task import Metric, metrics_of, task_kinds
from lowtide.evaluation.training.evaluating import Evaluating, Failures, ForwardFailedError
from lowtide.evaluation.training.ranks import Ranks
from lowtide.evaluation.training.schedule import Schedule

logger = logging.getLogger("lowtide")

_LATE = 500  # what other plugins do at the end of a step is part of the step
_HOSTS = ("deepspeed", "torch")


class EvaluationPlugin(Plugin):
    """Evaluates the model that trains. ``engine.lowtide.evaluation`` for scripts."""

    name = "evaluation"
    Config = EvaluationConfig
    config: EvaluationConfig

    def __init__(self, config: EvaluationConfig) -> None:
        super().__init__(config)
        self._session: Session | None = None
        self._suite: Suite | None = None
        self._evaluating: Evaluating | None = None
        self._caller: Any = None
        self._logits: Logits | None = None
        self._texts: dict[str, Any] = {}
        self._schedule = Schedule(config.every_n_steps, config.budget_fraction)
        self._was_applied = True
        self._last: dict[str, float] = {}
        self._best: dict[str, Any] | None = None
        self._counts = {"evaluations": 0, "left_out": 0, "failures": 0}
        self._has_told: set[str] = set()

    def attach(self, session: Session) -> None:
        """Read the suite and subscribe.

        Raises:
            ConfigError: the suite cannot be used, or the host is not one that this works in.
        """
        if session.host not in _HOSTS:
            raise ConfigError(
                f'lowtide.evaluation: host "{session.host}" calls models in a way of its own; '
                f"evaluation works in {' and '.join(_HOSTS)}"
            )
        self._session = session
        try:
            self._suite = load_suite(self.config.suite)
            for task in self._suite.tasks:
                task.questions()
        except LowtideError as error:
            raise ConfigError(f"lowtide.evaluation.suite: {error}") from error
        self._check_best()
        on = session.hooks.on
        on(Event.OPTIMIZER_BUILT, self._built, plugin=self.name)
        on(Event.AFTER_UPDATE, self._updated, plugin=self.name)
        on(Event.AFTER_STEP, self._stepped, plugin=self.name, order=_LATE)

    def detach(self) -> None:
        """Let go of the model."""
        self._caller = self._logits = self._evaluating = None
        self._texts = {}

    def use(
        self,
        *,
        encode: Encode | None = None,
        decode: Decode | None = None,
        logits: Logits | None = None,
        bos: int | None = None,
        eos: int | None = None,
    ) -> None:
        """Tell how the model is called and texts become tokens; every rank calls it alike.

        Without it a model is called with tokens alone, int64 of shape (B, T), and returns logits
        of shape (B, T, V) or an object that has them as ``logits``; and only "loss" tasks over
        bytes or tokens can be evaluated.

        Args:
            encode: From text to tokens, without special ones.
            decode: From tokens to text.
            logits: From tokens to logits. It has to call the engine, not the module inside it.
            bos: Token before a text without context.
            eos: Token that ends an answer.
        """
        self._texts = {"encode": encode, "decode": decode, "bos": bos, "eos": eos}
        self._logits = logits
        self._evaluating = None  # the ranks compare again what they have

    def evaluate(self) -> dict[str, float]:
        """Evaluate now, whatever the schedule says; every rank calls it at the same point.

        Returns:
            Figures by "task/metric", the same on all ranks.

        Raises:
            ConfigError: there is no model yet.
            DataError: a task cannot be evaluated, and "on_error" is "raise".
            ForwardFailedError: the model raised.
        """
        session = self._session
        if session is None or self._caller is None:
            raise ConfigError("lowtide.evaluation: there is no model to evaluate yet")
        begin_s = time.perf_counter()
        try:
            figures, failures = self._run()
        finally:
            duration_s = time.perf_counter() - begin_s
            self._schedule.took(duration_s)
            session.telemetry.add_span("evaluate", "host", begin_s, begin_s + duration_s)
        self._counts["evaluations"] += 1
        self._note(session, figures, failures)
        return figures

    def summary(self) -> dict[str, Any]:
        """Return what evaluations found, and what they took.

        Returns:
            ``evaluations``, ``left_out`` (no time), ``failures``, ``spent_s``, ``last`` (figures by
            "task/metric") and ``best`` (metric, value, step).
        """
        last = {name: value if math.isfinite(value) else None for name, value in self._last.items()}
        return {**self._counts, "spent_s": self._schedule.spent_s, "last": last, "best": self._best}

    # -- events -----------------------------------------------------------------------------

    def _built(self, moment: Moment) -> None:
        engine = moment.data.get("engine")
        if engine is not None and hasattr(engine, "eval_batch"):
            raise ConfigError(
                "lowtide.evaluation: a pipeline's stages each hold a part of the model, which "
                "cannot be called by itself; leave the key out under pipeline parallelism"
            )
        # The engine, where there is one: its forward pass tells other plugins and casts.
        self._caller = engine if engine is not None else moment.model

    def _updated(self, moment: Moment) -> None:
        self._was_applied = bool(moment.data.get("applied", True))

    def _stepped(self, moment: Moment) -> None:
        if not self._was_applied or not self._schedule.is_due(moment.step):
            return
        has_time = self._schedule.has_time()
        if self.config.budget_fraction is not None:
            has_time = bool(self._ranks().from_first(int(has_time)))
        if has_time:
            self.evaluate()
        else:
            self._counts["left_out"] += 1

    # -- one evaluation ---------------------------------------------------------------------

    def _run(self) -> tuple[dict[str, float], Failures]:
        if self._evaluating is None:
            self._evaluating = self._new_evaluating()
            self._evaluating.check_alike()
        caller = self._caller
        logits = self._logits or (lambda tokens: logits_of(caller(tokens)))
        try:
            return self._evaluating.run(caller, logits)
        except ForwardFailedError as error:
            if self._evaluating.ranks.size > 1:
                raise
            return {}, {"all": str(error)}

    def _new_evaluating(self) -> Evaluating:
        if self._suite is None:
            raise ConfigError("lowtide.evaluation: there is no suite yet")
        config = self.config
        found = Evaluating(
            self._suite, self._ranks(), max_items=config.max_items, batch_size=config.batch_size,
            max_length=config.max_length, seed=config.seed,
        )  # fmt: skip
        found.encode, found.decode = self._texts.get("encode"), self._texts.get("decode")
        found.bos, found.eos = self._texts.get("bos"), self._texts.get("eos")
        return found

    def _ranks(self) -> Ranks:
        if self._evaluating is not None:
            return self._evaluating.ranks
        configs = self._session.config.plugins.values() if self._session is not None else ()
        return Ranks(per_model=math.prod(each.ranks_per_batch() for each in configs))

    def _note(self, session: Session, figures: dict[str, float], failures: Failures) -> None:
        self._last = figures
        if session.rank == 0:
            for name, value in figures.items():
                session.telemetry.scalar(f"{self.name}/{name}", value, session.step)
        self._remember_best(session, figures)
        failures = failures | self._best_that_is_none(figures)
        if not failures:
            return
        self._counts["failures"] += 1
        text = "; ".join(f'task "{task}": {why}' for task, why in failures.items())
        if self.config.on_error == "raise":
            raise DataError(f"lowtide.evaluation: {text}")
        if session.rank == 0 and text not in self._has_told:
            self._has_told.add(text)
            logger.warning("evaluation: %s; training goes on", text)

    def _remember_best(self, session: Session, figures: dict[str, float]) -> None:
        name = self.config.best_metric
        if name is None or not math.isfinite(figures.get(name, math.nan)):
            return
        value, metric = figures[name], self._metric(name)
        sign = 1 if metric.is_higher_better else -1
        if self._best is None or sign * value > sign * self._best["value"]:
            self._best = {"metric": name, "value": value, "step": session.step}
            if session.rank == 0:
                logger.info("evaluation: %s is %.6g, the best so far", name, value)

    def _best_that_is_none(self, figures: dict[str, float]) -> Failures:
        name = self.config.best_metric
        task = "" if name is None else name.partition("/")[0]
        known = [each for each in figures if each.startswith(f"{task}/")]
        if name is None or not known or name in known:
            return {}
        return {task: f'best_metric: no "{name}".{near(name, known)} Known: {listed(known)}'}

    def _metric(self, name: str) -> Metric:
        task_name, _, metric = name.partition("/")
        tasks = self._suite.tasks if self._suite is not None else ()
        kind = next(task_kinds.get(t.settings.kind) for t in tasks if t.name == task_name)
        return kind.METRICS.get(metric) or metrics_of(kind, [metric])[metric]

    def _check_best(self) -> None:
        """Refuse a task that the suite lacks; which metrics there are, items alone tell."""
        if self.config.best_metric is None or self._suite is None:
            return
        try:
            self._suite.only([self.config.best_metric.partition("/")[0]])
        except ConfigError as error:
            raise ConfigError(f"lowtide.evaluation.best_metric: {error}") from error
