"""Claim: zeroth-order tuning of the few entries that pre-training is sensitive to does better than of all, or of others."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.digits import CLASSES, SIDE, digits
from turnout.train.zeroth import mezo, overlay, sensitive

_WIDTH, _SHARE, _STEPS, _BATCH, _START_STEPS, _EXAMPLES, _HELD_OUT = 64, 0.01, 600, 64, 300, 2000, 3000
_RATES = {"sparse": (1e-2, 3e-2, 1e-1), "all": (3e-4, 1e-3, 3e-3)}  # of all entries a larger one runs away
_PLAIN, _FAINT = 0, 2  # looks: pre-trained on, and tuned to


def sparse_zo() -> Claim:
    """A hundredth of a network's entries, with the largest squared gradients in pre-training, is tuned by losses alone.

    The off arm tunes as many drawn at random, and another control all of them; each takes the best of three rates by
    its own training loss. In the last arm all other entries of matrices are kept in four bits.

    >>> sparse_zo().off
    'as many entries drawn at random'

    Source: Guo et al., 2024, "Zeroth-Order Fine-Tuning of LLMs with Extreme Sparsity".
    """
    loss, why = "held-out nats after tuning", "what four bits may cost, a twentieth of what tuning gains"
    drawn = "as many, drawn at random"
    return Claim(
        name="sparse_zo",
        statement="Zeroth-order tuning of the hundredth of entries that pre-training is most sensitive to beats tuning "
        "as many others and tuning all; with the rest in four bits it does as well.",
        source="Guo et al., 2024, Zeroth-Order Fine-Tuning of LLMs with Extreme Sparsity",
        off="as many entries drawn at random",
        switched={"sensitive": "random", "four bits": "random, four bits"},
        rows=(
            Row(loss, "below", "sensitive", "random", drawn),
            Row(f"{loss}, the rest in four bits", "below", "four bits", "random, four bits", drawn),
            Row(loss, "below", "sensitive", "all", "all entries, as many steps", headline=True),
            Row(f"{loss}, the rest in four bits", "no_worse", "four bits", "sensitive", "the rest in 32 bits",
                margin=0.02, why=why, headline=True),
        ),
        measure=_measure,
        seconds=15,
        note=f"three layers of {_WIDTH}, {_START_STEPS} steps of Adam on plain digits, then {_STEPS} zeroth-order steps "
        f"of {_BATCH} on faint ones; {_SHARE:.0%} of the entries, where the paper takes 0.1 % of billions. Before "
        "{before:.3f}, in four bits {before, four bits:.3f}",
        limits=(0.0, 20.0),
    )  # fmt: skip


def _measure(seed: int) -> Values:
    chance = torch.Generator().manual_seed(seed)
    plain, faint, held = (_drawn(n, look, chance) for n, look in ((4000, _PLAIN), (_EXAMPLES, _FAINT), (_HELD_OUT, _FAINT)))
    start = _pretrained(plain, seed, chance)
    index = sensitive(start, [_on(plain, at) for at in range(16)], share=_SHARE)
    count = sum(len(one) for one in index.values())
    drawn = _at_random(start, count, chance)
    arms = {
        "sensitive": (index, 32), "random": (drawn, 32), "four bits": (index, 4), "random, four bits": (drawn, 4),
        "all": (None, 32),
    }  # fmt: skip
    found = {}
    for name, (here, bits) in arms.items():
        found[name] = min(_tuned(start, here, bits, rate, faint, held, seed) for rate in _rates(name))[1]
    quantised = copy.deepcopy(start)
    overlay(quantised, index, bits=4)
    return found | {"before": _loss(start, held), "before, four bits": _loss(quantised, held)}


def _rates(name: str) -> tuple[float, ...]:
    return _RATES["all" if name == "all" else "sparse"]


def _tuned(
    start: nn.Module, index: dict[str, Tensor] | None, bits: int, rate: float, data: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor], seed: int,
) -> tuple[float, float]:  # fmt: skip
    """The training loss that a rate is chosen by, and the held-out loss."""
    model = copy.deepcopy(start)
    if index is not None:
        overlay(model, index, bits=bits)
    mezo(model, lambda m, step: _on(data, step)(m), steps=_STEPS, rate=rate, seed=seed)
    return _loss(model, data), _loss(model, held)


def _at_random(model: nn.Module, count: int, chance: torch.Generator) -> dict[str, Tensor]:
    sizes = {name: one.numel() for name, one in model.named_parameters()}
    every = torch.randperm(sum(sizes.values()), generator=chance)[:count].sort().values
    index, begin = {}, 0
    for name, size in sizes.items():
        here = every[(every >= begin) & (every < begin + size)] - begin
        begin += size
        if len(here):
            index[name] = here
    return index


def _drawn(count: int, look: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    label_B = torch.randint(CLASSES, (count,), generator=chance)
    return digits(label_B, torch.full((count,), look), chance), label_B


def _pretrained(data: tuple[Tensor, Tensor], seed: int, chance: torch.Generator) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(SIDE * SIDE, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, CLASSES)
        )
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(_START_STEPS):
        pick_B = torch.randint(len(data[0]), (_BATCH,), generator=chance)
        optimizer.zero_grad()
        F.cross_entropy(net(data[0][pick_B]), data[1][pick_B]).backward()
        optimizer.step()
    return net


def _on(data: tuple[Tensor, Tensor], step: int) -> Callable[[nn.Module], Tensor]:
    """The loss on the batch of a step."""
    pick_B = (torch.arange(_BATCH) + step * _BATCH) % len(data[0])
    return lambda model: F.cross_entropy(model(data[0][pick_B]), data[1][pick_B])


@torch.no_grad()
def _loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    value = float(F.cross_entropy(model(data[0]), data[1]))
    return value if value < 20 else 20.0
