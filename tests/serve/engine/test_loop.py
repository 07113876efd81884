"""Who is next: tenants in turn, prompts by parts, a step between any two pieces of reading."""

import itertools
from collections.abc import Generator, Sequence

import pytest
import torch
from clocks import set_clock

from turnout.errors import TurnoutError
from turnout.serve.engine import loop as of_loop
from turnout.serve.engine.answer import Answer
from turnout.serve.engine.lane import Scores
from turnout.serve.engine.loop import Loop
from turnout.serve.engine.request import Request
from turnout.serve.engine.ticket import Ticket
from turnout.serve.engine.turns import Turns


class Told:
    """A lane that writes down what it is asked; a prompt has a part for each of its tokens, of two pieces each."""

    def __init__(self, room: int = 99) -> None:
        self.room, self.said, self.dropped, self.load_LE = room, list[str](), list[Answer](), None

    def why_never(self, prompt: int, tokens: int) -> str | None:
        return None

    def begin(self, answer: Answer) -> bool:
        self.room -= 1
        if self.room < 0:
            self.room = 0
            return False
        return True

    def read(self, answer: Answer) -> Generator[bool, None, Scores | None]:
        for part in range(len(answer.request.prompt)):
            self.said.append(f"read {answer.ticket.number}.{part}")
            yield False
            yield True
        return Scores(answer, torch.tensor([0.0, 1.0]))

    def step(self, answers: Sequence[Answer]) -> list[Scores]:
        self.said.append("step " + " ".join(str(answer.ticket.number) for answer in answers))
        return [Scores(answer, torch.tensor([0.0, 1.0])) for answer in answers]

    def leave(self, answer: Answer) -> None:
        self.said.append(f"leave {answer.ticket.number}")
        self.room += 1


def asked(number: int, prompt: int, tokens: int, tenant: str = "") -> Answer:
    request = Request((1,) * prompt, tokens, tenant=tenant)
    return Answer(Ticket(request, number, leave=lambda ticket: None), None, 2)


def run(loop: Loop) -> None:
    for _ in range(200):
        loop.admit()
        loop.turn()
    assert not loop.running and not len(loop.turns)


def test_tenants_take_turns_and_their_own_requests_wait_in_line() -> None:
    turns, order = Turns(), []
    for number, tenant in enumerate("aaaabbc", 1):
        turns.add(asked(number, 1, 1, tenant))
    assert [answer.ticket.number for answer in turns] == [1, 2, 3, 4, 5, 6, 7]
    late = asked(0, 1, 1, "a")
    while (answer := turns.first()) is not None:
        turns.take(answer)
        order.append(answer.ticket.number)
        if len(order) == 2:
            turns.again(late)  # who had to give a slot up goes first
    assert order == [1, 5, 0, 7, 2, 6, 3, 4]


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_a_step_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_loop, "_SHARE", 0.0)
    lane = Told()
    loop = Loop({"": lane}, slots=4)
    for answer in (asked(1, 1, 40), asked(2, 6, 1), asked(3, 2, 1)):
        loop.turns.add(answer)
    run(loop)
    said = lane.said
    read = [one for one in said if one.startswith("read")]
    assert read[:7] == ["read 1.0", "read 2.0", "read 3.0", "read 2.1", "read 3.1", "read 2.2", "read 2.3"]
    first = next(place for place, one in enumerate(said) if one.startswith("step"))
    later = [one for one in said[first:] if one.startswith(("read", "step"))]
    assert all(not (a.startswith("read") and b.startswith("read")) for a, b in itertools.pairwise(later))
    assert loop.finished == {"length": 3} and loop.tokens_out == 42 and loop.tokens_in == 9


def test_where_several_prompts_wait_twice_as_much_of_them_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    set_clock(monkeypatch, of_loop, perf_counter=lambda: now_s[0])

    class Slow(Told):
        """A step takes eight seconds, a piece of reading one."""

        def step(self, answers: Sequence[Answer]) -> list[Scores]:
            now_s[0] += 8.0
            return super().step(answers)

        def read(self, answer: Answer) -> Generator[bool, None, Scores | None]:
            reading = super().read(answer)
            while True:
                now_s[0] += 1.0
                try:
                    yield next(reading)
                except StopIteration as done:
                    return done.value

    def read_between_steps(prompts: int) -> int:
        loop = Loop({"": Slow()}, slots=9)
        loop.turns.add(asked(1, 1, 40))
        loop.admit()
        while loop.tokens_out == 0:
            loop.turn()
        for number in range(prompts):
            loop.turns.add(asked(2 + number, 30, 1))
        loop.admit()
        begun_s = now_s[0]
        loop.turn()
        return round(now_s[0] - begun_s) - 8

    assert [read_between_steps(prompts) for prompts in (1, 2, 3)] == [8, 16, 16]


def test_who_finds_no_memory_is_not_overtaken_and_who_leaves_frees_a_slot() -> None:
    lane = Told(room=1)
    loop = Loop({"": lane}, slots=2)
    some = [asked(number, 1, 3) for number in (1, 2, 3)]
    for answer in some:
        loop.turns.add(answer)
    loop.admit()
    assert list(loop.running) == some[:1]
    loop.cancel(some[1])
    loop.cancel(some[0])
    assert not loop.running and lane.said == ["leave 1"]
    run(loop)
    assert [answer.ticket.finished.reason for answer in some] == ["cancelled", "cancelled", "length"]
    assert loop.finished == {"cancelled": 2, "length": 1}


def test_who_gives_its_pages_up_is_read_again() -> None:
    lane = Told()
    loop = Loop({"": lane}, slots=2)
    one = asked(1, 2, 4)
    loop.turns.add(one)
    loop.admit()
    loop.turn()
    lane.dropped.append(one)
    loop.turn()
    assert loop.preempted == 1 and not loop.running and loop.turns.first() is one
    run(loop)
    assert [said for said in lane.said if said.startswith("read")] == ["read 1.0", "read 1.0", "read 1.1"]
    assert one.ticket.finished.output_tokens == 4 and loop.tokens_in == 4


def test_who_gave_its_pages_up_in_a_step_that_fails_goes_on_later() -> None:
    class Failing(Told):
        """Its first step of three takes the last one's pages away, and then an expert cannot be read."""

        def step(self, answers: Sequence[Answer]) -> list[Scores]:
            if len(answers) == 3 and "step fails" not in self.said:
                self.said.append("step fails")
                self.dropped.append(answers[-1])
                raise TurnoutError("no expert")
            return super().step(answers)

    loop, answers = Loop({"": Failing()}, slots=3), [asked(number, 1, 5) for number in (1, 2, 3)]
    for answer in answers:
        loop.turns.add(answer)
    run(loop)
    ends = [[one for one in answer.ticket if not hasattr(one, "id")] for answer in answers]
    assert [[end.reason for end in each] for each in ends] == [["error"], ["error"], ["length"]]
    assert loop.finished == {"error": 2, "length": 1} and loop.preempted == 1
