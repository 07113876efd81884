"""The loop of an engine: who gets a slot, whose prompt is read, and a step for all that go on, over and over."""

import time
from collections import Counter, deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass

from turnout.errors import TurnoutError
from turnout.serve.engine.answer import Answer
from turnout.serve.engine.lane import Lane, Scores
from turnout.serve.engine.request import Reason
from turnout.serve.engine.turns import Turns

__all__ = ["Loop"]

# Reading takes so much of the time that a step takes, one piece at least, and twice that where several prompts wait:
# the more go on together, the less a step costs each. No token waits for more than about three times.
_SHARE = 1.0


@dataclass(eq=False)
class _Reading:
    answer: Answer
    lane: Lane
    pieces: Generator[bool, None, Scores | None]


class Loop:
    """Requests between their arrival and their end. One thread calls it.

    Each turn gives free slots away, reads some of one prompt, and goes a step on with every request that was read. The
    prompts take turns by parts, so that a short one does not wait for a long one.

    Args:
        lanes: by name.
        slots: how many requests go on at once.

    Source: Yu et al., 2022, "Orca"; prompts in parts between steps as Agrawal et al., 2024, "Taming
    Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve".
    """

    def __init__(self, lanes: Mapping[str, Lane], slots: int) -> None:
        self.lanes, self._slots = lanes, slots
        self.turns = Turns()
        self.running: dict[Answer, Lane] = {}
        self._reading: deque[_Reading] = deque()
        self.finished: Counter[str] = Counter()
        self.tokens_in = self.tokens_cached = self.tokens_out = self.preempted = 0
        self.together: tuple[int, ...] = ()
        self.seconds = 1.0  # between two requests that ended, of late
        self._ended_s = time.monotonic()

    def lane(self, answer: Answer) -> Lane:
        """That of the model that a request names."""
        name = answer.request.adapter
        return self.lanes[next(iter(self.lanes)) if name is None else name]

    def cancel(self, answer: Answer) -> None:
        """It ends; its slot is free."""
        if answer in self.running:
            self._end(answer, "cancelled")
        elif answer.ticket.finished is None:
            self.turns.take(answer)
            answer.end("cancelled")
            self.finished["cancelled"] += 1

    def admit(self) -> None:
        """Gives free slots to those whose turn it is."""
        while len(self.running) < self._slots and (answer := self.turns.first()) is not None:
            lane = self.lane(answer)
            if not lane.begin(answer):
                return  # nobody overtakes: it would wait for ever
            self.turns.take(answer)
            self.running[answer] = lane
            if not answer.drawn:
                self.tokens_cached += answer.cached
                self.tokens_in += len(answer.request.prompt) - answer.cached
            self._reading.append(_Reading(answer, lane, lane.read(answer)))

    def turn(self) -> None:
        """One round."""
        began_s = time.perf_counter()
        still = {one.answer for one in self._reading}
        ready = [answer for answer in self.running if answer not in still]
        for lane in dict.fromkeys(self.running[answer] for answer in ready):
            self._step(lane, [answer for answer in ready if self.running.get(answer) is lane])
        if ready:
            self.together = tuple(answer.ticket.number for answer in ready)
        share = _SHARE * min(2, len(self._reading))
        self._read(share * (time.perf_counter() - began_s) if ready else 0.0)

    def _step(self, lane: Lane, answers: list[Answer]) -> None:
        try:
            scores = lane.step(answers)
        except TurnoutError as error:  # an expert's file is gone or changed: these end, and the engine goes on
            for answer in answers:
                if answer not in lane.dropped:  # those wait, and are read again
                    self._fail(answer, error)
            scores = []
        self._again(lane)
        for one in scores:
            self._take(one)

    def _read(self, budget_s: float) -> None:
        """Reads on, a piece at least, and no longer than this if it can be helped."""
        began_s = before_s = time.perf_counter()
        while self._reading:
            self._piece()
            now_s = time.perf_counter()
            if now_s + (now_s - before_s) > began_s + budget_s:
                return
            before_s = now_s

    def _piece(self) -> None:
        """One piece of the prompt whose turn it is."""
        one = self._reading[0]
        try:
            if next(one.pieces):
                self._reading.rotate(-1)
        except StopIteration as done:
            self._reading.popleft()
            if done.value is not None:
                self._take(done.value)
        except Exception as error:  # one that fails takes no other down
            self._fail(one.answer, error)
        self._again(one.lane)

    def _again(self, lane: Lane) -> None:
        """Those that gave up their pages wait once more."""
        for answer in lane.dropped:
            self.running.pop(answer, None)
            self._stop_reading(answer)
            self.turns.again(answer)
            self.preempted += 1
        lane.dropped.clear()

    def _take(self, scores: Scores) -> None:
        answer = scores.answer
        try:
            if scores.error is not None or scores.score_V is None:
                raise scores.error or RuntimeError("no scores")
            self.tokens_out += 1
            if answer.take(scores.score_V, scores.routes, best=scores.best):
                self._end(answer)
        except Exception as error:  # one that fails takes no other down
            self._fail(answer, error)

    def _fail(self, answer: Answer, error: Exception) -> None:
        said = str(error) if isinstance(error, TurnoutError) else f"{type(error).__name__}: {error}"
        self._end(answer, "error", said)

    def _end(self, answer: Answer, reason: Reason | None = None, message: str = "") -> None:
        """Frees its slot, and says why where it has not been said."""
        self._stop_reading(answer)
        lane = self.running.pop(answer, None)
        if lane is not None:
            lane.leave(answer)
        if reason is not None:
            answer.end(reason, message)
        end = answer.ticket.finished
        self.finished[end.reason if end else "error"] += 1
        now_s = time.monotonic()
        self.seconds += 0.1 * (min(now_s - self._ended_s, 60.0) - self.seconds)
        self._ended_s = now_s

    def _stop_reading(self, answer: Answer) -> None:
        self._reading = deque(one for one in self._reading if one.answer is not answer)
