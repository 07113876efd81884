"""The blocks of a language model, cut where a block schedule cuts them."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from turnout.decide.token import GroupLimited, Hash, LossFree, TopK
from turnout.errors import UsageError, word
from turnout.layers import MoE
from turnout.models.batch import Batch
from turnout.models.block import Block
from turnout.models.padding import Places
from turnout.paths import Bank
from turnout.run import activate
from turnout.run.blocks.block_parts import Gated
from turnout.types import Routing
from turnout.wrappers import unwrapped

__all__ = ["BlockTasks"]

_WHERE = "turnout.models.BlockTasks"
# Routers that look at one token at a time, so that a part of a batch is routed as in the whole, and none that draws.
_ALONE = (TopK, LossFree, GroupLimited, Hash)


def _whole(parameter: nn.Parameter) -> nn.Parameter:
    return parameter


class BlockTasks:
    """One routed block of an ``LM`` as ``turnout.run.BlockPlayer`` plays it, on a rank that holds some of its experts.

    Args:
        block: its bank holds this rank's experts alone; its router knows all.
        layer: which of the model's it is.
        held: what of an expert's parameter is this rank's, as a plain one; the parameter itself by default.

    Raises:
        UsageError: a block without experts, or of a sort whose parts of a batch do not add up to the whole.

    Source: none; ``turnout.models.block.Block`` in pieces.
    """

    def __init__(self, block: Block, layer: int, *, held: Callable[[nn.Parameter], nn.Parameter] = _whole) -> None:
        self._block, self._layer = block, layer
        moe = unwrapped(block.ff)
        if not isinstance(moe, MoE):
            raise _refuse(layer, "a dense feed-forward layer", "have experts", "plan for the routed blocks alone")
        self._moe, self._router = moe, moe.router
        router = unwrapped(moe.router) if moe.router is not None else None
        if not isinstance(router, _ALONE) or getattr(router, "capacity_factor", None) is not None:
            names = ", ".join(kind.__name__ for kind in _ALONE)
            got = f"the router {type(router).__name__}" + (" with a capacity" if isinstance(router, _ALONE) else "")
            fix = "train without overlap, or with one of these routers"
            raise _refuse(layer, got, f"have a router that looks at one token at a time ({names}, no capacity)", fix)
        bank = unwrapped(moe.bank)
        if not isinstance(bank, Bank) or moe.label_E is not None:
            got = "factored or packed experts" if not isinstance(bank, Bank) else "experts that share weights"
            raise _refuse(layer, got, "have experts with weights of their own", "train without overlap")
        if hasattr(bank, "unshard"):
            got, fix = "experts as FSDP2 holds them", "shard the model with a plan that has the schedule"
            raise _refuse(layer, got, "have experts that nothing else shards", fix)
        self._activation, self.num_experts = bank.activation, router.num_experts
        own = {id(each) for each in bank.parameters()}
        self.dense: Sequence[Tensor] = [each for each in block.parameters() if id(each) not in own]
        known = {name: held(each) for name, each in bank.named_parameters()}
        self.expert: Sequence[Tensor] = list(known.values())
        self._up, self._down = known["up"], known["down"]
        self._up_bias, self._down_bias = known.get("up_bias"), known.get("down_bias")
        drops = [name for name, each in block.named_modules() if isinstance(each, nn.Dropout) and each.p > 0]
        if drops:
            raise _refuse(layer, f"dropout in {drops[0]}", "draw nothing", "set its p to 0")

    def attention(self, x_BSD: Tensor, about: Batch, rows: slice) -> Tensor:
        """The tokens after attention, which is added to what was normed for it."""
        block, places, angles = self._block, _of(about.places, rows), about.angles_L[self._layer]
        angles = tuple(each[rows] if each.ndim == 3 else each for each in angles)
        normed_BSD = x_BSD if block.attention_norm is None else block.attention_norm(x_BSD)
        made_BSD = block.attention(normed_BSD, angles, None, places)
        return block.add(x_BSD, made_BSD, block.attention_out_norm)

    def gate(self, x_BSD: Tensor, about: Batch, rows: slice) -> Gated:
        """Where each token goes, and what the shared expert makes of it."""
        moe, places = self._moe, _of(about.places, rows)
        normed_BSD = x_BSD if self._block.ff_norm is None else self._block.ff_norm(x_BSD)
        real = None if places is None else places.real_BS
        routing = moe.route(normed_BSD, token_id=about.id_BS[rows], real=real)
        order_R, start_T = routing.by_token
        always = moe.always(normed_BSD)
        kept = (x_BSD.flatten(0, 1),) if always is None else (x_BSD.flatten(0, 1), always.flatten(0, 1))
        if routing.score_TE is None and routing.logit_TE is not None:
            raise _refuse(self._layer, "logits without scores", "give both, or scores alone", "train without overlap")
        scores = (routing.score_TE, routing.logit_TE)
        return Gated(
            x_TD=normed_BSD.flatten(0, 1),
            weight_R=routing.weight_R[order_R],
            expert_R=routing.expert_R[order_R],
            start_T=start_T,
            kept=kept,
            aside=tuple(each for each in scores if each is not None),
        )

    def routing(self, gates: Sequence[Gated], real_T: Tensor | None) -> Routing:
        """The routing of all tokens from what the gate said of each chunk; gradients go to the chunks' asides."""
        first, tokens_R, found = 0, [], {}
        for gated in gates:
            count_T = gated.start_T.diff()
            tokens_R.append(first + torch.arange(len(count_T), device=count_T.device).repeat_interleave(count_T))
            first += len(count_T)
        scores = [torch.cat(each) for each in zip(*(gated.aside for gated in gates), strict=True)]
        if scores:
            found = {"score_TE": scores[0], "logit_TE": scores[1] if len(scores) > 1 else None}
        routing = Routing.from_entries(
            torch.cat(tokens_R),
            torch.cat([gated.expert_R for gated in gates]),
            torch.cat([gated.weight_R for gated in gates]),
            num_tokens=first,
            num_experts=self.num_experts,
            **found,
        )
        return routing if real_T is None else dataclasses.replace(routing, real_T=real_T)

    def experts(self, row_ND: Tensor, load: Sequence[int], linear: Callable[..., Tensor]) -> Tensor:
        """Each expert's rows through it, one expert after another."""
        found = []
        for expert, row_MD in enumerate(row_ND.split(list(load))):
            wide = linear(row_MD, self._up, self._up_bias, expert)
            found.append(linear(activate(wide, self._activation), self._down, self._down_bias, expert))
        return torch.cat(found)

    def combine(self, sum_TD: Tensor, *kept: Tensor) -> Tensor:
        """The tokens after their experts, the shared one too, whose sum is normed and added."""
        x_TD, *always = kept
        return self._block.add(x_TD, sum_TD + always[0].to(sum_TD.dtype) if always else sum_TD, self._block.ff_out_norm)


def _of(places: Places | None, rows: slice) -> Places | None:
    return None if places is None else dataclasses.replace(places, real_BT=places.real_BT[rows])


def _refuse(layer: int, got: str, allowed: str, fix: str) -> UsageError:
    return UsageError(word(f"block {layer}", got=got, allowed=allowed, where=_WHERE, fix=fix))
