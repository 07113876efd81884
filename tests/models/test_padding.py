"""Padding takes no part: a text is read, routed and gone on with as it is alone, wherever its padding stands."""

import dataclasses

import pytest
import torch
from test_lm import TINY, VARIANTS, make

from turnout.errors import ShapeError, UsageError
from turnout.models import LM, Cache, MoEConfig
from turnout.train.balance import load_balance_loss, router_z_loss

LENGTHS = (3, 9, 6)
# Every router that a language model can have, with a capacity where it takes one.
ROUTERS = {
    "TopK": {"capacity_factor": 0.8, "priority": "position"},
    "TopK by weight": {"capacity_factor": 0.8},
    "Switch": {"capacity_factor": 1.0, "jitter": 0.3},
    "GShard": {"capacity_factor": 0.7},
    "NoisyTopK": {"capacity_factor": 0.9},
    "LossFree": {"capacity_factor": 0.8},
    "GroupLimited": {"num_groups": 2, "capacity_factor": 0.9},
    "ExpertChoice": {"capacity_factor": 1.3},
    "DenseToSparse": {"start": 2.0, "threshold": 0.1},
    "Hash": {"capacity_factor": 0.8},
    "Arrow": {},
    "PHATGOOSE": {},
    "FedJETs": {},
    "PreGate": {"width": 16, "layers": 1, "heads": 2, "max_seq": 48},
}


def ids(*lengths: int, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 61, (length,), generator=generator) for length in lengths]


