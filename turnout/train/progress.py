"""Progress of a run on stderr: a bar where a terminal can show one, plain lines everywhere else."""

import sys
import time
from typing import Any, Protocol

from turnout.measure.report import duration

__all__ = ["Bar", "Lines", "Progress", "Silent", "progress_for"]


class Progress(Protocol):
    """What the loop tells while it trains.

    Source: none; plain bookkeeping.
    """

    def start(self, step: int, steps: int) -> None:
        """The run begins at ``step`` of ``steps``."""

    def advance(self, step: int) -> None:
        """A step is done; called at every one, so it must cost nothing."""

    def train(self, record: dict[str, Any]) -> None:
        """A train line has gone to metrics.jsonl."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """An eval line has gone to metrics.jsonl."""

    def say(self, text: str) -> None:
        """One line that the user should see."""

    def stop(self) -> None:
        """The run is over, one way or another."""


class Silent:
    """No progress at all.

    Source: none; plain bookkeeping.
    """

    def start(self, step: int, steps: int) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def train(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Lines:
    """Plain lines, about twenty of them over a run, plus one for every evaluation.

    Args:
        file: where they go; default stderr.

    Source: none; plain bookkeeping.
    """

    def __init__(self, file: Any = None) -> None:
        self._file = sys.stderr if file is None else file
        self._steps, self._every, self._next = 1, 1, 0
        self._clock = Clock()

    def start(self, step: int, steps: int) -> None:
        """Remembers the length of the run."""
        self._steps, self._every, self._next = steps, max(1, steps // 20), step + 1
        self._clock.start(step, steps)

    def advance(self, step: int) -> None:
        """Counts."""
        self._clock.advance(step)

    def train(self, record: dict[str, Any]) -> None:
        """One line now and then."""
        if record["step"] < self._next and record["step"] != self._steps:
            return
        self._next = record["step"] + self._every
        self.say(
            f"step {record['step']}/{self._steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['tokens_per_s']:,.0f} tokens/s  {self._clock.left()} left"
        )

    def evaluated(self, record: dict[str, Any]) -> None:
        """One line."""
        self.say(f"step {record['step']}/{self._steps}  {describe(record)}")

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=self._file, flush=True)

    def stop(self) -> None:
        """Nothing."""


class Bar:
    """A rich progress bar with loss, tokens a second and the time left; evaluations scroll by above it.

    Args:
        console: a rich Console; default one on stderr.

    Source: none; plain bookkeeping.
    """

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._clock = Clock()
        self._bar = RichProgress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[left]} left"),
            console=console or Console(stderr=True),
            refresh_per_second=4,
        )
        self._task = None

    def start(self, step: int, steps: int) -> None:
        """Shows the bar."""
        self._clock.start(step, steps)
        self._task = self._bar.add_task("train", total=steps, completed=step, loss="loss -", speed="", left="?")
        self._bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar; it redraws itself four times a second at most."""
        if self._task is not None:
            self._clock.advance(step)
            self._bar.update(self._task, completed=step, left=self._clock.left())

    def train(self, record: dict[str, Any]) -> None:
        """Updates the numbers beside the bar."""
        if self._task is not None:
            speed = f"{record['tokens_per_s']:,.0f} tokens/s"
            self._bar.update(self._task, loss=f"loss {record['loss']:.4f}", speed=speed)

    def evaluated(self, record: dict[str, Any]) -> None:
        """One line above the bar."""
        self.say(f"step {record['step']:>6}  {describe(record)}")

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.stop()


class Clock:
    """How long the rest of a run takes at the pace of this process so far.

    Source: none; plain bookkeeping.
    """

    def start(self, step: int, steps: int) -> None:
        """Starts counting at ``step``."""
        self._first, self._step, self._steps, self._began = step, step, steps, time.monotonic()

    def advance(self, step: int) -> None:
        """``step`` steps are done."""
        self._step = step

    def left(self) -> str:
        """The time left, as minutes and seconds."""
        done = self._step - self._first
        if done == 0:
            return "?"
        return duration((time.monotonic() - self._began) / done * (self._steps - self._step))


def describe(record: dict[str, Any]) -> str:
    """An eval line of metrics.jsonl in words."""
    parts = [f"held-out {record['bits_per_byte']:.4f} bits per byte"]
    if len(record["by_domain"]) > 1:
        parts.append("(" + ", ".join(f"{name} {value:.4f}" for name, value in record["by_domain"].items()) + ")")
    if record.get("max_vio") is not None:
        parts.append(f"MaxVio {record['max_vio']:.2f}")
    return "  ".join(parts)


def progress_for(*, quiet: bool = False) -> Progress:
    """What suits stderr: a bar on a terminal, plain lines in a pipe or a file, nothing when ``quiet``."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
