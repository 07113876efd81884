"""Ctrl-C and SIGTERM: the first asks for a stop at the end of the step, the second stops at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["Stop", "listening"]


class Stop:
    """Whether the user has asked the run to stop.

    Source: none; plain bookkeeping.
    """

    def __init__(self) -> None:
        self.asked: str | None = None


@contextlib.contextmanager
def listening(say: Callable[[str], None]) -> Iterator[Stop]:
    """Catches SIGINT and SIGTERM while it is open, and puts things back as they were.

    Outside the main thread, where Python does not deliver signals, nothing is caught.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked is not None:
            # Once: another one would strike while the first is on its way out, in the middle of putting things back.
            for one in (signal.SIGINT, signal.SIGTERM):
                signal.signal(one, signal.SIG_IGN)
            raise KeyboardInterrupt
        stop.asked = signal.Signals(number).name
        # The signal may have come in the middle of a print to the same stream, which Python does not allow to nest.
        with contextlib.suppress(RuntimeError):
            say(f"{stop.asked}: finishing this step, then saving. Once more to stop at once, without saving.")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
