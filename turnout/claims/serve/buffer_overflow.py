"""Claim: where experts take so many tokens and no more, others in a batch can change an answer; ours they cannot."""

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.decide.token import TopK
from turnout.layers import MoE
from turnout.models import LM, LMConfig, MoEConfig
from turnout.types import Routing, batch_invariant

__all__ = ["buffer_overflow"]

# A layer: 4 tokens of the victim, after 28 of others.
_WIDTH, _HIDDEN, _EXPERTS, _TOP_K = 32, 16, 8, 2
_VICTIM, _OTHERS, _SLACK = 4, 28, 2.0
_SEARCH, _BENIGN, _ORDERS, _AIM = 600, 40, 20, 0.3
# The same without a limit, wide enough that the usual products round otherwise in other batches.
_WIDE, _CROWDS = 128, (1, 3, 12, 28, 60)
# A model that adds two digits, "a + b =", modulo ten: rows of four ids, seven of others before the victim's.
_PLUS, _EQUALS, _IDS, _ROWS, _STEPS, _PROMPTS, _LM_SEARCH = 10, 11, 12, 7, 250, 8, 120
_OURS: float | None = None  # no limit


def buffer_overflow() -> Claim:
    """A random search over others' rows, against a layer and a trained model whose experts have a limit, and ours.

    >>> buffer_overflow().off
    'experts with a limit of capacity, kept by the earliest; products as usual'

    Source: Hayes, Shumailov & Yona, 2024, "Buffer Overflow in Mixture of Experts".
    """
    answers = "share of the model's right answers that turn wrong"
    moved, order = "the victim's relative change under attack", "the same attack in order"
    return Claim(
        name="buffer_overflow",
        statement="Rows made to fill experts of limited capacity change the answer to others in the batch, also where "
        "twice the capacity of an even load changes nothing by itself; dropless, in batch-invariant tiles, the answer "
        "does not move by a bit.",
        source="Hayes et al., 2024, Buffer Overflow in Mixture of Experts",
        off="experts with a limit of capacity, kept by the earliest; products as usual",
        switched={"ours": "attacked", "ours flipped": "flipped", "tiles": "usual"},
        rows=(
            Row(moved, "within", "ours", "attacked", "capacity of twice an even load", bound=0.0),
            Row(answers, "within", "ours flipped", "flipped", "capacity of twice an even load", bound=0.0),
            Row("share of batches in which a bit of the victim moves", "within", "tiles", "usual", "products as usual, "
                "no limit", bound=0.0),
            Row(answers, "below", "benign flipped", "flipped", "the same limit, others at random", headline=True),
            Row("what the change lacks to 0.3", "within", "lacks", "benign lacks", "others at random", bound=0.0,
                headline=True),
            Row("the victim's places at experts that are left", "below", "left", "benign left", "others at random",
                headline=True),
            Row(moved, "below", "shuffled", "attacked", f"{order}, random order", headline=True),
            Row(moved, "below", "slack", "attacked", f"{order}, four times an even load", headline=True),
            Row(moved, "below", "sampled", "attacked", f"{order}, experts drawn by their weights", headline=True),
        ),
        measure=_measure,
        seconds=30,
        note=f"{_EXPERTS} experts, top-{_TOP_K}, {_VICTIM} after {_OTHERS}; without attack it changes by at most "
        "{benign:.3f}. The model answers {right:.2f} of sums rightly, {benign flipped:.2f} change beside "
        "rows at random",
    )  # fmt: skip


def _measure(seed: int) -> Values:
    return {**_on_layer(seed), **_by_rounding(seed), **_on_model(seed)}


# ---- a layer


def _layer(seed: int, width: int = _WIDTH, hidden: int = _HIDDEN) -> MoE:
    chance = torch.Generator().manual_seed(seed)
    router = TopK(width, _EXPERTS, top_k=_TOP_K, priority="position", std=width**-0.5, generator=chance)
    # Directions at right angles and of one length: an even load, as a trained router has.
    router.weight.data.copy_(torch.linalg.qr(router.weight.data.t())[0].t())
    return MoE(width, hidden, _EXPERTS, router=router, std=width**-0.5, generator=chance).eval()


def _limited(layer: MoE, x_TD: Tensor, slack: float | None, draw: torch.Generator | None = None) -> Tensor:
    """(T, D) with experts that take ``slack`` times an even load; with ``draw`` experts are drawn by their weights."""
    routing = _routed(layer, x_TD, draw)
    if slack is not None:
        routing = routing.truncate(int(slack * len(x_TD) * _TOP_K / _EXPERTS), priority="position")
    return layer(x_TD, routing=routing).output


