"""How far the preparation is: a bar with the time left on a terminal, plain lines now and then everywhere else."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

__all__ = ["Bar", "Display", "Lines", "Silent", "display"]

_LINE_EVERY_S = 5.0


class Display(Protocol):
    """Who is told.

    Source: none; plain bookkeeping.
    """

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` bytes of a stage are through; called often."""

    def say(self, text: str) -> None:
        """One line that the user should see."""

    def close(self) -> None:
        """It is over."""


class Silent:
    """Tells nobody but the given function, if any.

    Args:
        tell: a function (stage, done, total), an object with a method ``say(text)``, or both in one.

    Source: none; plain bookkeeping.
    """

    def __init__(self, tell: Any = None) -> None:
        self._tell = tell

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Passes it on."""
        if callable(self._tell):
            self._tell(stage, done, total)

    def say(self, text: str) -> None:
        """Passes it on to the ``say`` of the function, if it is an object that has one."""
        say = getattr(self._tell, "say", None)
        if say is not None:
            say(text)

    def close(self) -> None:
        """Nothing."""


class Lines:
    """A plain line every five seconds; a stage that takes less says nothing.

    Args:
        file: where they go; default stderr.
        clock: gives seconds.

    Source: none; plain bookkeeping.
    """

    def __init__(self, file: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self._stage, self._began, self._last = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Perhaps a line."""
        now = self._clock()
        if stage != self._stage:
            self._stage, self._began, self._last = stage, now, now
        elif now - self._last >= _LINE_EVERY_S:
            self._last = now
            left = f", {_clock_time((now - self._began) / done * max(total - done, 0))} left" if done else ""
            self.say(f"{stage}: {done / 1e6:,.1f} of {max(total, done) / 1e6:,.1f} MB{left}")

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=self._file or sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing."""


class Bar:
    """A rich progress bar for each stage, with bytes and the time left; it goes away at the end.

    Args:
        console: a rich Console; default one on stderr.

    Source: none; plain bookkeeping.
    """

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console or Console(stderr=True),
            transient=True,
            refresh_per_second=4,
        )
        self._tasks: dict[str, Any] = {}
        self._bar.start()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Moves the bar; it redraws itself four times a second at most."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._tasks[stage], completed=done, total=max(total, done))

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def display(progress: Any = None, *, quiet: bool = False) -> Iterator[Display]:
    """What suits: the given function; else nothing when ``quiet``, a bar on a terminal, plain lines elsewhere.

    Source: none; plain bookkeeping.
    """
    told: Display
    if progress is not None or quiet:
        told = Silent(progress)
    else:
        told = Bar() if sys.stderr.isatty() else Lines()
    try:
        yield told
    finally:
        told.close()
