"""Regular expressions from a stranger's file, matched as ``re`` does but in bounded time, or refused."""

import re
from collections.abc import Callable, Iterable
from re import _constants as code  # pyrefly: ignore[missing-module-attribute]
from re import _parser as parser  # pyrefly: ignore[missing-module-attribute]
from typing import Any

__all__ = ["Hard", "Patterns"]

_LENGTH, _STATES = 20_000, 20_000
# A name of a module, as patterns mostly are: word characters, and dots that stand for any character.
_NAME = re.compile(r"(\^?)((?:[\w-]|\.|\\\.)+)(\$?)")
_CATEGORY: dict[Any, Callable[[str], bool]] = {
    code.CATEGORY_DIGIT: str.isdecimal,
    code.CATEGORY_NOT_DIGIT: lambda one: not one.isdecimal(),
    code.CATEGORY_SPACE: str.isspace,
    code.CATEGORY_NOT_SPACE: lambda one: not one.isspace(),
    code.CATEGORY_WORD: lambda one: one.isalnum() or one == "_",
    code.CATEGORY_NOT_WORD: lambda one: not (one.isalnum() or one == "_"),
}
_Test = Callable[[str], bool]
_Place = Callable[[str, int], bool]
# What a state is: one character to pass (a test), a place to be at, or a choice of states that cost nothing.
_State = tuple[_Test | None, _Place | None, list[int]]


class Hard(Exception):
    """A pattern that is no regular expression, has more than letters, classes, choices and repeats, or takes too long.

    Source: none; plain bookkeeping.
    """


class Patterns:
    r"""Matches names against patterns as ``re.match`` and ``re.fullmatch`` do, within ``steps`` in all.

    Every way through a pattern is followed at once, a character at a time, so that the time is at most that of its
    length times the name's: the repeats of repeats over which ``re`` takes for ever are harmless. What remembers or
    looks ahead (back references, assertions) has no such form, and is refused.

    Args:
        steps: how much work all calls together may take; a step is some microseconds at most.

    >>> patterns = Patterns()
    >>> patterns.ends("(q|k)_proj", "layers.0.q_proj"), patterns.whole(r"layers\.\d+\..*", "layers.10.mlp")
    (True, True)
    >>> patterns.whole("(a+)+b", "a" * 60)
    False

    Source: Thompson, 1968, "Programming Techniques: Regular expression search algorithm". The tree is ``re``'s own.
    """

    def __init__(self, steps: int = 3_000_000) -> None:
        self.steps = steps
        self._programs: dict[str, list[_State]] = {}

    def ends(self, pattern: str, name: str) -> bool:
        r"""Whether ``re.match(rf"(.*\.)?({pattern})$", name)`` finds anything: how PEFT reads rank_pattern.

        Raises:
            Hard: see there.
        """
        plain = _NAME.fullmatch(pattern)
        if plain is None or "\n" in name:
            return self._follow(rf"(.*\.)?({pattern})$", name, whole=False)
        start = len(name) - (len(plain[2]) - plain[2].count("\\"))
        self._spend(1)
        if start < 0 or (start and (plain[1] or name[start - 1] != ".")):
            return False
        self._spend(len(name))
        cells = zip(re.findall(r"\\?.", plain[2]), name[start:], strict=True)
        return all(cell in (".", one, f"\\{one}") for cell, one in cells)

    def whole(self, pattern: str, name: str) -> bool:
        """Whether ``re.fullmatch(pattern, name)`` finds anything.

        Raises:
            Hard: see there.
        """
        return self._follow(pattern, name, whole=True)

    def _spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise Hard("patterns that take too long to match")

    def _follow(self, pattern: str, name: str, *, whole: bool) -> bool:
        """Whether the program of the pattern reaches its end with the name's, or anywhere in it."""
        program = self._programs.get(pattern)
        if program is None:
            program = self._programs[pattern] = _program(pattern)
        here = self._free(program, [0], name, 0)
        for place, character in enumerate(name):
            if len(program) in here and not whole:
                return True
            after = []
            for state in here:
                if state < len(program) and (test := program[state][0]) is not None and test(character):
                    after += program[state][2]
            if not after:
                return False
            here = self._free(program, after, name, place + 1)
        return len(program) in here

    def _free(self, program: list[_State], start: Iterable[int], name: str, place: int) -> set[int]:
        """The states that are reached from these without a character."""
        reached: set[int] = set()
        left = list(start)
        while left:
            state = left.pop()
            if state in reached:
                continue
            reached.add(state)
            if state == len(program):
                continue
            test, at, goal = program[state]
            if test is None and (at is None or at(name, place)):
                left += goal
        self._spend(len(reached) + 1)
        return reached


