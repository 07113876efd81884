"""Claim: experts that each take a few patches of a sample learn from fewer samples than a network that sees all."""

import math

import torch
from torch import Tensor, nn

from turnout.claims.claim import Claim, Row, Values
from turnout.decide.token import PatchChoice
from turnout.layers import MoE
from turnout.types import Routing

_WIDTH, _PATCHES, _TAKEN, _NEURONS, _SAMPLES, _EPOCHS, _TEST = 48, 16, 2, 20, 100, 60, 2000


def patch_moe() -> Claim:
    """Held-out errors after 100 samples: two experts that take 2 of 16 patches each, and a network of as many neurons.

    One patch of a sample says its class, the others are of 16 kinds that say nothing, all in noise.

    >>> patch_moe().off
    'routers that stay as they were drawn'

    Source: Chowdhury et al., 2023, "Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for
    Convolutional Neural Networks", theorems 4.1 and 4.2, figure 5.
    """
    return Claim(
        name="patch_moe",
        statement="Experts that choose few patches of each sample find those that say the class, and need fewer "
        "samples than a network that averages over all.",
        source="Chowdhury et al., 2023, Patch-level Routing in Mixture-of-Experts",
        off="routers that stay as they were drawn",
        switched={"routed": "frozen"},
        rows=(
            Row("held-out errors", "below", "routed", "frozen", "routers that stay as they were drawn"),
            Row("held-out errors", "below", "routed", "whole", "as many neurons on all patches", headline=True),
        ),
        measure=_measure,
        seconds=10,
        note=f"{_SAMPLES} samples of {_PATCHES} patches of width {_WIDTH}, {_TAKEN} an expert; SGD, {_EPOCHS} epochs; "
        "the network at the better of two rates",
    )


def _measure(seed: int) -> Values:
    chance = torch.Generator().manual_seed(seed + 5)
    kinds = torch.linalg.qr(torch.randn(_WIDTH, _WIDTH, generator=chance))[0]
    train, test = _drawn(_SAMPLES, kinds, chance), _drawn(_TEST, kinds, chance)
    routed, frozen = (_run(seed, train, test, start=start) for start in (1e-4, None))
    whole = min(_plain(seed, train, test, lr) for lr in (0.2, 1.0))
    return {"routed": routed, "frozen": frozen, "whole": whole}


def _drawn(count: int, kinds: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N, n, D) patches and (N,) the classes, +-1."""
    class_N = torch.randint(2, (count,), generator=chance)
    kind_Nn = torch.randint(2, 18, (count, _PATCHES), generator=chance)
    sign_Nn = torch.randint(2, (count, _PATCHES), generator=chance) * 2.0 - 1
    x_NnD = kinds[kind_Nn] * sign_Nn[..., None]
    x_NnD[torch.arange(count), torch.randint(_PATCHES, (count,), generator=chance)] = kinds[class_N]
    noise_NnD = torch.randn(x_NnD.shape, generator=chance) / math.sqrt(_WIDTH)
    return x_NnD + noise_NnD, class_N * 2.0 - 1


class _Signs(nn.Module):
    """What ReLU experts make of patches, their outputs' signs fixed: summed by their weights, or the mean over all."""

    def __init__(self, seed: int, experts: int, hidden: int, router: nn.Module | None) -> None:
        super().__init__()
        start = torch.Generator().manual_seed(seed)
        self.scale = 1 / _PATCHES if isinstance(router, _All) else 1.0
        self.moe = MoE(_WIDTH, hidden, experts, router=router, activation="relu", std=0.1, generator=start)
        sign_EH = torch.randint(2, (experts, hidden), generator=start) * 2.0 - 1
        down = self.moe.bank.down
        assert isinstance(down, nn.Parameter)
        with torch.no_grad():
            down.zero_()
            down[:, 0] = sign_EH
        down.requires_grad_(False)

    def forward(self, x_NnD: Tensor) -> Tensor:
        return self.scale * self.moe(x_NnD).output[..., 0].sum(1)


class _All(nn.Module):
    """Every token to the one expert."""

    width, num_experts = _WIDTH, 1

    def forward(self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: object = None) -> Routing:
        return Routing.from_topk(
            torch.zeros(len(x_TD), 1, dtype=torch.int64), x_TD.new_ones(len(x_TD), 1), num_experts=1
        )


def _run(seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, start: float | None) -> float:
    std = 1.0 if start is None else start
    router = PatchChoice(_WIDTH, 2, per_sample=_TAKEN, std=std, generator=torch.Generator().manual_seed(seed))
    router.requires_grad_(start is not None)
    return _fitted(_Signs(seed, 2, _NEURONS, router), train, test, 0.2, seed)


def _plain(seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], lr: float) -> float:
    return _fitted(_Signs(seed, 1, 2 * _NEURONS, _All()), train, test, lr, seed)


def _fitted(net: _Signs, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], lr: float, seed: int) -> float:
    (x_NnD, y_N), chance = train, torch.Generator().manual_seed(seed)
    descent = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
    for _ in range(_EPOCHS):
        for row_B in torch.randperm(len(x_NnD), generator=chance).split(20):
            loss = nn.functional.softplus(-y_N[row_B] * net(x_NnD[row_B])).mean()
            descent.zero_grad()
            loss.backward()
            descent.step()
    with torch.no_grad():
        return float(((net(test[0]) > 0) != (test[1] > 0)).double().mean())
