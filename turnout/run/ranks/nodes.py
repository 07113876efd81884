"""An all-to-all in two stages: inside each node first, and then between nodes in few and large messages."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.run.ranks.exchange import counts_from, exchange

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Nodes"]


class Nodes:
    """The processes of a group by the nodes that they are in: process p is in node p // per_node.

    All processes make it together, as it makes groups of them.

    Args:
        group: W processes.
        per_node: g of them are in each node.

    Raises:
        UsageError: nodes that do not divide the group.

    Source: Hwang et al., 2023, "Tutel: Adaptive Mixture-of-Experts at Scale", two-dimensional hierarchical all-to-all.
    """

    def __init__(self, group: "ProcessGroup", per_node: int) -> None:
        import torch.distributed as dist

        world = group.size()
        if per_node < 1 or world % per_node:
            near = max(each for each in range(1, world + 1) if world % each == 0 and each <= max(1, per_node))
            allowed = f"divide the {world} processes"
            fix = f"pass per_node={near}"
            raise UsageError(word("per_node", got=per_node, allowed=allowed, where="turnout.run.Nodes", fix=fix))
        self.per_node, self.nodes = per_node, world // per_node
        ranks = torch.tensor(dist.get_process_group_ranks(group)).view(self.nodes, per_node)
        self._inside = _own(ranks.tolist())
        self._across = _own(ranks.t().tolist())

    @property
    def messages(self) -> int:
        """That a process sends to others: (g - 1) + (W / g - 1), in place of W - 1."""
        return (self.per_node - 1) + (self.nodes - 1)

    def exchange(self, rows: Tensor, sent: Sequence[int]) -> tuple[Tensor, list[int]]:
        """The rows that came from process 0, then those from process 1, and so on, and how many each; differentiable.

        A process first gives each other one in its node what goes to the processes with that one's place in any node;
        those then send one message to each node.

        Args:
            rows: (R, ...), first those for process 0 of the group, then those for process 1, and so on.
            sent: how many of them go to each.
        """
        N, g = self.nodes, self.per_node
        sent_NG = torch.tensor(sent, dtype=torch.int64, device=rows.device).view(N, g)
        rows = _turned(rows, sent_NG)
        came_GN = counts_from(sent_NG.t().contiguous(), self._inside)
        rows = exchange(rows, sent_NG.sum(0).tolist(), came_GN.sum(1).tolist(), self._inside)
        rows = _turned(rows, came_GN)
        found_NG = counts_from(came_GN.t().contiguous(), self._across)
        rows = exchange(rows, came_GN.sum(0).tolist(), found_NG.sum(1).tolist(), self._across)
        return rows, found_NG.flatten().tolist()


def _own(groups: list[list[int]]) -> "ProcessGroup":
    """This process's of some groups that all are in; each is made by all."""
    import torch.distributed as dist

    made = [dist.new_group(ranks) for ranks in groups]
    (own,) = [one for one, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks]
    return own  # pyrefly: ignore[bad-return] - of the groups that this process is not in it is a number


def _turned(rows: Tensor, count_AB: Tensor) -> Tensor:
    """Rows that lie in parts a by a, and in each b by b, so that they lie b by b, and in each a by a."""
    A, B = count_AB.shape
    part_R = torch.arange(A * B, device=rows.device).repeat_interleave(count_AB.flatten())
    return rows.index_select(0, (part_R % B * A + part_R // B).argsort(stable=True))
