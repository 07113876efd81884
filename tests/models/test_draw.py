"""How a token is drawn: transformers' own processors are the judges, on random scores with ties."""

import itertools
import math
import warnings

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from turnout.errors import UsageError
from turnout.models import Drawing
from turnout.models.draw import chances

SETTINGS = list(
    itertools.product((1.0, 0.7, 3.0), (None, 1, 5, 4000), (None, 0.0, 0.3, 0.9, 1.0), (None, 0.0, 0.2, 1.0), (1, 1.3))
)


def theirs(settings: tuple, prompt_BS: torch.Tensor, score_BV: torch.Tensor) -> torch.Tensor:
    """In the order of ``GenerationMixin._get_logits_processor``."""
    temperature, top_k, top_p, min_p, penalty = settings
    found = LogitsProcessorList()
    if penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    if temperature != 1:
        found.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        found.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        found.append(MinPLogitsWarper(min_p))
    return found(prompt_BS, score_BV.clone())


def seen(prompt_BS: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return torch.zeros(len(prompt_BS), vocab_size, dtype=torch.bool).scatter_(1, prompt_BS, True)


@pytest.mark.parametrize("vocab_size", [7, 300])
def test_scores_are_processed_as_transformers_does(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    score_BV = torch.randn(6, vocab_size, generator=generator) * 3
    prompt_BS = torch.randint(vocab_size, (6, 9), generator=generator)
    for settings in SETTINGS:
        got = Drawing(*settings).processed(score_BV, seen(prompt_BS, vocab_size))
        torch.testing.assert_close(got, theirs(settings, prompt_BS, score_BV))


def test_ties_at_the_border_of_top_k_stay_as_there() -> None:
    score_BV = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    for settings in [(1.0, 2, None, None, 1), (1.0, 2, None, 0.5, 1), (0.5, 3, 1.0, None, 1)]:
        assert torch.equal(Drawing(*settings).processed(score_BV), theirs(settings, None, score_BV)), settings


def test_a_large_vocabulary_is_processed_as_a_small_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 8.0):  # flat, so that many are needed; peaked, so that few are
        score_BV = torch.randn(3, 5000, generator=generator) * spread
        for settings in [(1.0, None, 0.9, None, 1), (0.8, None, 0.2, 0.1, 1), (1.0, 30, 0.8, None, 1)]:
            torch.testing.assert_close(Drawing(*settings).processed(score_BV), theirs(settings, None, score_BV))


def test_ties_at_the_border_of_top_p_stay_by_their_ids() -> None:
    score_BV = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, -9.0]])
    kept = [
        Drawing(top_p=top_p).processed(score_BV)[0].isfinite().nonzero()[:, 0].tolist() for top_p in (0.1, 0.5, 0.9)
    ]
    assert kept == [[1], [1, 2, 3], [1, 2, 3, 4]]
    assert Drawing(top_k=2, top_p=0.6).processed(score_BV)[0].isfinite().sum() == 3  # ties with the second all count


def test_tokens_are_drawn_by_their_share() -> None:
    generator = torch.Generator().manual_seed(3)
    score_BV = torch.randn(2, 40, generator=generator) * 2
    chance_N = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000  # every chance once: no luck in it
    for settings in [(1.0, None, None, None, 1), (0.7, 9, 0.8, 0.05, 1), (1.0, None, 0.5, None, 1)]:
        drawing = Drawing(*settings)
        for score_V in score_BV:
            drawn = drawing.pick(score_V.expand(20000, -1), chance_N)
            share_V = torch.bincount(drawn, minlength=40) / 20000
            torch.testing.assert_close(share_V, drawing.processed(score_V[None]).softmax(1)[0], atol=1e-4, rtol=0)


def test_no_token_without_a_share_is_drawn() -> None:
    score_BV = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(3, -1)
    chance_B = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    assert Drawing().pick(score_BV, chance_B).tolist() == [1, 3, 3]
    assert Drawing(top_p=0.0).pick(score_BV, chance_B).tolist() == [3, 3, 3]


