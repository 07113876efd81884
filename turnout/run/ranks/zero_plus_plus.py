"""ZeRO++: parameters gathered as blockwise int8, gradients reduced as blockwise int4, in one hop or by nodes in two."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.run.ranks.processes import as_patient
from turnout.types.plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.fsdp import FSDPModule

__all__ = ["Int4Reduce", "Int8Gather", "pack", "travel", "unpack"]

_WHERE = "turnout.run.ranks.zero_plus_plus"


def pack(x_MN: Tensor, bits: int, block: int) -> Tensor:
    """Rows of numbers as bytes: for every ``block`` of them whole numbers of so many bits, and the scale in fp32.

    x is round(x / s) s with s = max |x| / (2^(bits - 1) - 1) over the block, so that none is off by more than s / 2. A
    block with a number that is not finite comes out as NaN.

    Args:
        x_MN: (M, N).
        bits: 8 or 4; two numbers of 4 bits make a byte.
        block: numbers that share a scale, even.

    Returns:
        (M, bytes) uint8.

    >>> pack(torch.tensor([[1.0, -2.0, 0.5]]), 8, 4).shape
    torch.Size([1, 8])

    Source: Wang et al., 2023, "ZeRO++: Extremely Efficient Collective Communication for Giant Model Training".
    """
    rows, numbers = x_MN.shape
    blocks = -(-numbers // block)
    x_MBN = torch.nn.functional.pad(x_MN.float(), (0, blocks * block - numbers)).view(rows, blocks, block)
    most = float(2 ** (bits - 1) - 1)
    scale_MB1 = x_MBN.abs().amax(2, keepdim=True) / most
    whole = torch.where(scale_MB1 > 0, x_MBN / scale_MB1, 0.0).round_().clamp_(-most, most).to(torch.int8)
    whole = whole.view(rows, blocks * block)
    if bits == 4:
        low, high = whole[:, ::2].to(torch.uint8) & 15, whole[:, 1::2].to(torch.uint8) & 15
        packed = low | (high << 4)
    else:
        packed = whole.view(torch.uint8)
    return torch.cat([packed, scale_MB1.view(rows, blocks).contiguous().view(torch.uint8)], dim=1)


def unpack(bytes_MX: Tensor, numbers: int, bits: int, block: int) -> Tensor:
    """(M, numbers) fp32 that ``pack`` made bytes of.

    Args:
        bytes_MX: (M, bytes) uint8.
        numbers: N.
        bits: as for ``pack``.
        block: as for ``pack``.

    >>> unpack(pack(torch.tensor([[7.0, -3.5, 1.0]]), 4, 4), 3, 4, 4).tolist()
    [[7.0, -4.0, 1.0]]

    Source: as ``pack``.
    """
    rows, blocks = bytes_MX.shape[0], -(-numbers // block)
    data = blocks * block * bits // 8
    scale_MB1 = (
        bytes_MX[:, data:].clone(memory_format=torch.contiguous_format).view(torch.float32).view(rows, blocks, 1)
    )
    packed = bytes_MX[:, :data].contiguous()
    if bits == 4:
        both = torch.stack([packed & 15, packed >> 4], dim=2).view(rows, -1).to(torch.int8)
        whole = torch.where(both > 7, both - 16, both)
    else:
        whole = packed.view(torch.int8)
    return (whole.view(rows, blocks, block).float() * scale_MB1).view(rows, -1)[:, :numbers]


class _Travel:
    """What torch asks of a collective that stands in for its own."""

    def __init__(self) -> None:
        self.sent_bytes = 0  # by this process, to others

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The buffer that a collective reads or fills."""
        return torch.empty(*size, dtype=dtype, device=device)


class Int8Gather(_Travel):
    """qwZ: an all-gather of parameters that travel as int8 with a scale for every block; every process, the owner too,
    then computes with the same rounded ones, while what is stored stays whole.

    Args:
        block: numbers that share a scale.

    >>> Int8Gather().sent_bytes
    0

    Source: Wang et al., 2023, "ZeRO++". Scales are fp32 beside the numbers, in the same message.
    """

    def __init__(self, block: int = 256) -> None:
        super().__init__()
        self.block = block

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: "ProcessGroup", async_op: bool = False
    ) -> None:
        """Fills ``output_tensor`` with what all processes have in ``input_tensor``.

        Raises:
            UsageError: bytes, which torch makes of parameters of several dtypes that it gathers together.
        """
        import torch.distributed as dist

        if not input_tensor.is_floating_point():
            got, allowed = f"{input_tensor.dtype}", "be numbers of one dtype, to be rounded"
            fix = "give all parameters of a unit one dtype: model.float(), or gather='full'"
            raise UsageError(word("what is gathered", got=got, allowed=allowed, where=_WHERE, fix=fix))
        sent = pack(input_tensor.view(1, -1), 8, self.block)
        found = torch.empty(group.size() * sent.numel(), dtype=torch.uint8, device=sent.device)
        dist.all_gather_single(found, sent.view(-1), group=group)
        self.sent_bytes += sent.numel() * (group.size() - 1)
        rows = unpack(found.view(group.size(), -1), input_tensor.numel(), 8, self.block)
        output_tensor.copy_(rows.reshape(-1))