def padded(texts: list[torch.Tensor], side: str, extra: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padding at the named side, or in holes."""
    width = max(map(len, texts)) + extra
    id_BS, mask_BS = torch.full((len(texts), width), 7), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        at = torch.arange(len(text))
        at = {"right": at, "left": at + width - len(text), "holes": (at * width) // max(len(text), 1)}[side]
        id_BS[row, at], mask_BS[row, at] = text, 1
    return id_BS, mask_BS


def routed(router: str, top_k: int = 2) -> LM:
    name = router.partition(" ")[0]
    moe = MoEConfig(4, 1 if name == "Switch" else top_k, 16, router=name, router_options=ROUTERS[router])
    return LM(dataclasses.replace(TINY, init_std=0.3, moe=moe), seed=1)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("name", VARIANTS)
def test_each_text_is_read_as_alone(name: str, side: str) -> None:
    lm, texts = make(name), ids(*LENGTHS)
    id_BS, mask_BS = padded(texts, side)
    logits_BSV = lm(id_BS, attention_mask=mask_BS).logits_BSV
    assert bool(logits_BSV.isfinite().all())
    for row, text in enumerate(texts):
        alone_SV = lm(text[None]).logits_BSV[0]
        torch.testing.assert_close(logits_BSV[row, mask_BS[row].bool()], alone_SV, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_routing_of_tokens_is_the_same_with_padding(router: str, training: bool, side: str) -> None:
    lm, (text,) = routed(router).train(training), ids(13)
    alone = lm(text[None], generator=torch.Generator().manual_seed(5))
    id_BS, mask_BS = padded([text], side, extra=24)
    many = lm(id_BS, attention_mask=mask_BS, generator=torch.Generator().manual_seed(5))
    real_T = mask_BS.flatten().bool()
    for one, two in zip(alone.routings, many.routings, strict=True):
        two.validate()
        torch.testing.assert_close(two.dense()[real_T], one.dense(), atol=1e-5, rtol=1e-4)
        assert torch.equal(two.load_E, one.load_E) and torch.equal(two.dropped_E, one.dropped_E)
        assert two.num_real == one.num_real == 13 and not two.dense()[~real_T].any()
        if one.score_TE is not None:
            for loss in (load_balance_loss, router_z_loss):
                torch.testing.assert_close(loss(two), loss(one), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(many.logits_BSV[0, mask_BS[0].bool()], alone.logits_BSV[0], atol=2e-5, rtol=1e-4)


def test_lengths_say_the_same_as_a_mask() -> None:
    lm, texts = make("moe"), ids(*LENGTHS)
    id_BS, mask_BS = padded(texts, "right")
    by_length = lm(id_BS, attention_mask=torch.tensor(LENGTHS)).logits_BSV
    assert torch.equal(by_length, lm(id_BS, attention_mask=mask_BS.bool()).logits_BSV)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients_are_those_of_the_texts(side: str) -> None:
    lm, texts = make("moe").train(), ids(*LENGTHS)
    id_BS, mask_BS = padded(texts, side)
    done = lm.loss(id_BS[:, :-1], id_BS[:, 1:], attention_mask=mask_BS[:, :-1] * mask_BS[:, 1:])
    together = torch.autograd.grad(done.nats, list(lm.parameters()))
    nats = torch.stack([lm.loss(text[None, :-1], text[None, 1:]).nats for text in texts]).sum()
    torch.testing.assert_close(done.nats, nats)
    for one, two in zip(together, torch.autograd.grad(nats, list(lm.parameters())), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_what_comes_after_padding_is_not_a_target() -> None:
    lm, (text,) = make("dense"), ids(6)
    id_BS, mask_BS = padded([text], "left", extra=3)
    nats = lm.loss(id_BS[:, :-1], id_BS[:, 1:], attention_mask=mask_BS[:, :-1]).nats
    torch.testing.assert_close(nats, lm.loss(text[None, :-1], text[None, 1:]).nats)


@pytest.mark.parametrize("name", ["dense", "window", "sinks", "latent", "moe", "gpt-oss"])
def test_prompts_of_different_lengths_go_on_as_alone(name: str) -> None:
    lm, texts = make(name), ids(*LENGTHS)
    id_BS, mask_BS = padded(texts, "left", extra=1)
    together = lm.generate(id_BS, tokens=8, temperature=0, attention_mask=mask_BS)
    for row, text in enumerate(texts):
        alone = lm.generate(text[None], tokens=8, temperature=0)
        assert together[row, -8:].tolist() == alone[0, -8:].tolist()


def test_the_pre_gate_goes_on_as_alone() -> None:
    lm, texts = routed("PreGate", top_k=1).eval(), ids(*LENGTHS)
    id_BS, mask_BS = padded(texts, "left")
    together = lm.generate(id_BS, tokens=5, temperature=0, attention_mask=mask_BS)[:, -5:]
    alone = torch.cat([lm.generate(text[None], tokens=5, temperature=0)[:, -5:] for text in texts])
    assert torch.equal(together, alone)
    assert lm.route(id_BS, attention_mask=mask_BS)[0].num_real == sum(LENGTHS)


@torch.no_grad()
def test_a_cache_remembers_what_was_padding() -> None:
    lm, texts = make("window"), ids(*LENGTHS)
    id_BS, mask_BS = padded(texts, "right")
    more = torch.stack(ids(4, 4, 4, seed=9))
    for mask in (None, torch.ones(3, 4), torch.cat((mask_BS, torch.ones(3, 4).long()), 1)):
        cache = Cache()
        lm(id_BS, cache=cache, attention_mask=mask_BS)
        logits_BSV = lm(more, cache=cache, attention_mask=mask).logits_BSV
        for row, text in enumerate(texts):
            alone_SV = lm(torch.cat((text, more[row]))[None]).logits_BSV[0, -4:]
            torch.testing.assert_close(logits_BSV[row], alone_SV, atol=2e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="cached positions"):
        lm(more[:, :1], cache=cache, attention_mask=torch.ones(3, cache.length + 1))


def test_a_row_of_nothing_but_padding_harms_nobody() -> None:
    lm, (text,) = make("moe"), ids(5)
    id_BS, mask_BS = padded([text, text[:0]], "left")
    logits_BSV = lm(id_BS, attention_mask=mask_BS).logits_BSV
    assert bool(logits_BSV.isfinite().all())
    torch.testing.assert_close(logits_BSV[0, -5:], lm(text[None]).logits_BSV[0], atol=2e-5, rtol=1e-4)


def test_masks_that_do_not_fit_are_refused() -> None:
    lm, id_BS = make("dense"), torch.ones(2, 5, dtype=torch.long)
    for mask in (torch.ones(2, 4), torch.ones(3, 5), torch.ones(2, 1, 5, 5), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(ShapeError, match="attention_mask"):
            lm(id_BS, attention_mask=mask)
    for mask in (torch.full((2, 5), 2), torch.tensor([5, 6]), torch.full((2, 5), -1e9)):
        with pytest.raises(UsageError, match="attention_mask"):
            lm(id_BS, attention_mask=mask)
    with pytest.raises(UsageError, match="on the left"):
        lm.generate(id_BS, tokens=1, attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]))
