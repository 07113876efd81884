"""Rows sent from each process of a group to each other one, as many to each as it likes; gradients go back the way."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turnout.errors import UsageError, word

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["counts_from", "exchange", "own_part", "refuse_second"]


def counts_from(sent_GN: Tensor, group: "ProcessGroup") -> Tensor:
    """(G, N) int64, what each process of the group says to this one, which says row g of ``sent_GN`` to process g.

    Args:
        sent_GN: (G, N) int64, N of the same size everywhere.
        group: G processes.

    Source: none; one all-to-all.
    """
    import torch.distributed as dist

    found_GN = torch.empty_like(sent_GN)
    dist.all_to_all_single(found_GN, sent_GN.contiguous(), group=group)
    return found_GN


def exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: "ProcessGroup") -> Tensor:
    """The rows that came from process 0, then those from process 1, and so on; differentiable.

    Args:
        rows: (R, ...), first those for process 0 of the group, then those for process 1, and so on.
        sent: how many of them go to each; some or all may be 0.
        received: how many come from each, as its own ``sent`` says.
        group: the processes.

    Source: none; torch's own uneven all-to-all.
    """
    from torch.distributed import _functional_collectives as collectives

    # It gives a tensor that waits when it is first used; waiting here keeps every caller's own arithmetic plain.
    found = collectives.all_to_all_single(rows.contiguous(), list(received), list(sent), group)
    return collectives.wait_tensor(found)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that processes share; gradients reach the whole. Any other is itself.

    >>> own_part(torch.ones(2))
    tensor([1., 1.])

    Source: none; asks torch.
    """
    to_local = getattr(tensor, "to_local", None)  # of a DTensor, whose module takes long to import
    return tensor if to_local is None else to_local()


def refuse_second(grad: Tensor) -> None:
    """Refuses to be differentiated once more: sums over processes are not followed twice.

    Raises:
        UsageError: the backward pass is to be differentiated.
    """
    if torch.is_grad_enabled() and grad.requires_grad:
        allowed, fix = "be taken once", "leave create_graph out, or run in one process"
        got = "a second derivative"
        raise UsageError(word("gradients over processes", got=got, allowed=allowed, where="turnout.run.ranks", fix=fix))