def _routed(layer: MoE, x_TD: Tensor, draw: torch.Generator | None) -> Routing:
    routing = layer.route(x_TD)
    if draw is None or routing.score_TE is None:
        return routing
    index_TK = torch.multinomial(routing.score_TE, _TOP_K, generator=draw)
    weight_TK = routing.score_TE.gather(1, index_TK)
    return Routing.from_topk(index_TK, weight_TK / weight_TK.sum(1, keepdim=True), num_experts=_EXPERTS)


def _apart(y: Tensor, right: Tensor) -> float:
    return float((y - right).norm() / right.norm())


@torch.no_grad()
def _on_layer(seed: int) -> Values:
    layer, chance = _layer(seed), torch.Generator().manual_seed(seed + 1000)
    victim = torch.randn(_VICTIM, _WIDTH, generator=chance)
    benign = [torch.randn(_OTHERS, _WIDTH, generator=chance) for _ in range(_BENIGN)]
    bad = _found(layer, victim, chance)

    def change(others: Tensor, slack: float | None = _SLACK) -> float:
        x_TD = torch.cat((others, victim))
        return _apart(_limited(layer, x_TD, slack)[-_VICTIM:], _limited(layer, x_TD, None)[-_VICTIM:])

    values = {
        "attacked": change(bad),
        "benign": max(map(change, benign)),
        "left": 1 - _denied(layer, bad, victim),
        "benign left": 1 - max(_denied(layer, others, victim) for others in benign),
        "slack": change(bad, 2 * _SLACK),
        "shuffled": _shuffled(layer, bad, victim, chance),
        "sampled": _sampled(layer, bad, victim, seed),
        "ours": _ours(layer, bad, victim),
    }
    short = {name: max(0.0, _AIM - values[of]) for name, of in (("lacks", "attacked"), ("benign lacks", "benign"))}
    return values | short


