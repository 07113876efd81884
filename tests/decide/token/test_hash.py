import pytest
import torch

from turnout.decide.token import Hash
from turnout.errors import UsageError


def routes(router: Hash, id_T: torch.Tensor) -> torch.Tensor:
    return router(torch.zeros(len(id_T), router.width), token_id_T=id_T).dense()


def test_the_id_alone_decides():
    router = Hash(4, 8, top_k=2)
    id_T = torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(0))
    dense_TE = routes(router, id_T)
    for one in range(50):
        rows = dense_TE[id_T == one]
        assert (rows == rows[:1]).all()
    backwards = routes(router, id_T.flip(0)).flip(0)
    assert torch.equal(dense_TE, backwards)
    x_TD = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(router(x_TD, token_id_T=id_T).dense(), dense_TE)


@pytest.mark.parametrize("num_experts", [1, 2, 6, 8, 12, 64, 97])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_a_vocabulary_spreads_evenly(num_experts, seed):
    """The load of 20,000 ids is that of independent draws: its chi-squared is within six of its own deviations."""
    count, top_k = 20_000, min(2, num_experts)
    router = Hash(4, num_experts, top_k=top_k, seed=seed)
    load_E = routes(router, torch.arange(count)).count_nonzero(0).double()
    mean = count * top_k / num_experts
    chi = float(((load_E - mean) ** 2 / mean).sum())
    freedom = num_experts - 1
    assert chi <= freedom + 6 * (2 * freedom) ** 0.5, (num_experts, seed, chi)


@pytest.mark.parametrize("num_experts", [1, 4, 6, 9, 10])
def test_the_experts_of_a_token_differ(num_experts):
    for top_k in range(1, num_experts + 1):
        router = Hash(4, num_experts, top_k=top_k)
        routing = router(torch.zeros(500, 4), token_id_T=torch.arange(500)).validate()
        assert (routing.dense().count_nonzero(1) == top_k).all()
        torch.testing.assert_close(routing.weight_R, torch.full((500 * top_k,), 1 / top_k))


def test_pairs_of_experts_are_not_always_the_same():
    router = Hash(4, 8, top_k=2)
    pairs = {tuple(row.nonzero().flatten().tolist()) for row in routes(router, torch.arange(5000))}
    assert len(pairs) >= 16  # 8 first experts, each with several partners


def test_another_seed_is_another_assignment():
    one, two = (routes(Hash(4, 8, seed=seed), torch.arange(4000)) for seed in (0, 1))
    assert float((one.argmax(1) == two.argmax(1)).float().mean()) == pytest.approx(1 / 8, abs=0.03)


@pytest.mark.parametrize("seed", [0, 3, -1, 2**40])
def test_the_assignment_is_that_of_plain_whole_numbers(seed):
    """A checkpoint of a hashed model works only while the assignment stays what it is."""

    def mixed(number: int) -> int:
        low = 0xFFFFFFFF
        h = (number + seed * 0x9E3779B1 + 0x2545F491) & low
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & low
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & low
        return h ^ (h >> 16)

    numbers = [0, 1, 2, 49_999, 2**31, 2**32 - 1]
    expected = [mixed(number) % 12 for number in numbers]
    assert routes(Hash(4, 12, seed=seed), torch.tensor(numbers)).argmax(1).tolist() == expected


@pytest.mark.parametrize("bad", [None, torch.zeros(3, dtype=torch.long), torch.zeros(2), torch.zeros(2, 1).long()])
def test_ids_are_needed(bad):
    with pytest.raises(UsageError, match="token_id_T"):
        Hash(4, 8)(torch.zeros(2, 4), token_id_T=bad)


def test_ids_of_any_whole_number_type():
    wide = routes(Hash(4, 8), torch.arange(100))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(routes(Hash(4, 8), torch.arange(100, dtype=dtype)), wide)


def test_it_holds_nothing():
    assert not list(Hash(4, 8, top_k=2).parameters()) and not Hash(4, 8, top_k=2).state_dict()
