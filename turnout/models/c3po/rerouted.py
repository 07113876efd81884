"""A forward pass in which one token of each row is routed by given scores, or tells those that it has."""

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import ByScore
from turnout.layers import MoE
from turnout.layers.turnout import decide
from turnout.models.lm import LM
from turnout.models.padding import Places
from turnout.types import Routing
from turnout.wrappers import unwrapped

__all__ = ["Batch", "Rerouted", "batch_of", "own_scores"]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Prompts, what comes after them, and where each ends: (B, S) ids, padding after them, and (B,) lengths."""

    id_BS: Tensor
    length_B: Tensor
    last_B: Tensor


def batch_of(prompts: Any, answers: Any, device: torch.device) -> Batch:
    """Prompts with their answers but for the last token of those, which nothing is read after."""
    texts = [torch.tensor([*prompt, *answer[:-1]]) for prompt, answer in zip(prompts, answers, strict=True)]
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    length_B = torch.tensor([len(text) for text in texts], device=device)
    return Batch(nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device), length_B, last_B)


class Rerouted:
    """A ``detour`` of ``LM.hidden``: the last token of each prompt is routed by other scores in the last layers.

    Args:
        last_B: (B,) where each prompt ends.
        score_BLE: (B, L, E) the scores of that token in the last L routed layers, in the place of the router's.
        layers: how many routed layers the model has.
        core_BLE: (B, L, E) bool, experts whose scores a gradient is wanted of, also where they are not chosen; None
            for no gradient.
    """

    def __init__(self, last_B: Tensor, score_BLE: Tensor, layers: int, core_BLE: Tensor | None = None) -> None:
        self._last_B, self._score_BLE, self._core_BLE = last_B, score_BLE, core_BLE
        self._first = layers - score_BLE.shape[1]

    def __call__(self, layer: int, moe: MoE, x_BSD: Tensor, places: Places | None) -> Routing:
        """The routing of what this routed layer reads."""
        real_BS = None if places is None else places.real_BS
        if layer < self._first:
            return moe.route(x_BSD, real=real_BS)
        row_BS = torch.full(x_BSD.shape[:2], -1, device=x_BSD.device)
        row_BS[torch.arange(len(row_BS), device=x_BSD.device), self._last_B] = torch.arange(
            len(row_BS), device=x_BSD.device
        )
        place = layer - self._first
        core_BE = None if self._core_BLE is None else self._core_BLE[:, place]
        policy = _ByGiven(moe.router, self._score_BLE[:, place], core_BE)
        return decide(policy, x_BSD, row_BS, None, real_BS)


class _ByGiven(nn.Module):
    """A policy that is told in the place of its id which row's last token each token is; -1 for none."""

    def __init__(self, router: nn.Module | None, score_BE: Tensor, core_BE: Tensor | None) -> None:
        super().__init__()
        # In a tuple, or it would pass for a wrapper of the router.
        self._of = (cast(ByScore, unwrapped(cast(nn.Module, router))), score_BE, core_BE)

    def forward(self, x_TD: Tensor, *, token_id_T: Tensor, generator: torch.Generator | None = None) -> Routing:
        router, score_BE, core_BE = self._of
        logit_TE, own_TE = router.scored(x_TD)
        given_T = token_id_T >= 0
        row_N = token_id_T[given_T]
        score_TE = own_TE.detach().index_put((given_T,), score_BE[row_N].to(own_TE.dtype))
        index_TK, weight_TK = router.chosen(score_TE)
        sizes: dict[str, Any] = {"num_experts": router.num_experts, "score_TE": own_TE, "logit_TE": logit_TE}
        if core_BE is None:
            return Routing.from_topk(index_TK, weight_TK, **sizes)
        return _with_the_others(router, index_TK, weight_TK, score_TE, given_T, core_BE[row_N])


def _with_the_others(
    router: ByScore, index_TK: Tensor, weight_TK: Tensor, score_TE: Tensor, given_T: Tensor, core_NE: Tensor
) -> Routing:
    """The routing with core experts that are not chosen too: they weigh nothing, and have the gradient of more."""
    sums_T1 = score_TE.gather(1, index_TK).sum(1, keepdim=True)
    part_TE = score_TE * (weight_TK.sum(1, keepdim=True) / sums_T1).detach()  # in the units of weights
    other_TE = torch.zeros_like(score_TE, dtype=torch.bool)
    other_TE[given_T] = core_NE
    other_TE.scatter_(1, index_TK, False)
    token_R, expert_R = other_TE.nonzero(as_tuple=True)
    nothing_R = part_TE[token_R, expert_R]
    nothing_R = nothing_R - nothing_R.detach()
    T, K = index_TK.shape
    token_R = torch.cat([torch.arange(T, device=index_TK.device).repeat_interleave(K), token_R])
    expert_R = torch.cat([index_TK.reshape(-1), expert_R])
    weight_R = torch.cat([weight_TK.reshape(-1), nothing_R])
    return Routing.from_entries(token_R, expert_R, weight_R, num_tokens=T, num_experts=router.num_experts)


@torch.no_grad()
def own_scores(lm: LM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What the model's last token of each prompt is scored, (B, L, E) in all routed layers, and what comes out.

    Returns:
        the scores, (B, S, D) what the output layer reads, and (B, S) bool, which of it is of tokens.
    """
    found: list[Tensor] = []

    def listen(layer: int, moe: MoE, x_BSD: Tensor, places: Places | None) -> Routing:
        router: Any = unwrapped(cast(nn.Module, moe.router))
        x_BD = x_BSD[torch.arange(len(x_BSD), device=x_BSD.device), batch.last_B]
        found.append(router.scored(x_BD)[1])
        return moe.route(x_BSD, real=None if places is None else places.real_BS)

    hidden_BSD, _, _ = lm.hidden(batch.id_BS, batch.length_B, detour=listen)
    real_BS = torch.arange(batch.id_BS.shape[1], device=batch.id_BS.device) < batch.length_B[:, None]
    return torch.stack(found, 1), hidden_BSD, real_BS
