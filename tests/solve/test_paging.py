"""Fetches of known uses: room is kept, nothing is missing, and no order of giving up fetches less."""

import functools

import pytest
import torch

from turnout.errors import UsageError
from turnout.solve import paging


def _fewest(uses: list[int], capacity: int) -> int:
    """By trying everything, when things are fetched only as they are used."""

    @functools.cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(uses):
            return 0
        if uses[at] in held:
            return best(at + 1, held)
        if len(held) < capacity:
            return 1 + best(at + 1, held | {uses[at]})
        return 1 + min(best(at + 1, held - {out} | {uses[at]}) for out in held)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(20))
def test_no_order_fetches_less(seed: int) -> None:
    """Without looking ahead; a random order of uses that ends with a thing of its own, so that nothing comes after."""
    chance = torch.Generator().manual_seed(seed)
    uses = [*torch.randint(5, (12,), generator=chance).tolist()]
    capacity = 2 + seed % 3
    turns = paging(uses, capacity=capacity, ahead=0, spent=True)
    again = sum(len(turn.loads) for turn in turns)
    assert again == _fewest(uses, capacity), (seed, uses)


@pytest.mark.parametrize(("capacity", "ahead"), [(1, 0), (2, 1), (3, 1), (4, 3), (9, 2)])
@pytest.mark.parametrize("spent", [False, True])
def test_what_is_used_is_there_and_no_more_than_fits(capacity: int, ahead: int, spent: bool) -> None:
    """At every turn, from what the turns themselves say."""
    uses, held = [*range(6), *reversed(range(6))], set[int]()
    for at, turn in enumerate(paging(uses, capacity=capacity, ahead=ahead, spent=spent)):
        assert held.issuperset(turn.drops)
        held.difference_update(turn.drops)
        assert held.isdisjoint(turn.loads)
        held.update(turn.loads)
        assert held == turn.held and len(held) <= capacity
        assert held.issuperset(uses[at : at + 1 + ahead])
    assert spent is False or len(held) <= 1 + 0 * capacity


def test_a_pass_there_and_back_fetches_what_does_not_stay() -> None:
    """2 L less what is there when it turns round."""
    uses = [*range(8), *reversed(range(8))]
    for capacity in range(1, 9):
        for ahead in range(capacity):
            turns = paging(uses, capacity=capacity, ahead=ahead, spent=True)
            assert sum(len(turn.loads) for turn in turns) == 16 - capacity


def test_too_little_room_is_refused() -> None:
    """With what would do."""
    with pytest.raises(UsageError, match="capacity of 3"):
        paging([0, 1], capacity=2, ahead=2)
