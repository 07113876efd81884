"""The pieces that several routers need: the linear gate, the deterministic choice of the largest, noise, capacity."""

import math
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.solve.fixed_rows import fixed_linear
from turnout.types import Routing
from turnout.types.invariant import alike, invariant_here, refuse_invariant
from turnout.types.recall import steady

Priority = Literal["weight", "position"]
# Below this many scores one stable sort takes less time than the four small operations that build the keys.
_FEW = 512


@runtime_checkable
class ByScore(Protocol):
    """A router whose choice follows from scores of a token alone: others than its own can be put in their place.

    Source: none; plain bookkeeping.
    """

    num_experts: int
    top_k: int

    def scored(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, E) the logits and the scores of these tokens."""
        ...

    def chosen(self, score_TE: Tensor, *, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """(T, K) the experts that these scores choose, best first, and their weights.

        Args:
            score_TE: (T, E).
            rank: takes the one expert of this rank alone, 1 for the best, (T, 1); its weight is the one that it has
                where it is the only one.
        """
        ...


def check(
    name: str, width: int, num_experts: int, top_k: int, capacity_factor: float | None, priority: str = "weight"
) -> None:
    """Refuses sizes that cannot work, on behalf of the router called ``name``."""
    where = f"turnout.decide.token.{name}"
    if width < 1 or num_experts < 1:
        got, allowed = f"{width} and {num_experts}", "be at least 1"
        raise ShapeError(word("width and num_experts", got=got, allowed=allowed, where=where, fix="pass 1 or more"))
    if not 1 <= top_k <= num_experts:
        fix = f"pass top_k={min(max(top_k, 1), num_experts)}"
        allowed = f"be between 1 and num_experts={num_experts}"
        raise ShapeError(word("top_k", got=top_k, allowed=allowed, where=where, fix=fix))
    if capacity_factor is not None and not 0 < capacity_factor < math.inf:
        fix = "pass capacity_factor=1.25, or None to drop nothing"
        allowed = "be positive, or None"
        raise UsageError(word("capacity_factor", got=capacity_factor, allowed=allowed, where=where, fix=fix))
    if priority not in ("weight", "position"):
        allowed, fix = "be 'weight' or 'position'", "pass priority='weight'"
        raise UsageError(word("priority", got=priority, allowed=allowed, where=where, fix=fix))


def check_tokens(x_TD: Tensor, width: int) -> None:
    """Refuses tokens that are not (T, width)."""
    if x_TD.ndim != 2 or x_TD.shape[1] != width:
        fix = "flatten x to (tokens, width), and build the router with that width"
        allowed = f"have the shape (T, {width})"
        raise ShapeError(word("x_TD", got=f"{tuple(x_TD.shape)}", allowed=allowed, where="the router", fix=fix))


def linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """(T, E) the products of tokens and gate plus a bias, in fp32, or in fp64 where the gate is; autocast off.

    Raises:
        ShapeError: x is not (T, D) for the gate's D.
    """
    check_tokens(x_TD, weight_ED.shape[1])
    dtype = torch.promote_types(weight_ED.dtype, torch.float32)
    bias_E = None if bias_E is None else bias_E.to(dtype)
    if invariant_here("the router"):
        return fixed_linear(x_TD.to(dtype), weight_ED.to(dtype), bias_E)
    if torch.is_autocast_enabled(x_TD.device.type):
        with torch.autocast(x_TD.device.type, enabled=False):
            return torch.nn.functional.linear(x_TD.to(dtype), weight_ED.to(dtype), bias_E)
    return torch.nn.functional.linear(x_TD.to(dtype), weight_ED.to(dtype), bias_E)


def softmax(logit_TE: Tensor) -> Tensor:
    """The softmax over experts. On the CPU, rows too short for its vectors go five times faster as columns."""
    if logit_TE.shape[1] < 16 and logit_TE.device.type == "cpu" and not invariant_here("the router"):
        return logit_TE.t().softmax(0).t()
    return logit_TE.softmax(1)


def sigmoid(logit_TE: Tensor) -> Tensor:
    """The sigmoid of each score."""
    return alike(torch.sigmoid, logit_TE, "the router")


def standard(x_ND: Tensor) -> Tensor:
    """Each row with mean 0 and variance 1; a row of equal numbers becomes zeros."""
    return torch.nn.functional.layer_norm(x_ND, x_ND.shape[-1:])


def largest(score_TE: Tensor, k: int) -> Tensor:
    """(T, k) int64, the positions of the k largest scores of each row, largest first; of equal ones the lower index.

    torch.topk leaves the order of ties open. Here fp32 scores become whole numbers, in the same order, that carry the
    index in their low bits: no two are equal, so topk has one answer, at nearly its usual speed.
    """
    score_TE = score_TE.detach()
    num_experts = score_TE.shape[1]
    if k == 1:
        return score_TE.argmax(1, keepdim=True)  # defined as the first of equal ones
    if score_TE.dtype != torch.float32 or score_TE.numel() <= _FEW:
        return score_TE.sort(dim=1, descending=True, stable=True)[1][:, :k]
    bit_TE = (score_TE.contiguous() + 0.0).view(torch.int32)  # + 0.0 makes one zero of the two
    bit_TE ^= (bit_TE >> 31) & 0x7FFFFFFF
    back_E = torch.arange(num_experts - 1, -1, -1, device=bit_TE.device)
    return torch.add(back_E, bit_TE.to(torch.int64), alpha=1 << 31).topk(k, dim=1)[1]


def picked(score_TE: Tensor, k: int, rank: int | None) -> Tensor:
    """(T, K) the positions of the k largest, or (T, 1) that of the one of this rank, counted from 1."""
    return largest(score_TE, k) if rank is None else largest(score_TE, rank)[:, rank - 1 :]


def draw(sample: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """A tensor of chance, from ``torch.rand`` or ``torch.randn``, drawn on the generator's device.

    The layer may be run again in the backward pass (gradient checkpointing): it then draws the same.
    """
    generator = steady(generator)
    device = like.device if generator is None else generator.device
    return sample(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def limit(routing: Routing, top_k: int, capacity_factor: float | None, priority: Priority) -> Routing:
    """The routing truncated to the capacity max(1, ceil(capacity_factor * T * top_k / E)); None leaves it whole."""
    if capacity_factor is None:
        return routing
    refuse_capacity(capacity_factor)
    return routing.truncate(
        capacity(routing.num_tokens, routing.num_experts, top_k, capacity_factor), priority=priority
    )


def refuse_capacity(capacity_factor: float) -> None:
    """Refuses a limit of capacity within ``batch_invariant``: who is dropped depends on who else is there."""
    refuse_invariant(
        f"capacity_factor={capacity_factor}", "the router", "pass capacity_factor=None, which drops nothing"
    )


def capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """C, how many tokens an expert takes at most."""
    return max(1, math.ceil(capacity_factor * num_tokens * top_k / num_experts))
