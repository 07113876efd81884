"""Claim: asked to, a router of images says much about their class, and uses all blocks."""

import torch
from torch import Tensor, nn

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.digits import CLASSES, LOOKS, SIDE, digits
from turnout.decide.token import CIGT
from turnout.decide.token.cigt import information_gain
from turnout.layers import MoE, given

_WIDTH, _BLOCKS, _HIDDEN, _STEPS, _BATCH, _TEST = 24, 4, 12, 400, 128, 2000


def information_routes() -> Claim:
    """What a block says of the class, in nats lacking to all there is, how uneven blocks are, and the errors.

    >>> information_routes().off
    'nothing is asked of the router'

    Source: Bicici & Akarun, 2024, "Conditional Information Gain Trellis", figures 4 and 5, table 1.
    """
    return Claim(
        name="information_routes",
        statement="A router that is asked for information about the class tells more of it than one that is not.",
        source="Bicici & Akarun, 2024, Conditional Information Gain Trellis",
        off="nothing is asked of the router",
        switched={"lacking": "lacking, none"},
        rows=(
            Row("nats that the block lacks of log 4", "below", "lacking", "lacking, none", "nothing is asked"),
            Row("held-out errors", "below", "errors", "errors, none", "nothing is asked", headline=True),
            Row("held-out errors", "below", "errors", "thin", "one block for all", headline=True),
        ),
        measure=_measure,
        seconds=20,
        note=f"drawn digits, a map to {_WIDTH}, then {_BLOCKS} blocks of {_HIDDEN} units, {_STEPS} steps of {_BATCH}",
    )


def _measure(seed: int) -> Values:
    asked, none, thin = _run(seed, _BLOCKS, 1.0), _run(seed, _BLOCKS, 0.0), _run(seed, 1, 0.0)
    return {
        "lacking": asked[1],
        "lacking, none": none[1],
        "errors": asked[0],
        "errors, none": none[0],
        "thin": thin[0],
    }


def _drawn(count: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    label_B = torch.randint(CLASSES, (count,), generator=chance)
    return digits(label_B, torch.randint(LOOKS, (count,), generator=chance), chance), label_B


def _run(seed: int, blocks: int, strength: float) -> tuple[float, float]:
    """The share of errors, and the nats that the block lacks of telling as much of the class as it could."""
    torch.manual_seed(seed)
    chance, noise = torch.Generator().manual_seed(seed + 5), torch.Generator().manual_seed(seed)
    how = {"hidden": 32, "strength": strength, "explore": 0.4, "start": 2.0, "end": 0.2, "decay": 0.99, "std": 0.1}
    router = CIGT(_WIDTH, blocks, **how, generator=torch.Generator().manual_seed(seed))  # pyrefly: ignore[bad-argument-type]
    first, head = nn.Linear(SIDE * SIDE, _WIDTH), nn.Linear(_WIDTH, CLASSES)
    start = torch.Generator().manual_seed(seed)
    moe = MoE(_WIDTH, _HIDDEN, blocks, router=router, activation="relu", bias=True, std=0.2, generator=start)
    net = nn.ModuleList([first, moe, head]).train()
    adam = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(_STEPS):
        x_BD, label_B = _drawn(_BATCH, chance)
        with given(label_B=label_B):
            routed = moe(first(x_BD).relu()[:, None], generator=noise)
        loss = nn.functional.cross_entropy(head(routed.output[:, 0]), label_B)
        loss = loss if routed.routing.penalty is None else loss + routed.routing.penalty
        adam.zero_grad()
        loss.backward()
        adam.step()
        router.after_step(routed.routing.load_E)
    net.eval()
    with torch.no_grad():
        x_BD, label_B = _drawn(_TEST, torch.Generator().manual_seed(99))
        routed = moe(first(x_BD).relu()[:, None])
        errors = float((head(routed.output[:, 0]).argmax(1) != label_B).double().mean())
        most = torch.tensor(float(_BLOCKS)).log()
        return errors, float(most - information_gain(routed.routing.dense(), label_B))
