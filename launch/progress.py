"""How a run shows itself to a person: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import atexit
import sys
import time
from typing import Any

from launch.terminal import is_quiet, tell, wants_bar
from training.records import StepRecord

PLAIN_SECONDS = 5.0
"""At most one plain line in so many seconds, besides evaluations and events."""


class Progress:
    """Loss, tokens/s and time left on stderr; under --quiet events alone."""

    def __init__(self, log_interval: int = 1) -> None:
        self._log_interval = log_interval
        self._live = _LiveBar() if wants_bar(sys.stderr) else None
        self._quiet = is_quiet()
        self._last_step, self._said_at = 0, 0.0
        self._usual_seconds: float | None = None

    def begin(self, first_step: int, last_step: int) -> None:
        self._last_step = last_step
        if self._live is not None:
            self._live.begin(first_step - 1, last_step)

    def step_done(self, record: StepRecord) -> None:
        left = (self._last_step - record.step) * self._smoothed(record.step_seconds)
        if self._quiet:
            return
        if self._live is not None:
            self._live.show(record, left)
            if record.validation_loss is not None:
                self.event(self._line(record, left))
            return
        due = record.step % self._log_interval == 0 and time.monotonic() - self._said_at >= PLAIN_SECONDS
        if due or record.validation_loss is not None or record.step == self._last_step:
            self._said_at = time.monotonic()
            tell(self._line(record, left))

    def rolled_back(self, to_step: int) -> None: ...

    def event(self, text: str) -> None:
        if self._live is not None:
            self._live.say(text)
        else:
            tell(text)

    def end(self) -> None:
        if self._live is not None:
            self._live.end()

    def _smoothed(self, seconds: float) -> float:
        """Seconds of a usual step: recent ones weigh more, the first ones (which warm up) soon nothing."""
        usual = seconds if self._usual_seconds is None else 0.8 * self._usual_seconds + 0.2 * seconds
        self._usual_seconds = usual
        return usual

    def _line(self, record: StepRecord, left: float) -> str:
        parts = [
            f"step {record.step}/{self._last_step}",
            f"loss {record.loss:.4f}",
            f"grad norm {record.grad_norm:.3f}",
            f"lr {record.lr:.2e}",
            f"{record.tokens_per_second:,.0f} tokens/s",
            f"MFU {percent(record.mfu)}",
        ]
        if "reward" in record.further:
            parts.insert(1, f"reward {record.further['reward']:.4f}  KL {record.further['kl']:.4f}")
        if record.validation_loss is not None:
            parts.append(f"held-out loss {record.validation_loss:.4f}")
        if record.step < self._last_step:
            parts.append(f"{clock(left)} left")
        return "  ".join(parts)


class _LiveBar:
    """rich's progress bar."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s  {task.fields[left]} left"),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def begin(self, done: int, steps: int) -> None:
        self._bar.start()
        atexit.register(self.end)  # an error ends no watcher, and the bar hides the terminal's cursor
        self._task = self._bar.add_task("train", completed=done, total=steps, loss="-", rate="-", left="-")

    def show(self, record: StepRecord, left: float) -> None:
        self._bar.update(
            self._task,
            completed=record.step,
            loss=f"{record.loss:.3f}",
            rate=f"{record.tokens_per_second:,.0f}",
            left=clock(left),
        )

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def end(self) -> None:
        self._bar.stop()


def percent(share: float | None) -> str:
    """12.3 %, or n/a where it is not known."""
    return "n/a" if share is None else f"{100 * share:.1f} %"


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