def test_bias_and_penalties_are_those_of_openai_in_the_order_of_vllm() -> None:
    chance = torch.Generator().manual_seed(3)
    score_BV = torch.randn(3, 11, generator=chance) * 2
    drawn_BV = torch.randint(3, (3, 11), generator=chance)
    seen_BV = torch.rand(3, 11, generator=chance) < 0.5
    drawing = Drawing(0.7, None, None, None, 1.3, 0.4, -0.25, {2: -100, 9: 1.5})
    want_BV = score_BV.clone()
    for row, token in itertools.product(range(3), range(11)):
        score = score_BV[row, token] + {2: -100, 9: 1.5}.get(token, 0)
        if seen_BV[row, token]:
            score = score * 1.3 if score < 0 else score / 1.3
        count = int(drawn_BV[row, token])
        want_BV[row, token] = (score - count * 0.4 - (count > 0) * -0.25) / 0.7
    torch.testing.assert_close(drawing.processed(score_BV, seen_BV, drawn_BV), want_BV)
    assert Drawing(0, logit_bias={4: 100}).pick(score_BV, torch.zeros(3)).tolist() == [4, 4, 4]
    assert not Drawing(0, logit_bias={4: 1}).is_plain and not Drawing(0, presence_penalty=1).is_plain
    assert Drawing(0).is_plain and Drawing(0, logit_bias={}).is_plain
    most = Drawing(0, frequency_penalty=1e308, logit_bias={4: 1e308, 5: -1e308})
    assert bool(most.processed(score_BV, None, drawn_BV).isfinite().all())


def test_the_likeliest_is_taken_at_temperature_0_whatever_the_chance() -> None:
    score_BV = torch.tensor([[3.0, -1.0, 2.9]])
    assert Drawing(0).pick(score_BV, torch.zeros(1)).tolist() == [0]
    assert Drawing(0, repetition_penalty=2).pick(score_BV, torch.zeros(1), seen(torch.tensor([[0]]), 3)).tolist() == [2]
    assert Drawing(top_k=1).pick(score_BV, torch.ones(1) * 0.99).tolist() == [0]


def test_half_precision_scores_are_drawn_in_single() -> None:
    score_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    chance_B = torch.rand(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drawing = Drawing(0.9, 20, 0.9, 0.01, 1.2)
    at = seen(torch.arange(40).reshape(4, 10), 50)
    assert torch.equal(drawing.pick(score_BV, chance_B, at), drawing.pick(score_BV.float(), chance_B, at))


def test_chances_belong_to_the_prompt_and_the_seed() -> None:
    prompts = [[1, 2], [3], [1, 2], [1]]
    together = chances(prompts, 6, seed=4)
    assert together.shape == (4, 6) and bool(((together >= 0) & (together < 1)).all())
    assert len({tuple(row) for row in together.tolist()}) == 4
    for row in (0, 1, 3):
        assert torch.equal(together[row], chances([prompts[row]], 6, seed=4)[0])
    assert torch.equal(chances([[1, 2], [1, 2]], 6, seed=4)[1], together[2])
    assert torch.equal(together[:, :3], chances(prompts, 3, seed=4))
    assert not torch.equal(together, chances(prompts, 6, seed=5))
    assert chances([[1]], 2, seed=-1).shape == (1, 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1}, "temperature must be a finite number of at least 0"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "0.7"}, "temperature"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 1.1}, "top_p must be a number from 0 to 1"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": math.nan}, "min_p must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be a finite number"),
        ({"presence_penalty": "1"}, "presence_penalty must be a finite number"),
        ({"logit_bias": [1]}, "logit_bias must be finite numbers by token ids"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        Drawing(**settings)
    assert "Nearest fix: pass" in str(caught.value)


def test_settings_without_effect_are_told() -> None:
    with pytest.warns(UserWarning, match="top_p and min_p have no effect at temperature 0"):
        Drawing(0, top_p=0.9, min_p=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Drawing(0, top_k=1)
        Drawing(0, repetition_penalty=1.2)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e300])
@pytest.mark.parametrize("penalty", [5e-324, 1.0, 1e300])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_settings_at_their_ends_draw_as_their_limits_do(temperature: float, penalty: float, settings: dict) -> None:
    """Found by a fuzzer of the server: scores became infinite, and the token drawn one behind the vocabulary."""
    score_BV = torch.tensor([[1.0, -2.0, 0.0, 5.0, -math.inf], [3.0, 2.0, 1.0, 0.0, -math.inf]])
    seen_BV = torch.tensor([[True, True, True, False, True]] * 2)
    drawing = Drawing(temperature, repetition_penalty=penalty, **settings)
    for chance in (0.0, 0.5, 1 - 1e-9):
        picked_B = drawing.pick(score_BV, torch.tensor([chance, chance], dtype=torch.float64), seen_BV)
        assert bool((picked_B < 4).all()), "a token of no share"
        if temperature < 1 and penalty == 1:
            assert picked_B.tolist() == [3, 0]
        if temperature < 1 and penalty < 1:
            assert picked_B.tolist() == [0, 0]
        if temperature < 1 and penalty > 1:
            assert picked_B[0] == 3  # in the other row both settings meet
    assert not bool(drawing.processed(score_BV, seen_BV).isnan().any())
