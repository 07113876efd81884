"""Claim: ReLU routing is continuous, comes to the sparsity it is asked for, and balances."""

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Clusters, Fitted, fitted, layer, max_vio
from turnout.decide.token import ReMoE, TopK

_EXPERTS, _K, _STEPS, _LINES = 16, 2, 800, 20


def _normed(x_TD: Tensor) -> Tensor:
    return x_TD / x_TD.square().mean(1, keepdim=True).sqrt()


class _ReMoE(ReMoE):
    """Sees normed inputs, as behind a transformer's norm."""

    def logits(self, x_TD: Tensor) -> Tensor:
        return super().logits(_normed(x_TD))


class _TopK(TopK):
    """Sees normed inputs, too."""

    def scored(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return super().scored(_normed(x_TD))


class _Fixed(_ReMoE):
    """lambda stays what it was."""

    def after_step(self, load_E: Tensor, *, num_tokens: int) -> None:
        pass


def remoe() -> Claim:
    """The largest jump of a layer's output on a line, and how far the experts a token are from the two asked for.

    >>> remoe().off
    'lambda stays at its start; the two largest of a softmax'

    Source: Wang et al., 2024, "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing", figures 3 and 4.
    """
    return Claim(
        name="remoe",
        statement="A ReLU gate whose penalty follows the sparsity takes as many experts a token as asked for, and its "
        "output has no jumps.",
        source="Wang et al., 2024, ReMoE",
        off="lambda stays at its start; the two largest of a softmax",
        switched={"off target": "off target, fixed", "jump": "jump, top-2"},
        rows=(
            Row("experts a token, away from 2", "within", "off target", "off target, fixed", "lambda fixed", bound=0.5),
            Row("largest step over the median one, on a line", "within", "jump", "jump, top-2", "top-2", bound=20.0),
            Row("held-out error / variance", "below", "remoe", "top-2", "top-2 with a balance loss", headline=True),
        ),
        measure=_measure,
        limits=(0.0, 1e7),
        seconds=40,
        note=f"regression, 32 clusters of unequal frequency, {_EXPERTS} experts of 24 units, {_STEPS} steps of 512",
    )


def _measure(seed: int) -> Values:
    found: dict[str, Fitted] = {}
    for name, kind in (("remoe", _ReMoE), ("fixed", _Fixed), ("top-2", _TopK)):
        more = {"std": 0.05, "generator": torch.Generator().manual_seed(seed)}
        made = layer(kind(WIDTH, _EXPERTS, top_k=_K, bias=True, **more), seed=seed)
        aux = 0.01 if kind is _TopK else 0.0
        data = Clusters(seed, count=32, skew=0.7)
        found[name] = fitted(made, data, seed=seed, steps=_STEPS, batch=512, aux=aux)
    away = {name: abs(one.routing.num_entries / one.routing.num_tokens - _K) for name, one in found.items()}
    data = Clusters(seed, count=32, skew=0.7)
    x_TD, _ = data.draw(2 * _LINES, torch.Generator().manual_seed(11))
    return {
        **{name: one.fvu for name, one in found.items()},
        "off target": away["remoe"],
        "off target, fixed": away["fixed"],
        "jump": _jump(found["remoe"], x_TD),
        "jump, top-2": _jump(found["top-2"], x_TD),
        "MaxVio": max_vio(found["remoe"].routing),
    }


@torch.no_grad()
def _jump(one: Fitted, x_TD: Tensor) -> float:
    """The median over lines between two inputs of the largest step of the output over the median one, of 4,000."""
    share_N1, found = torch.linspace(0, 1, 4001)[:, None], []
    for a_D, b_D in zip(x_TD[:_LINES], x_TD[_LINES:], strict=True):
        step_N = one.layer(a_D * (1 - share_N1) + b_D * share_N1).output.diff(dim=0).norm(dim=1)
        found.append(float(step_N.max() / step_N.median().clamp_min(1e-9)))
    return sorted(found)[_LINES // 2]
