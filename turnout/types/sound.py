"""What makes a routing sound: the checks of its parts, where they cost nothing, and of all of it."""

from typing import Any

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word

__all__ = ["check_dense", "check_dropped", "check_entries", "check_kinds", "check_range", "check_sound", "check_topk"]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_sound(routing: Any) -> None:
    """Raises for a routing whose parts do not fit each other."""
    wrong = _problem(routing)
    if wrong:
        allowed = "have in-range, finite, unrepeated entries sorted by expert, then token"
        fix = "build it with Routing.from_entries, which sorts"
        raise ShapeError(word("a Routing", got=wrong, allowed=allowed, where="Routing.validate", fix=fix))


def _problem(routing: Any) -> str | None:
    """What is wrong with it, as a phrase; None when nothing is."""
    if routing.offset_E.ndim != 1 or routing.offset_E.numel() == 0:
        return f"offsets of shape {tuple(routing.offset_E.shape)}"
    load_E, token_R = routing.load_E, routing.token_R
    if routing.weight_R.shape != token_R.shape:
        return f"{tuple(routing.weight_R.shape)} weights for {tuple(token_R.shape)} tokens"
    if routing.offset_E[0] != 0 or routing.offset_E[-1] != routing.num_entries or bool((load_E < 0).any()):
        return f"offsets {routing.offset_E.tolist()} for {routing.num_entries} entries"
    wanted_E, before = routing.wanted_E, routing.before
    if wanted_E is not None and before is not None and not torch.equal(wanted_E, before.load_E):
        return f"wanted_E {wanted_E.tolist()}, not the load before, {before.load_E.tolist()}"
    # Whoever knows what was before may have added entries to it, too.
    if wanted_E is not None and (
        wanted_E.shape != load_E.shape or (before is None and bool((wanted_E < load_E).any()))
    ):
        return f"wanted_E {wanted_E.tolist()} below the load {load_E.tolist()}"
    for name, table in (("score_TE", routing.score_TE), ("logit_TE", routing.logit_TE)):
        if table is not None and table.shape != (routing.num_tokens, routing.num_experts):
            return (
                f"{name} of shape {tuple(table.shape)} for {routing.num_tokens} tokens x {routing.num_experts} experts"
            )
    carry_TX, penalty = routing.carry_TX, routing.penalty
    if carry_TX is not None and (carry_TX.ndim != 2 or len(carry_TX) != routing.num_tokens):
        return f"carry_TX of shape {tuple(carry_TX.shape)} for {routing.num_tokens} tokens"
    if penalty is not None and (penalty.ndim or not bool(torch.isfinite(penalty))):
        return f"a penalty of shape {tuple(penalty.shape)}" if penalty.ndim else f"a penalty of {float(penalty)}"
    real_T = routing.real_T
    if real_T is not None and (real_T.shape != (routing.num_tokens,) or real_T.dtype != torch.bool):
        return f"real_T of {real_T.dtype} and shape {tuple(real_T.shape)} for {routing.num_tokens} tokens"
    if routing.num_entries == 0:
        return None
    if int(token_R.min()) < 0 or int(token_R.max()) >= routing.num_tokens:
        return f"tokens {int(token_R.min())}..{int(token_R.max())} of {routing.num_tokens}"
    if real_T is not None and not bool(real_T[token_R].all()):
        return "entries of padding"
    if not bool((torch.diff(routing.expert_R * routing.num_tokens + token_R) > 0).all()):
        return "entries that are unsorted or repeated"
    if not bool(torch.isfinite(routing.weight_R).all()):
        return "weights that are not finite"
    return None


def check_topk(index_TK: Tensor, weight_TK: Tensor, *, where: str) -> None:
    """Raises unless they are the two results of a top-k."""
    if index_TK.ndim != 2 or index_TK.shape != weight_TK.shape:
        got, fix = (
            f"{tuple(index_TK.shape)} and {tuple(weight_TK.shape)}",
            "pass both results of the same torch.topk call",
        )
        allowed = "have the same shape (T, K)"
        raise ShapeError(word("index_TK and weight_TK", got=got, allowed=allowed, where=where, fix=fix))
    check_kinds(index_TK, weight_TK, where=where)


def check_entries(
    token_R: Tensor, expert_R: Tensor, weight_R: Tensor, num_tokens: int, num_experts: int, *, where: str
) -> None:
    """Raises unless they are entries of a matrix of this size."""
    if token_R.ndim != 1 or not token_R.shape == expert_R.shape == weight_R.shape:
        got = f"{tuple(token_R.shape)}, {tuple(expert_R.shape)} and {tuple(weight_R.shape)}"
        what, fix = "token_R, expert_R and weight_R", "pass one number of each for every entry"
        raise ShapeError(word(what, got=got, allowed="have the same shape (R,)", where=where, fix=fix))
    check_kinds(token_R, weight_R, where=where)
    check_kinds(expert_R, weight_R, where=where)
    check_range("token", token_R, num_tokens, where=where)
    check_range("expert", expert_R, num_experts, where=where)


def check_dense(weight_TE: Tensor, mask_TE: Tensor | None, *, where: str) -> None:
    """Raises unless they are a matrix and a mask of it."""
    if weight_TE.ndim != 2 or (mask_TE is not None and mask_TE.shape != weight_TE.shape):
        got = f"{tuple(weight_TE.shape)} and {'no mask' if mask_TE is None else tuple(mask_TE.shape)}"
        fix = "pass one weight and one bool for each token and expert"
        raise ShapeError(word("weight_TE and mask_TE", got=got, allowed="be (T, E)", where=where, fix=fix))


def check_kinds(index: Tensor, weight: Tensor, *, where: str) -> None:
    """Raises unless indices are whole numbers (a bool is none: it marks, and does not count) and weights are not."""
    if index.dtype not in _WHOLE or not weight.is_floating_point():
        got, fix = f"{index.dtype} and {weight.dtype}", "pass indices.long() and weights.float()"
        allowed = "be whole numbers and floating point"
        raise UsageError(word("indices and weights", got=got, allowed=allowed, where=where, fix=fix))


def check_range(what: str, index: Tensor, count: int, *, where: str) -> None:
    """Raises for an index outside [0, count) on a CPU; elsewhere the look would wait for the device."""
    if index.device.type != "cpu" or not index.numel() or torch.compiler.is_compiling():
        return
    least, most = (int(bound) for bound in index.aminmax())
    if least < 0 or most >= count:
        wrong = least if least < 0 else most
        fix = "leave such entries out; from_topk(..., dropped=that index) does" if what == "expert" else "leave it out"
        allowed = f"be from 0 to {count - 1}"
        raise UsageError(word(f"an index of {what}s", got=wrong, allowed=allowed, where=where, fix=fix))


def check_dropped(dropped: int, num_experts: int) -> None:
    """Raises for the index of an expert."""
    if 0 <= dropped < num_experts:
        allowed, fix = "be an index of no expert", f"pass dropped={num_experts} or dropped=-1"
        raise UsageError(word("dropped", got=dropped, allowed=allowed, where="Routing.from_topk", fix=fix))
