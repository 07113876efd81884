"""The slots of experts: what a policy decides and cannot be done is refused, and takes no slot with it."""

import pytest
import torch

from turnout.errors import UsageError
from turnout.run.swap.experts import ExpertCache, Part
from turnout.types import CacheShape, Decision


class Numbers:
    """Expert e of layer l is the number 10 l + e."""

    parts = (Part("up", (1,), torch.float32),)

    def read(self, layer, expert, into):
        into[0].fill_(10 * layer + expert)
        return 4

    def close(self):
        pass


class Told:
    """Fetches what is missing, and evicts what it is told to."""

    def __init__(self):
        self.evict = ()

    def init(self, sizes):
        return frozenset()

    def update(self, state, access):
        wanted = [(access.layer, expert) for expert in access.experts]
        held = state - set(self.evict)
        return held | set(wanted), Decision(tuple(self.evict), tuple(one for one in wanted if one not in held))


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize(
    ("evict", "asked"), [((), [2, 3]), (((0, 0), (0, 2)), [2, 3]), (((0, 1), (0, 5)), [2, 3]), (((0, 0),), [0, 2])]
)
def test_after_a_refusal_all_slots_are_there_and_each_is_one_experts(evict, asked, threads) -> None:
    policy = Told()
    cache = ExpertCache(Numbers(), CacheShape(1, 9, 3, shared=True), policy, threads=threads)
    for _ in range(4):
        policy.evict = ()
        with cache.turn():
            cache.take(0, [0, 1])
        policy.evict = evict
        with cache.turn(), pytest.raises(UsageError, match="the policy Told"):
            cache.take(0, asked)
    policy.evict = ()
    with cache.turn():
        slots = cache.take(0, [5, 6, 7])
        assert sorted(slots) == [0, 1, 2] and cache.stacks[0][slots].flatten().tolist() == [5.0, 6.0, 7.0]
    cache.close()
