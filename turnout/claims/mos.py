"""Claim: at equal numbers to train, adapters from shared shards beat adapters of lower rank, and plain sharing."""

import copy
import functools
import math

import torch
from torch import Tensor, nn

from turnout.claims.claim import Claim, Row, Values
from turnout.reshape import attach_shards
from turnout.train.data import python_text

_LAYERS, _WIDTH, _CONTEXT, _EMBED = 16, 48, 8, 8
_BATCH, _STEPS, _TAUGHT = 128, 500, 600
_BUDGET = 2
# What is shared, the rate that was best for it (of 3, 6, 12 and 24 thousandths) on seed 9, and the budget.
_ARMS = {
    "mos": ({"rank": 8, "shards": 4, "private": 1}, 1.2e-2, _BUDGET),
    "subset": ({"rank": 8, "shards": 1, "private": 0, "dissociate": False}, 1.2e-2, _BUDGET),
    "lora": ({"rank": _BUDGET, "shards": 1, "private": _BUDGET}, 1.2e-2, _BUDGET),
    "pure": ({"rank": _BUDGET * _LAYERS, "shards": 1, "private": 0, "dissociate": False}, 2.4e-2, _BUDGET),
    "lora of 16": ({"rank": 8 * _BUDGET, "shards": 1, "private": 8 * _BUDGET}, 1.2e-2, 8 * _BUDGET),
}

Batch = tuple[Tensor, Tensor]


def mos() -> Claim:
    """A network of 16 layers learns to read Python backwards: MoS of rank 8, LoRA of rank 2, and one shared pool.

    These train as many numbers. The network has learned to guess the next byte of Python's own text; adapted, it has to
    guess the byte before. The off arm takes a subset of whole vectors from one pool: no shards, none private, A and B
    not dissociated. The headline is a saving of eight times: MoS against LoRA of eight times the numbers.

    >>> mos().off
    'a subset of whole vectors alone: no shards, none private, not dissociated'

    Source: Wang et al., 2025, "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards".
    """
    bits, why = "held-out bits per byte, read backwards", "a fifth of what LoRA gains from rank 3 instead of 2"
    eight = "LoRA of rank 16: eight times the numbers"
    return Claim(
        name="mos",
        statement="With as many numbers to train, shards shared with differences beat a plain subset, lower rank, and "
        "sharing alone; they save seven eighths of LoRA's numbers.",
        source="Wang et al., 2025, Mixture of Shards (MoS)",
        off="a subset of whole vectors alone: no shards, none private, not dissociated",
        switched={"mos": "subset"},
        rows=(
            Row(bits, "below", "mos", "subset", "a subset of whole vectors alone"),
            Row(bits, "below", "mos", "lora", "LoRA of rank 2, nothing shared", headline=True),
            Row(bits, "below", "mos", "pure", "pure sharing: one pool, whole, in every layer", headline=True),
            Row(bits, "no_worse", "mos", "lora of 16", eight, margin=0.02, why=why, headline=True),
        ),
        measure=_measure,
        seconds=33,
        note=f"{_LAYERS} layers of width {_WIDTH}, 2 maps each; {{params:.0f}} numbers to train. Rank 8 in 4 shards, 1 "
        "vector a map's own; before: {before:.2f}. Each arm has the rate that was best for it on a design seed",
        limits=(0.0, 1e5),
    )


def _measure(seed: int) -> Values:
    net, found = _taught(seed), {}
    for name, (options, rate, budget) in _ARMS.items():
        found[name], params = _adapted(net, seed, options, rate, budget)
        if name == "mos":
            found["params"] = params
    return found | {"before": _held_out(net)}


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, h_BD: Tensor) -> Tensor:
        return h_BD + self.down(nn.functional.gelu(self.up(self.norm(h_BD))))


class _Net(nn.Module):
    """The bytes before one, embedded side by side, through layers with a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.enter = nn.Embedding(128, _EMBED), nn.Linear(_CONTEXT * _EMBED, _WIDTH)
        self.layers = nn.Sequential(*(_Layer() for _ in range(_LAYERS)))
        self.norm, self.out = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 128)

    def forward(self, id_BC: Tensor) -> Tensor:
        return self.out(self.norm(self.layers(self.enter(self.embed(id_BC).flatten(1)))))


@functools.cache
def _text() -> tuple[Tensor, Tensor]:
    """The bytes to learn from and those held out, nine to one in each domain; what is not ASCII is a question mark."""
    sides: tuple[list[int], list[int]] = ([], [])
    for documents in python_text(limit_bytes=1_000_000, say=lambda line: None).values():
        content = b"".join(piece for document in documents for piece in document.pieces())
        ids = [byte if byte < 128 else 63 for byte in content]
        cut = len(ids) * 9 // 10
        sides[0].extend(ids[:cut])
        sides[1].extend(ids[cut:])
    return torch.tensor(sides[0]), torch.tensor(sides[1])


def _draw(id_T: Tensor, rows: int, chance: torch.Generator) -> Batch:
    """(B, C) bytes in a row, and (B,) the one that follows."""
    start_B1 = torch.randint(len(id_T) - _CONTEXT - 1, (rows, 1), generator=chance)
    row_BC = id_T[start_B1 + torch.arange(_CONTEXT + 1)]
    return row_BC[:, :_CONTEXT], row_BC[:, _CONTEXT]


def _descend(net: nn.Module, id_T: Tensor, *, steps: int, rate: float, seed: int) -> None:
    """Adam on what asks for gradients; the rate falls in a line to a thirtieth."""
    chance = torch.Generator().manual_seed(seed)
    chosen = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(chosen, lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * max(1 - step / steps, 1 / 30)
        x_BC, y_B = _draw(id_T, _BATCH, chance)
        loss = nn.functional.cross_entropy(net(x_BC), y_B)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()


def _taught(seed: int) -> _Net:
    """The network that reads forwards."""
    torch.manual_seed(seed)
    net = _Net()
    _descend(net, _text()[0], steps=_TAUGHT, rate=3e-3, seed=seed)
    return net


def _adapted(net: _Net, seed: int, options: dict, rate: float, budget: int) -> tuple[float, int]:
    """Bits per byte backwards after training the adapters alone, and how many numbers those are."""
    net, chance = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    _, report = attach_shards(net, ["up", "down"], budget=budget, generator=chance, **options)
    _descend(net, _text()[0].flip(0), steps=_STEPS, rate=rate, seed=seed)
    params = report["params_trained"]
    assert isinstance(params, int)
    return _held_out(net), params


@torch.no_grad()
def _held_out(net: nn.Module) -> float:
    x_BC, y_B = _draw(_text()[1].flip(0), 16_384, torch.Generator().manual_seed(0))
    return float(nn.functional.cross_entropy(net(x_BC), y_B)) / math.log(2)
