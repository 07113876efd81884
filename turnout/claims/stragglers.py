"""Claim: the sharpness of straggler layers tells more of interpolated models than that of the whole; thinning helps."""

import copy
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.digits import CLASSES, SIDE, digits
from turnout.measure import layers_of, sharpness
from turnout.reshape import interpolate, interpolate_sparse
from turnout.reshape.many_to_one.stragglers import stragglers as find

_RATES, _POSITIONS, _KEEP = (3e-4, 1e-3, 3e-3, 1e-2), [i / 8 for i in range(9)], 0.2
_WIDTH, _START_STEPS, _STEPS, _BATCH, _RADIUS = 64, 600, 150, 64, 0.02
_Data = tuple[Tensor, Tensor]


def stragglers() -> Claim:
    """Thinning the straggler layers' update helps elsewhere, and their sharpness goes with the loss there more closely.

    >>> stragglers().off
    'as many entries left out of the other layers'

    Source: Abdollahpoorrostam, 2024, "In Search of the Successful Interpolation: On the Role of Sharpness in CLIP
    Generalization".
    """
    metric = "1 - |Kendall's tau| of sharpness and loss elsewhere"
    loss = "loss elsewhere halfway, nats"
    return Claim(
        name="stragglers",
        statement="Between a model and its fine-tuned self, thinning the update of straggler layers lowers the loss on "
        "other looks, and their sharpness tells it better than that of the whole model.",
        source="Abdollahpoorrostam, 2024, In Search of the Successful Interpolation",
        off="as many entries left out of the other layers",
        switched={"thinned": "others"},
        rows=(
            Row(loss, "below", "thinned", "others", "as many entries left out in other layers"),
            Row(loss, "below", "thinned", "plain", "plain interpolation"),
            Row(metric, "below", "straggler", "whole", "sharpness of the whole model", headline=True),
            Row(metric, "below", "straggler", "other layers", "sharpness of the other layers", headline=True),
        ),
        measure=_measure,
        seconds=2,
        note=f"five layers of {_WIDTH} on drawn digits: {_START_STEPS} steps on five looks, {_STEPS} on one at "
        f"{len(_RATES)} rates, {len(_POSITIONS)} positions each; radius {_RADIUS}, a straggler is twice as sharp as "
        f"the median layer, {_KEEP:.0%} of its update stays. Mean tau: {{tau straggler:.2f}} of stragglers, "
        "{tau whole:.2f} of the whole, {tau other layers:.2f} of the other layers. On the look itself thinning costs "
        "{cost:.3f} nats, in other layers {cost others:.3f}",
        limits=(-2.0, 10.0),
    )


def _measure(seed: int) -> Values:
    """The correlations over all interpolated models of one start, and the losses halfway, means over the rates."""
    start = _trained(_network(seed), _data(8000, (0, 1, 2, 3, 5), seed), _START_STEPS, 2e-3, seed)
    tuning, look = _data(1000, (0,), 1000 + seed), _data(1000, (0,), 2000 + seed)
    bent, faint = _data(1000, (0,), 4000 + seed, bend=0.4), _data(1000, (2, 5), 3000 + seed)
    elsewhere = torch.cat((bent[0], faint[0])), torch.cat((bent[1], faint[1]))
    some = tuning[0][:400], tuning[1][:400]
    points: dict[str, list[float]] = {"loss": [], "whole": [], "straggler": [], "other layers": []}
    halfway: dict[str, list[float]] = {name: [] for name in ("plain", "thinned", "others", "cost", "cost others")}
    for rate in _RATES:
        tuned = _trained(copy.deepcopy(start), tuning, _STEPS, rate, seed + 7)
        out: dict[str, Any] = dict(find(start, tuned, lambda m: _loss(m, some), radius=_RADIUS).values)
        names = list(out["stragglers"])
        for position in _POSITIONS:
            model = interpolate(start, tuned, position=position)[0]
            at: dict[str, Any] = dict(sharpness(model, lambda m: _loss(m, some), radius=_RADIUS).values)
            sharp = names or [max(out["by_layer"], key=lambda layer: out["by_layer"][layer])]
            points["loss"].append(_number(model, elsewhere))
            points["whole"].append(at["sharpness"])
            points["straggler"].append(statistics.fmean(at["by_layer"][layer] for layer in sharp))
            points["other layers"].append(statistics.fmean(v for k, v in at["by_layer"].items() if k not in sharp))
        for name, value in _halfway(start, tuned, names, elsewhere, look).items():
            halfway[name].append(value)
    taus = {name: _tau(values, points["loss"]) for name, values in points.items() if name != "loss"}
    found = {name: 1 - abs(tau) for name, tau in taus.items()} | {f"tau {name}": tau for name, tau in taus.items()}
    return found | {name: statistics.fmean(values) for name, values in halfway.items()}


def _halfway(start: nn.Module, tuned: nn.Module, names: list[str], elsewhere: _Data, look: _Data) -> dict[str, float]:
    """Losses in the middle: plainly, with thinned stragglers, and with as many entries left out of the other layers."""
    count = {layer: sum(start.get_parameter(n).numel() for n in ns) for layer, ns in layers_of(start).items()}
    others = [layer for layer in count if layer not in names]
    left_out = (1 - _KEEP) * sum(count[layer] for layer in names)
    keep = max(0.0, 1 - left_out / sum(count[layer] for layer in others))
    plain = interpolate(start, tuned)[0]
    thinned = interpolate_sparse(start, tuned, names, keep=_KEEP)[0]
    control = interpolate_sparse(start, tuned, others, keep=keep)[0]
    found = {"plain": plain, "thinned": thinned, "others": control}
    losses = {name: _number(model, elsewhere) for name, model in found.items()}
    own = {name: _number(model, look) for name, model in found.items()}
    return losses | {"cost": own["thinned"] - own["plain"], "cost others": own["others"] - own["plain"]}


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = (SIDE * SIDE, *[_WIDTH] * 4, CLASSES)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])


def _data(count: int, looks: tuple[int, ...], seed: int, *, bend: float = 0.25) -> _Data:
    generator = torch.Generator().manual_seed(seed)
    label_B = torch.randint(CLASSES, (count,), generator=generator)
    look_B = torch.tensor(looks)[torch.randint(len(looks), (count,), generator=generator)]
    return digits(label_B, look_B, generator, bend=bend), label_B


def _trained(model: nn.Module, data: _Data, steps: int, rate: float, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        pick_B = torch.randint(len(data[0]), (_BATCH,), generator=generator)
        optimizer.zero_grad()
        _loss(model, (data[0][pick_B], data[1][pick_B])).backward()
        optimizer.step()
    return model.eval()


def _loss(model: nn.Module, data: _Data) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1])


@torch.no_grad()
def _number(model: nn.Module, data: _Data) -> float:
    return float(_loss(model, data))


def _tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's rank correlation: pairs in the same order less pairs in the other, over all."""
    pairs = list(itertools.combinations(zip(first, second, strict=True), 2))
    return statistics.fmean(((a > c) - (a < c)) * ((b > d) - (b < d)) for (a, b), (c, d) in pairs)
