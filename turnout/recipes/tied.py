"""Tokens whose experts are tied to rounding: two exact programs may choose otherwise there, and then part."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from turnout.models import LM
from turnout.types import Routing

__all__ = ["tied"]

# How far scores of two programs may be apart, against the score; and how far what their routers see may be, likewise.
_SCORES, _INPUTS, _DRAWS = 5e-7, 2e-6, 6


@torch.no_grad()
def tied(lm: LM, id_BS: Tensor) -> Tensor:
    """(B, S) bool, the tokens that rounding may send to other experts in some layer, and all that come after them.

    Such a token has an expert that it takes, and one that it does not, of nearly the same score; or it takes others
    when what its router sees changes in the last digits.

    Args:
        lm: in fp32.
        id_BS: token ids.

    Source: none; what rounding does to top-k.
    """
    plain = lm(id_BS).routings
    found_T = torch.zeros(id_BS.numel(), dtype=torch.bool, device=id_BS.device)
    for routing in plain:
        found_T |= _close(routing)
    for draw in range(_DRAWS):
        # Each change once to either side: what one of them leaves as it is, the other may not.
        with _shaken(lm, draw // 2, _INPUTS if draw % 2 else -_INPUTS):
            for one, other in zip(plain, lm(id_BS).routings, strict=True):
                found_T |= (_taken(one) != _taken(other)).any(1)
    return found_T.view_as(id_BS).cummax(1).values


def _taken(routing: Routing) -> Tensor:
    taken_TE = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool, device=routing.token_R.device)
    taken_TE[routing.token_R, routing.expert_R] = True
    return taken_TE


def _close(routing: Routing) -> Tensor:
    """(T,) whether the least of the scores taken and the largest of the others are the same but for rounding."""
    if routing.score_TE is None:
        return torch.zeros(routing.num_tokens, dtype=torch.bool, device=routing.token_R.device)
    taken_TE, score_TE = _taken(routing), routing.score_TE.float()
    least_T = score_TE.masked_fill(~taken_TE, float("inf")).amin(1)
    best_T = score_TE.masked_fill(taken_TE, float("-inf")).amax(1)
    # A token that takes all experts, or none, has nothing to be tied with.
    both_T = least_T.isfinite() & best_T.isfinite()
    return both_T & ((least_T - best_T).abs() <= _SCORES * best_T.abs())


@contextlib.contextmanager
def _shaken(lm: LM, seed: int, size: float) -> Iterator[None]:
    """While this is open, what the routers see is off in the last digits."""
    generator = torch.Generator().manual_seed(seed)

    def shake(router: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        noise = torch.randn(args[0].shape, generator=generator).to(args[0])
        return (args[0] + size * args[0] * noise, *args[1:])

    with contextlib.ExitStack() as stack:
        for router in lm.routers:
            stack.callback(router.register_forward_pre_hook(shake).remove)
        yield
