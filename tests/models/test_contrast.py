"""Self-contrast: strong and weak scores in one batch are those of two models, on both paths; nothing else changes."""

import copy
import dataclasses
import math

import pytest
import torch
from variants import ROUTED, TINY, VARIANTS, ids, make

import turnout
from turnout.decide.token import NoisyTopK
from turnout.errors import UsageError
from turnout.layers import MoE
from turnout.models import LM, Contrast, MoEConfig
from turnout.models.decoding import Contrasted, Decoder
from turnout.types import Routing

KINDS = [name for name, fields in VARIANTS.items() if fields.get("moe") is not None and name != "hash"]


def weak_twin(lm: LM, rank: int) -> LM:
    """The model whose every token takes its expert of this rank: in the top ``rank``, and not in the top before it."""
    twin = copy.deepcopy(lm)
    for module in twin.modules():
        if isinstance(module, MoE):
            module.router.forward = _rank_alone(module.router, type(module.router).forward, rank)
    return twin


def _rank_alone(router, forward, rank: int):
    def alone(x_TD, *, token_id_T=None, generator=None) -> Routing:
        among_TE = _pattern(router, forward, x_TD, rank)
        among_TE &= ~(_pattern(router, forward, x_TD, rank - 1) if rank > 1 else torch.zeros_like(among_TE))
        weight_TE = router.scored(x_TD)[1]
        if getattr(router, "renormalize", False):
            weight_TE = torch.ones_like(weight_TE)
        return Routing.from_dense(weight_TE * getattr(router, "scale", 1.0), mask_TE=among_TE)

    return alone


def _pattern(router, forward, x_TD, count: int) -> torch.Tensor:
    before, router.top_k = router.top_k, count
    try:
        return forward(router, x_TD).dense() > 0
    finally:
        router.top_k = before


@pytest.mark.parametrize("compiled", ["1", "0"])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_both_scores_are_those_of_two_models(name: str, rank: int, compiled: str, monkeypatch) -> None:
    monkeypatch.setenv("TURNOUT_COMPILED", compiled)
    lm, id_BS, contrast = make(name), ids(3, 14), Contrast(beta=0.7, alpha=0.05, rank=rank)
    lengths, weak = [9, 4, 7], weak_twin(lm, rank)
    steps = Contrasted(lm, 3, 4, contrast)
    found = [steps.prefill(id_BS[:, :9], torch.tensor(lengths)).clone()]
    found += [steps.step(id_B).clone() for id_B in id_BS[:, 9:].T]
    for row, length in enumerate(lengths):
        text_T = torch.cat([id_BS[row, :length], id_BS[row, 9:]])[None]
        strong_TV, weak_TV = (each(text_T).logits_BSV[0, length - 1 :] for each in (lm, weak))
        want_TV = 1.7 * strong_TV - 0.7 * weak_TV
        want_TV[strong_TV < strong_TV.amax(1, keepdim=True) + math.log(0.05)] = -math.inf
        torch.testing.assert_close(torch.stack(found)[:, row], want_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["moe", "groups", "gpt-oss"])
@torch.no_grad()
def test_rows_as_ever_have_the_bits_that_they_have_alone(name: str, compiled) -> None:
    lm, id_BS = make(name), ids(2, 12)
    both, alone = Decoder(lm, 2, 4, rank_B=torch.tensor([0, 3])), Decoder(lm, 1, 4)
    found, want = both.prefill(id_BS[:, :5]), alone.prefill(id_BS[:1, :5])
    for id_B in id_BS[:, 5:].T:
        assert torch.equal(found[0], want[0])
        found, want = both.step(id_B), alone.step(id_B[:1])
    both.keep(torch.tensor([1]))
    assert not torch.equal(both.step(id_BS[:1, 0])[0], alone.step(id_BS[:1, 0])[0])


@pytest.mark.parametrize("name", ["moe", "groups"])
def test_nothing_to_contrast_is_the_model_itself(name: str) -> None:
    lm, id_BS = make(name), ids(2, 4)
    for how in ({"temperature": 0}, {"seed": 0}, {"seed": 0, "top_p": 0.9}):
        plain = turnout.generate(lm, id_BS, tokens=6, logprobs=True, **how)
        none = turnout.generate(lm, id_BS, tokens=6, logprobs=True, contrast=Contrast(beta=0), **how)
        some = turnout.generate(lm, id_BS, tokens=6, logprobs=True, contrast=Contrast(beta=2), **how)
        assert plain.rows == none.rows and torch.equal(plain.logprob_BN, none.logprob_BN)
        assert not torch.equal(plain.logprob_BN, some.logprob_BN)
    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)), torch.randn(2, 9)
    assert torch.equal(Contrast(beta=0).scores(*scores), scores[0])


