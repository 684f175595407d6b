"""What the person in front of the screen sees while it trains: rank 0 only."""

from __future__ import annotations

import time
from types import TracebackType

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY_S = 5.0


class Display:
    """A live line on a terminal; a plain line every few seconds elsewhere.

    Args:
        is_shown: False on all ranks but one, which then show nothing.
        tokens_per_step: tokens of all ranks together in one step.
    """

    def __init__(self, *, is_shown: bool, tokens_per_step: int) -> None:
        # Wide and without wrapping where nobody looks at a terminal: one fact, one line.
        self._console = Console(highlight=False, soft_wrap=True)
        self._is_shown = is_shown
        self._tokens_per_step = tokens_per_step
        self._live: Progress | None = None
        self._last_line_s = 0.0
        self._smooth_loss: float | None = None
        self._step_s: float | None = None

    def __enter__(self) -> Display:
        if self._is_shown and self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self._console,
            )
            self._live.add_task("training", total=None, facts="")
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Show a line that stays."""
        if self._is_shown:
            self._console.print(text, markup=False)

    @property
    def tokens_per_s(self) -> float:
        """Smoothed speed of all ranks together."""
        return self._tokens_per_step / self._step_s if self._step_s else 0.0

    def step(self, step: int, total: int | None, *, loss: float, duration_s: float) -> None:
        """Take note of one finished step."""
        self._smooth_loss = _smooth(self._smooth_loss, loss)
        self._step_s = _smooth(self._step_s, duration_s)
        if not self._is_shown:
            return
        left = "timing" if total is None else _clock((total - step) * self._step_s)
        memory_gib = psutil.Process().memory_info().rss / 2**30
        facts = (
            f"loss {self._smooth_loss:.3f}  {self.tokens_per_s:,.0f} tokens/s  "
            f"left {left}  memory {memory_gib:.2f} GiB/rank"
        )
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=step, total=total, facts=facts)
            return
        now_s = time.monotonic()
        if now_s - self._last_line_s >= LINE_EVERY_S or step == total:
            self._last_line_s = now_s
            self.say(f"step {step}/{'?' if total is None else total}  {facts}")


def _smooth(previous: float | None, value: float) -> float:
    return value if previous is None else 0.9 * previous + 0.1 * value


def _clock(duration_s: float) -> str:
    minutes, seconds = divmod(max(0, round(duration_s)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