class Int4Reduce(_Travel):
    """qgZ: a reduce-scatter of gradients that travel as int4 and are summed in fp32.

    In one hop every process sends every other its part. In two, each node first sums what its processes have for the
    same place in other nodes, so that between nodes a part travels once a node; it is rounded once more.

    Args:
        node: processes of a node, consecutive in the group; None for one hop.
        block: numbers that share a scale.

    Raises:
        UsageError: a node that does not divide the group.

    >>> Int4Reduce(node=2).between_bytes
    0

    Source: Wang et al., 2023, "ZeRO++", the hierarchical all-to-all of section 3.3.
    """

    def __init__(self, node: int | None = None, block: int = 128) -> None:
        super().__init__()
        self.node, self.block = node, block
        self.between_bytes = 0  # of what was sent, that to other nodes
        self._groups: Any = {}  # group -> this node, this place in every node

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: "ProcessGroup", op: Any, async_op: bool = False
    ) -> None:
        """Fills ``output_tensor`` with this process's part of the sum of all ``input_tensor``.

        Raises:
            UsageError: asked for anything but a sum.
        """
        import torch.distributed as dist

        if op != dist.ReduceOp.SUM:
            got, fix = f"{op}", "shard the model with turnout.run.ranks.shard, which sums"
            raise UsageError(word("the reduction", got=got, allowed="be a sum", where=_WHERE, fix=fix))
        n = group.size()
        parts_NM = input_tensor.view(n, -1)
        node = n if self.node is None else min(self.node, n)
        if n % node:
            got, allowed = f"{node} processes", f"divide the {n} that share a shard"
            raise UsageError(word("a node", got=got, allowed=allowed, where=_WHERE, fix="leave node out for one hop"))
        if node in (1, n):
            summed = self._exchange(parts_NM, group).sum(0)
            self.between_bytes += 0 if self.node is None or node == n else self._bytes(parts_NM) * (n - 1) // n
        else:
            inside, across = self._hops(group, node)
            # Place (k, j): process j of node k. Process j of this node gets what it passes on to (k, j) for all k.
            here = parts_NM.view(n // node, node, -1).transpose(0, 1).reshape(node, -1)
            mine = self._exchange(here, inside).sum(0).view(n // node, -1)
            self.between_bytes += self._bytes(mine) * (n // node - 1) // (n // node)
            summed = self._exchange(mine, across).sum(0)
        output_tensor.copy_(summed)

    def _bytes(self, rows: Tensor) -> int:
        blocks = -(-rows.shape[1] // self.block)
        return rows.shape[0] * blocks * (self.block // 2 + 4)

    def _exchange(self, rows: Tensor, group: "ProcessGroup") -> Tensor:
        """Row i to process i; what comes back, a row from each, in fp32."""
        import torch.distributed as dist

        sent = pack(rows, 4, self.block)
        found = torch.empty_like(sent)
        dist.all_to_all_single(found, sent, group=group)
        self.sent_bytes += sent.numel() * (group.size() - 1) // group.size()
        return unpack(found, rows.shape[1], 4, self.block)

    def _hops(self, group: "ProcessGroup", node: int) -> tuple[Any, Any]:
        """The processes of this node, and those that have this one's place in every node."""
        import torch.distributed as dist

        if group not in self._groups:
            ranks, me = dist.get_process_group_ranks(group), group.rank()
            inside = ranks[me // node * node : (me // node + 1) * node]
            across = ranks[me % node :: node]
            made = [dist.new_group(each, use_local_synchronization=True) for each in (inside, across)]
            self._groups[group] = tuple(map(as_patient, made))  # pyrefly: ignore[bad-argument-type]
        return self._groups[group]


def travel(plan: Plan, *, node: int | None = None) -> Callable[["FSDPModule"], None] | None:
    """What ``turnout.run.ranks.shard`` is given for a plan's ``gather`` and ``reduce``; None where torch's own will do.

    Args:
        plan: int8 gathers get ``Int8Gather``, int4 reductions ``Int4Reduce``.
        node: processes of a node, for two hops.

    >>> travel(Plan()) is None
    True

    Source: Wang et al., 2023, "ZeRO++". Its third part, hpZ, is ``Plan.secondary``.
    """
    if plan.gather != "int8" and plan.reduce != "int4":
        return None

    def put(part: "FSDPModule") -> None:
        if plan.gather == "int8":
            part.set_custom_all_gather(Int8Gather())  # pyrefly: ignore[bad-argument-type]
        if plan.reduce == "int4":
            part.set_custom_reduce_scatter(Int4Reduce(node))  # pyrefly: ignore[bad-argument-type]

    return put