def test_greedy_text_is_that_of_two_models(compiled) -> None:
    lm, prompt, contrast = make("moe"), [3, 1, 4, 1, 5], Contrast(beta=1.5, rank=3)
    weak, text = weak_twin(lm, 3), torch.tensor([prompt])
    for _ in range(12):
        with torch.no_grad():
            scores = contrast.scores(*(each(text).logits_BSV[:, -1] for each in (lm, weak)))
        text = torch.cat([text, scores.argmax(1, keepdim=True)], 1)
    prompts = [[7, 7], prompt, [2]]
    made = turnout.generate(lm, prompts, tokens=12, temperature=0, contrast=contrast)
    assert made.rows[1] == text[0, 5:].tolist()
    assert made.rows[1] != turnout.generate(lm, [prompt], tokens=12, temperature=0).rows[0]


def test_rows_that_end_leave_the_others_as_they_are() -> None:
    lm, prompts, contrast = make("moe"), [[3, 1, 4], [1, 5], [9, 2, 6]], Contrast(beta=1.0)
    how = {"tokens": 16, "temperature": 0, "contrast": contrast}
    alone = [turnout.generate(lm, [prompt], eos=[7, 20, 33, 41], **how).rows[0] for prompt in prompts]
    assert len(set(map(len, alone))) > 1, "let one end before the others"
    assert list(turnout.generate(lm, prompts, eos=[7, 20, 33, 41], **how).rows) == alone


def test_packed_and_merged_experts() -> None:
    merged = make("moe")
    config = dataclasses.replace(TINY, moe=dataclasses.replace(ROUTED, distinct=(3, 4)), init_std=0.2)
    for lm in (LM(config, seed=1).eval(), turnout.reshape.quantize(merged, bits=8, group=8)[0]):
        id_BS, weak = ids(1, 10), weak_twin(lm, 3)
        steps = Contrasted(lm, 1, 4, Contrast(beta=1, alpha=1e-9, rank=3))
        steps.prefill(id_BS[:, :9])
        with torch.no_grad():
            want_BV = 2 * lm(id_BS).logits_BSV[:, -1] - weak(id_BS).logits_BSV[:, -1]
        torch.testing.assert_close(steps.step(id_BS[:, 9]), want_BV, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("lm", "rank", "said"),
    [
        ("dense", 2, "one without routed layers"),
        ("hash", 2, "the router must choose for each token by its own scores.*got Hash"),
        ("moe", 6, "rank must be at most 5"),
        ("groups", 5, "rank must be at most 4"),
    ],
)
def test_what_it_cannot_contrast_is_named(lm: str, rank: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        turnout.generate(make(lm), ids(1, 3), tokens=1, contrast=Contrast(rank=rank))


def test_a_router_that_limits_experts_is_named() -> None:
    lm = make("moe")
    lm.blocks[0].ff.router.capacity_factor = 1.0
    with pytest.raises(UsageError, match="which limits what an expert takes"):
        turnout.generate(lm, ids(1, 3), tokens=1, contrast=Contrast())
    assert not hasattr(NoisyTopK, "chosen")
    moe = MoEConfig(4, 2, 8, router="NoisyTopK")
    with pytest.raises(UsageError, match="got NoisyTopK"):
        Contrast().check(LM(dataclasses.replace(TINY, moe=moe)).eval())


@pytest.mark.parametrize("wrong", [{"beta": -1}, {"beta": math.inf}, {"alpha": 0}, {"alpha": 2}, {"rank": 0}])
def test_values_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} must be"):
        Contrast(**wrong)


@pytest.mark.parametrize("wrong", [torch.tensor([0]), torch.tensor([0, -1]), torch.tensor([0.0, 1.0])])
def test_ranks_that_are_none_are_named(wrong: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="rank_B must be 2 int64"):
        Decoder(make("moe"), 2, 4, rank_B=wrong)
