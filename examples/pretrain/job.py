"""The training job itself: build the engine, resume, train, validate, save, close."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import checkpoints
import torch
from batches import TrainingBatches, readers_of
from data import PreparedData
from errors import UsageError
from low_rank import PRETRAIN
from model import Decoder, ModelConfig, parameter_groups
from pace import Plan, StepTimer, plan_from_budget, plan_from_steps
from progress import Display
from run_folder import Progress, RunFolder
from torch import distributed
from validation import WINDOWS_AT_THE_END, WINDOWS_WHILE_TRAINING, Score, validate

import lowtide
from lowtide.core.restart import choose
from lowtide.tensor_parallel import register_pattern

DEFAULT_MINUTES = 5.0
SPEED_EVERY_STEPS = 10


class Job:
    """One start of a training run on one rank.

    Args:
        config: the DeepSpeed configuration.
        model_config: the shape of the model.
        data: the prepared tokens.
        folder: the run folder.
        seed: seed of the weights and of the order of the data.
        launched_s: unix time at which this start began.
    """

    def __init__(
        self,
        config: dict[str, Any],
        model_config: ModelConfig,
        *,
        data: PreparedData,
        folder: RunFolder,
        seed: int,
        launched_s: float,
    ) -> None:
        self.data = data
        self.folder = folder
        self._launched_s = launched_s
        self._follows_plan, config = _fill_scheduler(config)
        torch.manual_seed(seed)
        model = Decoder(model_config)
        if "tensor_parallel" in config.get("lowtide", {}):
            register_pattern(PRETRAIN)
        self.parameters = sum(p.numel() for p in model.parameters())
        decay = config.get("optimizer", {}).get("params", {}).get("weight_decay", 0.0)
        self.engine, _, _, self.scheduler = lowtide.initialize(
            model=model, model_parameters=parameter_groups(model, decay), config=config
        )
        if (low_rank := self._plugin("tensor_parallel")) is not None:
            self.parameters = low_rank.summary()["factorisation"]["parameters_after"]
        self.rank = distributed.get_rank()
        self._reader, readers = readers_of(self.engine)
        self.batches = TrainingBatches(
            data.train,
            sequence=model_config.sequence,
            seed=seed,
            micro_batch=self.engine.train_micro_batch_size_per_gpu(),
            readers=readers,
            accumulation=self.engine.gradient_accumulation_steps(),
        )
        self._sequence = model_config.sequence
        self.step = 0
        self.plan: Plan | None = None
        self._used_before_s = 0.0
        self.display = Display(
            is_shown=self.rank == 0, tokens_per_step=self.batches.tokens_per_step
        )

    @property
    def used_s(self) -> float:
        """Seconds spent on this run over all starts, set-up included."""
        return self._used_before_s + time.time() - self._launched_s

    @property
    def stop_reason(self) -> str:
        """Why all ranks are to stop now, or empty; only a `"stop"` key listens to signals."""
        session = getattr(self.engine, "lowtide", None)
        stop = None if session is None else session.stop
        return stop.reason if stop is not None and stop.requested else ""

    def resume(self) -> None:
        """Go on from the newest complete checkpoint, if there is one."""
        tag = None
        if self._lazy is None:  # the plugin looks for it by itself, and reads every byte
            tag = self._choose()
            if tag is None:
                return
        path, state = self.engine.load_checkpoint(str(self.folder.checkpoints), tag=tag)
        if path is None:
            if self._lazy is not None:
                return  # nothing is there, or nothing that is whole, and it has said so
            raise UsageError(
                f"{self.folder.checkpoints / tag}: DeepSpeed cannot load it; remove "
                f"{self.folder.path} to start fresh"
            )
        progress = Progress.from_dict(state["pretrain"])
        self.step, self._used_before_s = progress.step, progress.used_s
        self._set_plan(progress.plan)
        self.display.say(f"resumed from {checkpoints.tag_of(self.step)}")

    def _choose(self) -> str | None:
        found: list[Any] = [None]
        if self.rank == 0:
            found = [choose(self.folder.checkpoints, world_size=distributed.get_world_size())]
        distributed.broadcast_object_list(found)  # all ranks take rank 0's choice
        choice = found[0]
        for line in choice.skipped:
            self.display.say(line)
        if choice.tag is not None and self.rank == 0:
            checkpoints.remove_newer(self.folder.checkpoints, choice.step)
        tag: str | None = choice.tag
        return tag

    def train(self, *, minutes: float | None, steps: int | None) -> bool:
        """Train to the end of the plan.

        Args:
            minutes: time budget; None keeps that of a resumed run.
            steps: number of steps instead of a budget.

        Returns:
            Whether the end was reached; False when the run was asked to stop (it saves first).
        """
        saved = self.plan
        if steps is not None and (saved is None or saved.total_steps != steps):
            self._set_plan(plan_from_steps(steps))
        elif steps is None and saved and minutes not in (None, saved.minutes):
            self.plan = None  # the budget has changed: measure and plan again
        minutes = minutes or DEFAULT_MINUTES
        validation_s = 0.0
        if self.step == 0 or self.plan is None:
            begin_s = time.perf_counter()
            self._record_score(self._validate(WINDOWS_WHILE_TRAINING))
            validation_s = time.perf_counter() - begin_s
        timer = StepTimer()
        with self.display:
            while self.plan is None or self.step < self.plan.total_steps:
                begin_s = time.perf_counter()
                self._train_step(begin_s)
                timer.add(time.perf_counter() - begin_s)
                if self.plan is None and timer.is_complete:
                    self._set_plan(self._agree(minutes, timer.step_s, validation_s))
                    self.save()  # so that a killed run keeps the plan
                elif self.stop_reason:
                    self.save(status="stopped")
                    return False
                elif self.plan is not None and self.step < self.plan.total_steps:
                    self._do_what_is_due(self.plan)
        return True

    def _do_what_is_due(self, plan: Plan) -> None:
        if self.step % plan.validate_every == 0:
            self._record_score(self._validate(WINDOWS_WHILE_TRAINING))
        if self.step % plan.save_every == 0:
            self.save()

    def _train_step(self, begin_s: float) -> None:
        passes = self.engine.gradient_accumulation_steps()
        device = self.engine.device
        total_loss = torch.zeros((), dtype=torch.float64, device=device)
        for micro_step in range(passes):
            inputs_BT, targets_BT = self.batches.batch(self.step, micro_step, self._reader)
            loss = self.engine(inputs_BT.to(device), targets_BT.to(device))
            self.engine.backward(loss)
            self.engine.step()
            total_loss += loss.detach() / passes
        distributed.all_reduce(total_loss)
        mean_loss = float(total_loss) / distributed.get_world_size()
        self.step += 1
        if not math.isfinite(mean_loss):
            raise UsageError(
                f"the loss is {mean_loss} at step {self.step}; lower the learning rate in the "
                "configuration and run again (the last checkpoint is from before)"
            )
        self._scalar("train/loss", mean_loss)
        total = None if self.plan is None else self.plan.total_steps
        self.display.step(
            self.step, total, loss=mean_loss, duration_s=time.perf_counter() - begin_s
        )
        if self.step % SPEED_EVERY_STEPS == 0:
            self._scalar("train/tokens_per_s", self.display.tokens_per_s)

    def _agree(self, minutes: float, step_s: float, validation_s: float) -> Plan:
        """Let rank 0 turn its measurements into a plan, and give it to all ranks."""
        windows = min(WINDOWS_AT_THE_END, len(self.data.validation) // self._sequence + 1)
        plan = plan_from_budget(
            minutes=minutes,
            done_steps=self.step,
            left_s=60 * minutes - self.used_s,
            step_s=step_s,
            validation_s=validation_s,
            final_validation_s=validation_s * windows / WINDOWS_WHILE_TRAINING,
        )
        agreed = [plan]
        distributed.broadcast_object_list(agreed)
        self.display.say(f"planned {agreed[0].total_steps} steps for {minutes:g} minutes")
        return agreed[0]

    def _set_plan(self, plan: Plan | None) -> None:
        self.plan = plan
        if plan is not None and self._follows_plan:
            self.scheduler.total_num_steps = plan.total_steps

    def _validate(self, limit_windows: int) -> Score:
        with self._span("validation"):
            return validate(
                self.engine,
                self.data,
                sequence=self._sequence,
                micro_batch=self.engine.train_micro_batch_size_per_gpu(),
                limit_windows=limit_windows,
            )

    def _record_score(self, score: Score) -> None:
        self._scalar("validation/loss", score.loss)
        text = f"step {self.step}: validation loss {score.loss:.4f}"
        if score.bits_per_byte is not None:
            self._scalar("validation/bits_per_byte", score.bits_per_byte)
            text += f", {score.bits_per_byte:.4f} bits per byte"
        self.display.say(text)

    def score(self) -> Score:
        """Validate on more text than while training, and record it as the result."""
        score = self._validate(WINDOWS_AT_THE_END)
        self._record_score(score)
        yardstick = self.data.manifest.xz_bits_per_byte
        if yardstick is not None and self.rank == 0 and self._telemetry is not None:
            self._telemetry.reference("validation/bits_per_byte", "xz -9", yardstick)
        return score

    def save(self, status: str = "running") -> None:
        """Save a checkpoint, then drop those that are no longer needed."""
        progress = Progress(status=status, step=self.step, used_s=self.used_s, plan=self.plan)
        if self._telemetry is not None:
            self._telemetry.flush()  # else a kill would leave a gap before the checkpoint
        self.engine.save_checkpoint(
            str(self.folder.checkpoints),
            tag=checkpoints.tag_of(self.step),
            client_state={"pretrain": asdict(progress)},
        )
        if self._lazy is None:
            # DeepSpeed returns after a barrier, so here the parts of all ranks are on disk.
            if self.rank == 0:
                checkpoints.remove_old(self.folder.checkpoints, self.step)
        elif status != "running":
            self._lazy.wait("committed")
        if self.rank == 0:
            self.folder.save(progress)

    def close(self) -> None:
        """End the telemetry and leave the process group."""
        self.engine.destroy()
        distributed.destroy_process_group()

    @property
    def _telemetry(self) -> Any:
        # Without a "lowtide" block the engine is stock DeepSpeed and nothing is recorded.
        return self.engine.lowtide.telemetry if hasattr(self.engine, "lowtide") else None

    @property
    def _lazy(self) -> Any:
        """The checkpoint plugin, where it is switched on."""
        return self._plugin("checkpoint")

    def _plugin(self, name: str) -> Any:
        session = getattr(self.engine, "lowtide", None)
        return None if session is None else session.plugins.get(name)

    def _scalar(self, name: str, value: float) -> None:
        if self.rank == 0 and self._telemetry is not None:
            self._telemetry.scalar(name, value, self.step)

    @contextlib.contextmanager
    def _span(self, name: str) -> Iterator[None]:
        if self._telemetry is None:
            yield
            return
        with self._telemetry.span(name):
            yield


def _fill_scheduler(config: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Replace ``"total_num_steps": "auto"``, which follows the plan; says whether it was there."""
    scheduler = config.get("scheduler", {})
    parameters = scheduler.get("params", {})
    if parameters.get("total_num_steps") != "auto":
        return False, config
    # Until the plan is made the learning rate only warms up, so any large number does.
    filled = {**scheduler, "params": {**parameters, "total_num_steps": 10**9}}
    return True, {**config, "scheduler": filled}