def _program(pattern: str) -> list[_State]:
    """The states of a pattern; the one after the last is the end.

    Raises:
        Hard: see there.
    """
    if len(pattern) > _LENGTH:
        raise Hard(f"a pattern of {len(pattern):,} characters")
    try:
        tree = parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE.value:
            raise Hard("a pattern with flags")
        program: list[_State] = []
        _sequence(program, tree)
    except (re.error, OverflowError) as error:
        raise Hard(f"no regular expression ({error})") from error
    except RecursionError as error:
        raise Hard("a pattern nested too deeply") from error
    return program


def _sequence(program: list[_State], tree: Any) -> None:
    """Appends the states of one thing after the other; each goes on to the state after its last."""
    for kind, argument in tree:
        if len(program) > _STATES:
            raise Hard("a pattern of too many repeats")
        after = len(program) + 1
        if kind is code.AT:
            program.append((None, _place(argument), [after]))
        elif kind is code.BRANCH:
            _branch(program, argument[1])
        elif kind is code.SUBPATTERN:
            if argument[1] or argument[2]:
                raise Hard("a pattern with flags")
            _sequence(program, argument[3])
        elif kind in (code.MAX_REPEAT, code.MIN_REPEAT):
            _repeat(program, *argument)
        else:
            program.append((_test(kind, argument), None, [after]))


def _branch(program: list[_State], choices: list[Any]) -> None:
    fork: list[int] = []
    program.append((None, None, fork))
    ends: list[list[int]] = []
    for choice in choices:
        fork.append(len(program))
        _sequence(program, choice)
        ends.append([])
        program.append((None, None, ends[-1]))
    for end in ends:
        end.append(len(program))


def _repeat(program: list[_State], least: int, most: Any, tree: Any) -> None:
    """``least`` times, then as often as one likes, or ``most - least`` times at most."""
    if least > _STATES or (most is not code.MAXREPEAT and most > _STATES):
        raise Hard("a pattern of too many repeats")
    for _ in range(least):
        before = len(program)
        _sequence(program, tree)
        if len(program) == before:  # of nothing at all, which is the same however often
            return
    if most is code.MAXREPEAT:
        start, fork = len(program), [len(program) + 1]
        program.append((None, None, fork))
        _sequence(program, tree)
        program.append((None, None, [start]))
        fork.append(len(program))
        return
    forks = []
    for _ in range(most - least):
        forks.append([len(program) + 1])
        program.append((None, None, forks[-1]))
        _sequence(program, tree)
    for fork in forks:
        fork.append(len(program))


def _test(kind: Any, argument: Any) -> _Test:
    """Whether one character passes."""
    if kind is code.LITERAL:
        return lambda one: ord(one) == argument
    if kind is code.NOT_LITERAL:
        return lambda one: ord(one) != argument
    if kind is code.ANY:
        return lambda one: one != "\n"
    if kind is code.RANGE:
        return lambda one: argument[0] <= ord(one) <= argument[1]
    if kind is code.CATEGORY and argument in _CATEGORY:
        return _CATEGORY[argument]
    if kind is code.IN:
        negative = argument[0][0] is code.NEGATE
        tests = [_test(*one) for one in argument[negative:]]
        known: dict[str, bool] = {}  # a class may be long, and names have few characters

        def among(one: str) -> bool:
            if one not in known:
                known[one] = any(test(one) for test in tests) != negative
            return known[one]

        return among
    raise Hard(f"a pattern with {str(kind).lower()}")


def _place(kind: Any) -> _Place:
    """Whether a place in a name is one of that kind."""
    if kind in (code.AT_BEGINNING, code.AT_BEGINNING_STRING):
        return lambda name, place: place == 0
    if kind is code.AT_END:
        return lambda name, place: place == len(name) or (place == len(name) - 1 and name[-1] == "\n")
    if kind is code.AT_END_STRING:
        return lambda name, place: place == len(name)
    if kind in (code.AT_BOUNDARY, code.AT_NON_BOUNDARY):
        word, wanted = _CATEGORY[code.CATEGORY_WORD], kind is code.AT_BOUNDARY

        def boundary(name: str, place: int) -> bool:
            before, after = place > 0 and word(name[place - 1]), place < len(name) and word(name[place])
            return (before != after) == wanted

        return boundary
    raise Hard(f"a pattern with {str(kind).lower()}")
