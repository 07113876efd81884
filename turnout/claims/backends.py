"""Claim: every backend computes what the obvious loop computes, gradients included."""

import dataclasses

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.run import grouped, reference, sort
from turnout.types import ExpertWeights, Routing

_BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# Odd sizes, empty experts, one token, one expert: T, E, K, D, F.
_SHAPES = ((1, 4, 2, 8, 16), (7, 3, 1, 9, 5), (65, 16, 3, 24, 40), (130, 33, 5, 16, 17), (64, 1, 1, 16, 8))
_ARMS = {
    f"{backend.__name__}, {str(dtype).removeprefix('torch.')}": (backend, dtype)
    for backend in (sort, grouped)
    for dtype in _BOUND
}


def backends() -> Claim:
    """The backends equal the reference loop, values and gradients, on random ragged routings.

    The off arm is the same comparison with two experts' weights swapped, which must be seen.

    >>> backends().off
    'two experts swapped'

    Source: Gale et al., 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts": dropless routing
    computes the mathematical layer exactly.
    """
    metric, swapped = "largest relative difference, values and gradients", "two experts swapped"
    return Claim(
        name="backends",
        statement="sort and grouped equal the reference loop in values and gradients on random ragged routings.",
        source="Gale et al., 2022, MegaBlocks",
        off=swapped,
        switched={name: f"{name}, swapped" for name in _ARMS},
        rows=tuple(
            Row(f"{name}: {metric}", "within", name, f"{name}, swapped", swapped, bound=_BOUND[dtype])
            for name, (_, dtype) in _ARMS.items()
        ),
        measure=_measure,
        seconds=1,
        note="T from 1 to 130, up to 33 experts, 0 to 5 entries a token, odd sizes, empty experts",
    )


def _measure(seed: int) -> Values:
    found = {}
    for name, (backend, dtype) in _ARMS.items():
        cases = [_case(shape, dtype, seed) for shape in _SHAPES]
        several = [case for case in cases if case[2].num_experts > 1]
        found[name] = max(_difference(backend, *case, swap=False) for case in cases)
        found[f"{name}, swapped"] = min(_difference(backend, *case, swap=True) for case in several)
    return found


def _case(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, Routing, ExpertWeights]:
    tokens, experts, top_k, width, hidden = shape
    generator = torch.Generator().manual_seed(seed * 1000 + tokens)
    score_TE = torch.rand(tokens, experts, generator=generator)
    # A ragged pattern: each token keeps a random number of its best experts; the first experts are favoured.
    favour_TE = score_TE + torch.linspace(0.5, 0, experts)
    wanted_T = torch.randint(0, top_k + 1, (tokens, 1), generator=generator)
    rank_TE = favour_TE.argsort(1, descending=True).argsort(1)
    mask_TE = rank_TE < wanted_T
    mask_TE[0, :2] = True
    routing = Routing.from_dense(score_TE, mask_TE=mask_TE)
    scale = width**-0.5
    weights = ExpertWeights(
        (torch.randn(experts, width, 2 * hidden, generator=generator) * scale).to(dtype),
        (torch.randn(experts, hidden, width, generator=generator) * hidden**-0.5).to(dtype),
    )
    return torch.randn(tokens, width, generator=generator).to(dtype), routing, weights


def _difference(backend: object, x_TD: torch.Tensor, routing: Routing, weights: ExpertWeights, *, swap: bool) -> float:
    """The largest difference of output or any gradient, relative to the largest magnitude of that tensor."""
    wrong = weights
    if swap:
        order = torch.arange(weights.num_experts)
        order[:2] = torch.tensor([1, 0])
        wrong = dataclasses.replace(weights, up_EDH=weights.up_EDH[order], down_EFD=weights.down_EFD[order])
    pairs = zip(_run(backend, x_TD, routing, wrong), _run(reference, x_TD, routing, weights), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs)


def _run(backend: object, x_TD: torch.Tensor, routing: Routing, weights: ExpertWeights) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x_TD, weights.up_EDH, weights.down_EFD, routing.weight_R)]
    x_TD, up_EDH, down_EFD, weight_R = leaves
    bank = dataclasses.replace(weights, up_EDH=up_EDH, down_EFD=down_EFD)
    y_TD = backend(x_TD, dataclasses.replace(routing, weight_R=weight_R), bank)  # type: ignore[operator]
    slope_TD = torch.linspace(-1, 1, y_TD.numel(), dtype=torch.float32).reshape(y_TD.shape).to(y_TD.dtype)
    gradients = torch.autograd.grad(y_TD, leaves, slope_TD)
    return [tensor.detach().float() for tensor in (y_TD, *gradients)]