def _found(layer: MoE, victim: Tensor, chance: torch.Generator) -> Tensor:
    """Rows that fill the experts which the victim needs most, by random search: one is replaced where no less is full.

    That is what whoever has the router can count; as many experts as the rows are enough for.
    """
    need_E = layer.route(victim).dense().sum(0)
    most = int(_SLACK * (_VICTIM + _OTHERS) * _TOP_K / _EXPERTS)
    wanted_E = torch.zeros(_EXPERTS).index_fill(0, need_E.topk(_OTHERS * _TOP_K // most).indices, 1)

    def filled(others: Tensor) -> float:
        return float((layer.route(others).load_E.clamp(max=most) * wanted_E).sum())

    best = torch.randn(_OTHERS, _WIDTH, generator=chance)
    score = filled(best)
    for _ in range(_SEARCH):
        tried = best.clone()
        tried[int(torch.randint(_OTHERS, (1,), generator=chance))] = torch.randn(_WIDTH, generator=chance)
        found = filled(tried)
        best, score = (tried, found) if found >= score else (best, score)
    return best


def _denied(layer: MoE, others: Tensor, victim: Tensor) -> float:
    """The share of the victim's places at experts that the others took."""
    x_TD = torch.cat((others, victim))
    kept = layer.route(x_TD).truncate(int(_SLACK * len(x_TD) * _TOP_K / _EXPERTS), priority="position")
    return 1 - float((kept.token_R >= _OTHERS).sum()) / (_VICTIM * _TOP_K)


def _shuffled(layer: MoE, others: Tensor, victim: Tensor, chance: torch.Generator) -> float:
    """The mean change where the batch's rows stand in random order."""
    x_TD, found = torch.cat((others, victim)), []
    for _ in range(_ORDERS):
        order_T = torch.randperm(len(x_TD), generator=chance)
        at_V = torch.cat([(order_T == _OTHERS + v).nonzero()[0] for v in range(_VICTIM)])
        right = _limited(layer, x_TD[order_T], None)[at_V]
        found.append(_apart(_limited(layer, x_TD[order_T], _SLACK)[at_V], right))
    return sum(found) / len(found)


def _sampled(layer: MoE, others: Tensor, victim: Tensor, seed: int) -> float:
    """The mean change by the limit where experts are drawn: held against the same draws without a limit."""
    x_TD, found = torch.cat((others, victim)), []
    for draw in range(_ORDERS):
        same = [torch.Generator().manual_seed(seed * _ORDERS + draw) for _ in range(2)]
        limited, right = (_limited(layer, x_TD, slack, one) for slack, one in zip((_SLACK, None), same, strict=True))
        found.append(_apart(limited[-_VICTIM:], right[-_VICTIM:]))
    return sum(found) / len(found)


def _ours(layer: MoE, others: Tensor, victim: Tensor) -> float:
    """The change from the victim alone to the victim after the others, in batch-invariant tiles without a limit."""
    with batch_invariant():
        alone = _limited(layer, victim, None)
        return _apart(_limited(layer, torch.cat((others, victim)), _OURS)[-_VICTIM:], alone)


@torch.no_grad()
def _by_rounding(seed: int) -> Values:
    """In how many batches, of no ill will and without a limit, the victim is not what it is alone, to the bit."""
    layer, chance = _layer(seed, _WIDE, _WIDE), torch.Generator().manual_seed(seed + 3000)
    victim = torch.randn(_VICTIM, _WIDE, generator=chance)
    batches = [torch.cat((torch.randn(others, _WIDE, generator=chance), victim)) for others in _CROWDS]

    def moved() -> float:
        alone = layer(victim).output
        return sum(not torch.equal(layer(x_TD).output[-_VICTIM:], alone) for x_TD in batches) / len(batches)

    with batch_invariant():
        tiles = moved()
    return {"tiles": tiles, "usual": moved()}


# ---- a model


def _taught(seed: int) -> LM:
    """A model of two routed layers that has learnt to add two digits, without any limit."""
    moe = MoEConfig(_EXPERTS, _TOP_K, 2 * _HIDDEN, router_options={"priority": "position"})
    lm = LM(LMConfig(vocab_size=_IDS, width=64, layers=2, heads=4, max_seq=8, moe=moe, init_std=0.05), seed=seed)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, weight_decay=0.0)
    id_BS = _sums()
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / _STEPS)
        loss = F.cross_entropy(lm(id_BS).logits_BSV[:, -1], _answers(id_BS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lm.eval()


def _sums() -> Tensor:
    """(100, 4) all of "a + b ="."""
    a, b = torch.arange(100) // 10, torch.arange(100) % 10
    return torch.stack((a, torch.full_like(a, _PLUS), b, torch.full_like(a, _EQUALS)), 1)


def _answers(id_BS: Tensor) -> Tensor:
    return (id_BS[:, 0] + id_BS[:, 2]) % 10


@contextlib.contextmanager
def _capacity(lm: LM, slack: float | None):
    """The model with experts that take so many times an even load, as the paper puts it into Mixtral."""
    for router in lm.routers:
        router.capacity_factor = slack  # pyrefly: ignore[bad-argument-type]
    yield
    for router in lm.routers:
        router.capacity_factor = None  # pyrefly: ignore[bad-argument-type]


def _on_model(seed: int) -> Values:
    lm = _taught(seed)
    with torch.no_grad():
        return _attacked(lm, seed)


def _attacked(lm: LM, seed: int) -> Values:
    chance = torch.Generator().manual_seed(seed + 2000)
    id_BS = _sums()
    right_B = lm(id_BS).logits_BSV[:, -1].argmax(-1) == _answers(id_BS)
    known = id_BS[right_B]
    victims = known[torch.randperm(len(known), generator=chance)[:_PROMPTS]]
    flipped = benign = ours = 0
    for victim in victims.split(1):
        with _capacity(lm, _SLACK):
            others = torch.randint(_IDS, (_ROWS, 4), generator=chance)
            benign += _wrong(_margin(lm, others, victim))
            bad = _attack(lm, victim, chance)
            flipped += _wrong(_margin(lm, bad, victim))
        with batch_invariant(), _capacity(lm, _OURS):
            ours += _wrong(_margin(lm, bad, victim))
    shares = {"flipped": flipped, "benign flipped": benign, "ours flipped": ours}
    return {name: count / len(victims) for name, count in shares.items()} | {"right": float(right_B.float().mean())}


def _margin(lm: LM, others: Tensor, victim: Tensor) -> float:
    """How far the right answer's logit is above the highest wrong one, of the victim after the others."""
    logit_V = lm(torch.cat((others, victim))).logits_BSV[-1, -1].clone()
    answer = int(_answers(victim))
    right = float(logit_V[answer])
    logit_V[answer] = -torch.inf
    return right - float(logit_V.max())


def _wrong(margin: float) -> bool:
    return margin <= 0


def _attack(lm: LM, victim: Tensor, chance: torch.Generator) -> Tensor:
    """Others' ids by random search: one is replaced where the right answer's lead gets no larger."""
    best = torch.randint(_IDS, (_ROWS, 4), generator=chance)
    lead = _margin(lm, best, victim)
    for _ in range(_LM_SEARCH):
        if _wrong(lead):
            break
        tried = best.clone()
        row, place, new = (int(torch.randint(most, (1,), generator=chance)) for most in (_ROWS, 4, _IDS))
        tried[row, place] = new
        found = _margin(lm, tried, victim)
        best, lead = (tried, found) if found <= lead else (best, lead)
    return best
