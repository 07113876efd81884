"""A light predictor of the whole routing path: which experts of all layers the next pass will use."""

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from turnout.types.accesses import Accesses

__all__ = ["RoutePredictor", "learn_routes"]

_HALF = 8.0  # passes after which a use counts half


@dataclasses.dataclass(frozen=True, eq=False)
class RoutePredictor:
    """h = relu(A p + C w + t); logits = W h + b + d_p p + d_w w, softmax in each layer, times the experts of a layer.

    p: what the last pass used, 0 or 1 for each expert of all layers. w: past uses of this text, each halved in weight
    every ``half`` passes, times 1 - 2^(-1/half), which estimates a rate. t: a vector of the token that is read.

    Args:
        weights: A and C (P, H), W (H, P), b, d_p, d_w (P,), t (V + 1, H), whose last row is for unknown tokens.
        affinity_MEE: (L - 1, E, E) how much more often than by chance an expert follows one of the layer before, as a
            logarithm.
        uses_L: how many experts each layer uses in a pass.
        half: see there.

    >>> told = Accesses.of_paths(np.array([[[0], [1]], [[1], [0]]] * 20), experts=2)
    >>> learn_routes(told, seed=0, steps=100).paths(np.array([1, 0, 0, 1.0]), np.full(4, 0.5)).round().tolist()
    [[0.0, 1.0], [1.0, 0.0]]

    Source: He et al., 2024, "ExpertFlow: Optimized Expert Activation and Token Allocation for Efficient
    Mixture-of-Experts Inference". Theirs is an encoder and decoder over the prompt; this is one hidden layer over
    what was used before, and the token where it is known.
    """

    weights: dict[str, np.ndarray]
    affinity_MEE: np.ndarray
    uses_L: np.ndarray
    half: float = _HALF

    def paths(self, before_P: np.ndarray, rate_P: np.ndarray, token: int = -1) -> np.ndarray:
        """(L, E) the chance of each expert to be used in this pass."""
        weight = self.weights
        known = 0 <= token < len(weight["t"]) - 1
        hidden_H = before_P @ weight["A"] + rate_P @ weight["C"] + weight["t"][token if known else -1]
        logit_P = np.maximum(hidden_H, 0) @ weight["W"] + weight["b"]
        logit_P = logit_P + weight["d_p"] * before_P + weight["d_w"] * rate_P
        return self.chances(logit_P.reshape(len(self.uses_L), -1))

    def chances(self, logit_LE: np.ndarray) -> np.ndarray:
        """(L, E) a softmax in each layer, times the experts that it uses; at most 1."""
        power_LE = np.exp(logit_LE - logit_LE.max(1, keepdims=True))
        return np.minimum(1.0, power_LE / power_LE.sum(1, keepdims=True) * self.uses_L[:, None])

    def corrected(self, chance_E: np.ndarray, layer: int, experts: tuple[int, ...]) -> np.ndarray:
        """(E,) the chances of the next layer, now that this layer's experts are known."""
        if layer >= len(self.affinity_MEE) or not experts:
            return chance_E
        logit_E = np.log(np.maximum(chance_E, 1e-9)) + self.affinity_MEE[layer, list(experts)].mean(0)
        power_E = np.exp(logit_E - logit_E.max())
        return np.minimum(1.0, power_E / power_E.sum() * self.uses_L[layer + 1])


def learn_routes(
    accesses: Accesses, *, seed: int, hidden: int = 64, steps: int = 300, most: int = 8192
) -> RoutePredictor:
    """A predictor of recorded accesses.

    Args:
        accesses: of texts that it will not be judged by.
        seed: of its starting weights and its batches.
        hidden: H.
        steps: of training, 256 passes each.
        most: passes that it learns from, drawn from all.

    Returns:
        The predictor; the same for the same seed.

    >>> learn_routes(Accesses.of_paths(np.array([[[0]]]), experts=2), seed=0, steps=1).uses_L.tolist()
    [1.0]

    Source: see ``RoutePredictor``; Kingma and Ba, 2015, "Adam", for the descent.
    """
    used_SLE = accesses.used()
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(used_SLE))[:most])
    before_NP, rate_NP = _inputs(used_SLE, accesses.sequence_S(), chosen)
    token_N = np.full(len(chosen), -1) if accesses.token_S is None else np.asarray(accesses.token_S, np.int64)[chosen]
    weights = _trained(before_NP, rate_NP, token_N, used_SLE[chosen], seed=seed, hidden=hidden, steps=steps)
    uses_L = used_SLE.sum((0, 2)) / np.maximum(1, used_SLE.any(2).sum(0))
    return RoutePredictor(weights, _affinity(used_SLE), uses_L)


