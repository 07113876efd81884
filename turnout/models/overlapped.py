"""A language model that many ranks train together, its blocks played by a schedule."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.models.block_tasks import BlockTasks
from turnout.models.lm import LM
from turnout.paths import Bank
from turnout.run.blocks.block import BlockPlayer, Played
from turnout.run.blocks.block_parts import Gated
from turnout.run.blocks.wire import Slow
from turnout.types import BlockSchedule, Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Overlapped", "own_experts"]

_WHERE = "turnout.models.Overlapped"
Objective = Callable[[Tensor, Sequence[Routing]], Tensor]


def own_experts(lm: LM, *, rank: int, ranks: int) -> LM:
    """The model with each bank cut, in place, to the experts of one of several ranks: expert e is with e // (E / G).

    Args:
        lm: with all experts.
        rank: which of the ranks that share them.
        ranks: G, how many share them.

    Raises:
        UsageError: they do not divide the experts, or there are factored ones.

    >>> from turnout.models import LMConfig, MoEConfig
    >>> moe = MoEConfig(num_experts=4, top_k=2, hidden=8)
    >>> lm = own_experts(LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, moe=moe)), rank=1, ranks=2)
    >>> lm.blocks[0].ff.bank.up.shape
    torch.Size([2, 16, 8])

    Source: Lepikhin et al., 2021, "GShard".
    """
    for name, bank in lm.named_modules():
        if not name.endswith("ff.bank"):
            continue
        if not isinstance(bank, Bank) or bank.num_experts % ranks:
            got = f"{type(bank).__name__} of {bank.num_experts} in {name} for {ranks} ranks"
            allowed, fix = "be a Bank that the ranks divide", "let fewer ranks share it"
            raise UsageError(word("experts", got=got, allowed=allowed, where=_WHERE, fix=fix))
        each = bank.num_experts // ranks
        for part, stack in list(bank.named_parameters()):
            own = torch.empty_like(stack[:each]).copy_(stack.detach()[rank * each : (rank + 1) * each])
            setattr(bank, part, nn.Parameter(own, requires_grad=stack.requires_grad))
        bank.num_experts = each
    return lm


class Overlapped:
    """Training steps of a language model on many ranks, all of its blocks played by one schedule.

    Args:
        lm: all of its blocks routed, its banks cut by ``own_experts``.
        schedule: of as many blocks.
        group: the ranks that share the experts.
        data: all ranks that work on parts of one batch; None where there is one.
        copies: the ranks that hold the same experts; None where each is with one.
        slow: as ``turnout.run.blocks.block.BlockPlayer``.
        held: as ``turnout.models.block_tasks.BlockTasks``; what it gives gets the gradients.

    Raises:
        UsageError: a model or a schedule that is not played.

    Source: Gao et al., 2025, "FlowMoE", for the schedule of whole blocks.
    """

    def __init__(
        self,
        lm: LM,
        schedule: BlockSchedule,
        *,
        group: "ProcessGroup",
        data: "ProcessGroup | None" = None,
        copies: "ProcessGroup | None" = None,
        slow: Mapping[str, Slow] | None = None,
        held: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
    ) -> None:
        if lm.pre_gate is not None:
            got, fix = "a model whose layers are all routed at once (PreGate)", "train without overlap"
            raise UsageError(word("the model", got=got, allowed="route in each layer", where=_WHERE, fix=fix))
        blocks = list(lm.blocks)
        self.parts = [BlockTasks(block, layer, held=held) for layer, block in enumerate(blocks)]  # pyrefly: ignore[bad-argument-type]
        self.lm, self._data = lm, data
        self.player = BlockPlayer(schedule, self.parts, group=group, data=data, copies=copies, slow=slow)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        self._rest = [p for p in lm.parameters() if id(p) not in inside and p.requires_grad]

    def step(
        self,
        id_BS: Tensor,
        target_BS: Tensor,
        *,
        tokens: int,
        attention_mask: Tensor | None = None,
        objective: Objective | None = None,
    ) -> Played:
        """Adds to every parameter's ``grad`` what one process with all ranks' sequences has.

        Args:
            id_BS: this rank's sequences.
            target_BS: as in ``LM.loss``.
            tokens: how many targets count, of all ranks together.
            attention_mask: as in ``LM.forward``.
            objective: this rank's loss from (its nats / tokens, its routings), where more than nats is minimised.

        Returns:
            This rank's loss, and when everything ran.

        Raises:
            ShapeError, UsageError: as ``LM.loss``; an objective under a schedule that turns by chunk, where the loss is
                taken before all have been routed.
        """
        if objective is not None and self.player.schedule.turn == "chunk":
            allowed = "be None with a schedule that turns by chunk, which takes the loss before all are routed"
            fix = "plan with costs whose sums=False, or minimise the nats alone"
            raise UsageError(word("objective", got="one", allowed=allowed, where=_WHERE, fix=fix))
        batch = self.lm.begin(id_BS, attention_mask=attention_mask)

        def loss(y_BSD: Tensor, rows: slice, gates: Sequence[Sequence[Gated]]) -> Tensor:
            places = batch.places
            if places is not None:
                places = dataclasses.replace(places, real_BT=places.real_BT[rows])
            nats = self.lm.nats(y_BSD, target_BS[rows], places=places) / tokens
            if objective is None:
                return nats
            real_T = None if batch.places is None else batch.places.real_BS.flatten()
            return objective(nats, [part.routing(each, real_T) for part, each in zip(self.parts, gates, strict=True)])

        kept = [parameter.grad for parameter in self._rest]
        for parameter in self._rest:
            parameter.grad = None
        played = self.player.step(batch.x_BSD, loss, batch)
        if batch.x_BSD.requires_grad:
            batch.x_BSD.backward(played.slope_BSD)
        self._sum(kept)
        return played

    def _sum(self, kept: Sequence[Tensor | None]) -> None:
        """Sums over the ranks what belongs to no block, and adds it to what was there before."""
        import torch.distributed as dist

        for parameter, before in zip(self._rest, kept, strict=True):
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if self._data is not None:
                dist.all_reduce(grad, group=self._data)
            parameter.grad = grad if before is None else before.add_(grad)

    def close(self) -> None:
        """Ends the wire's thread."""
        self.player.close()
