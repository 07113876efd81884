"""The first signal asks, the second stops."""

import os
import signal
import threading
import time

import pytest

from turnout.train.signals import listening


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_asks_second_stops(number):
    before, said = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), listening(said.append) as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == signal.Signals(number).name
        assert "finishing this step" in said[0]
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_other_threads_catch_nothing():
    seen = []

    def body():
        with listening(seen.append) as stop:
            seen.append(stop.asked)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [None]


def test_a_third_signal_does_not_strike_while_the_second_is_on_its_way_out() -> None:
    before = signal.getsignal(signal.SIGINT)
    ended = False
    with pytest.raises(KeyboardInterrupt), listening(lambda text: None):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            ended = True
    assert ended and signal.getsignal(signal.SIGINT) == before