def _inputs(used_SLE: np.ndarray, sequence_S: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    used_SP = used_SLE.reshape(len(used_SLE), -1)
    before_NP = np.zeros((len(chosen), used_SP.shape[1]), np.float32)
    rate_NP, rate_P, keep, n = np.zeros_like(before_NP), np.zeros(used_SP.shape[1]), 2 ** (-1 / _HALF), 0
    for step in range(len(used_SP)):
        fresh = step == 0 or sequence_S[step] != sequence_S[step - 1]
        rate_P = rate_P * 0 if fresh else rate_P * keep + (1 - keep) * used_SP[step - 1]
        if n < len(chosen) and chosen[n] == step:
            before_NP[n], rate_NP[n] = (0 if fresh else used_SP[step - 1]), rate_P
            n += 1
    return before_NP, rate_NP


def _affinity(used_SLE: np.ndarray) -> np.ndarray:
    layers, experts = used_SLE.shape[1:]
    found_MEE = np.zeros((max(0, layers - 1), experts, experts))
    used = used_SLE.astype(np.float32)
    for layer in range(layers - 1):
        both_EE = used[:, layer].T @ used[:, layer + 1]
        chance_EE = np.outer(used[:, layer].sum(0), used[:, layer + 1].sum(0)) / len(used)
        found_MEE[layer] = np.log((both_EE + 1) / (chance_EE + 1))
    return found_MEE


@torch.enable_grad()
def _trained(
    before_NP: np.ndarray,
    rate_NP: np.ndarray,
    token_N: np.ndarray,
    used_NLE: np.ndarray,
    *,
    seed: int,
    hidden: int,
    steps: int,
) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    pages, vocabulary = before_NP.shape[1], int(token_N.max(initial=-1)) + 1
    zeros, spread = (lambda *size: torch.zeros(size)), (lambda *size: torch.randn(size, generator=generator))
    start = {"A": spread(pages, hidden) / 8, "C": spread(pages, hidden) / 8, "W": spread(hidden, pages) / 64}
    start |= {"b": zeros(pages), "d_p": zeros(pages), "d_w": zeros(pages) + 2, "t": zeros(vocabulary + 1, hidden)}
    weight = {name: nn.Parameter(value) for name, value in start.items()}
    adam = torch.optim.Adam(weight.values(), lr=1e-2)
    told: list[Tensor] = [torch.from_numpy(np.ascontiguousarray(each)) for each in (before_NP, rate_NP, token_N)]
    target_NLE = torch.from_numpy(used_NLE / np.maximum(1, used_NLE.sum(2, keepdims=True))).float()
    for step in range(steps):
        adam.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        row_B = torch.randint(len(before_NP), (256,), generator=generator)
        before, rate, token = (each[row_B] for each in told)
        # One in ten is read as unknown, so that the last row learns what to do without.
        token = torch.where(torch.rand(len(row_B), generator=generator) < 0.1, -1, token) % (vocabulary + 1)
        inner = (before @ weight["A"] + rate @ weight["C"] + weight["t"][token]).relu()
        logit = inner @ weight["W"] + weight["b"] + weight["d_p"] * before + weight["d_w"] * rate
        share = logit.view(len(row_B), *used_NLE.shape[1:]).log_softmax(2)
        loss = -(target_NLE[row_B] * share).sum(2).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {name: value.detach().double().numpy() for name, value in weight.items()}
