"""ZeRO++'s collectives: rounded by no more than half a step, sums that are sums, and the bytes that were promised."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from processes import spawn

from turnout.errors import UsageError
from turnout.models import LM, LMConfig
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.shard import mesh, shard
from turnout.run.ranks.zero_plus_plus import Int4Reduce, Int8Gather, pack, travel, unpack
from turnout.types import Layout, Plan


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
@pytest.mark.parametrize(("rows", "numbers", "block"), [(1, 1, 2), (3, 257, 64), (2, 64, 64), (4, 5, 128)])
def test_no_number_is_off_by_more_than_half_a_step(bits, most, rows, numbers, block):
    generator = torch.Generator().manual_seed(7)
    x_MN = torch.randn(rows, numbers, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    got_MN = unpack(pack(x_MN, bits, block), numbers, bits, block)
    for start in range(0, numbers, block):
        part, back = x_MN[:, start : start + block], got_MN[:, start : start + block]
        step = part.abs().amax(1, keepdim=True) / most
        assert ((part - back).abs() <= step / 2 * (1 + 1e-5)).all()
    assert not torch.equal(x_MN, got_MN) or numbers == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_stays_so_and_zeros_are_zeros(bits):
    x_MN = torch.zeros(4, 8)
    x_MN[0, 3], x_MN[1, 2] = math.nan, math.inf
    got_MN = unpack(pack(x_MN, bits, 8), 8, bits, 8)
    assert got_MN[:2].isnan().all() and torch.equal(got_MN[2:], torch.zeros(2, 8))


def test_bytes_of_several_dtypes_are_refused() -> None:
    """torch gathers parameters of unlike dtypes as bytes, which would be rounded as if they were numbers."""
    bytes_N = torch.arange(256, dtype=torch.uint8)
    with pytest.raises(UsageError, match="numbers of one dtype"):
        Int8Gather()(torch.empty_like(bytes_N), bytes_N, None)


def _reduced(ranks: Ranks) -> dict[str, object]:
    """Sums of known parts in one hop and in two; what a mean is told; a model that learns through both."""
    generator = torch.Generator().manual_seed(ranks.rank)
    parts = torch.randn(4 * 512, generator=generator)
    want = parts.clone()
    dist.all_reduce(want)
    want = want.view(4, -1)[ranks.rank]
    found: dict[str, object] = {}
    for name, node in (("one", None), ("two", 2)):
        reduce, out = Int4Reduce(node), torch.empty(512)
        reduce(output_tensor=out, input_tensor=parts, group=dist.group.WORLD, op=dist.ReduceOp.SUM)
        found |= {f"{name} off": float((out - want).abs().max()), f"{name} sent": reduce.sent_bytes}
        found[f"{name} between"] = reduce.between_bytes
    try:
        Int4Reduce()(torch.empty(512), parts, dist.group.WORLD, dist.ReduceOp.AVG)
    except UsageError as error:
        found["refused"] = str(error)
    gather, out = Int8Gather(), torch.empty(4 * 512)
    gather(output_tensor=out, input_tensor=parts[:512], group=dist.group.WORLD)
    found["gathered"], found["gather sent"] = out, gather.sent_bytes
    found["gathers"] = {secondary: _gathers(secondary) for secondary in (None, 2)}
    found["learnt"] = {name: _learn(*how) for name, how in _WAYS.items()}
    return found


_WAYS = {"full": ("full", "full", None), "small": ("int8", "int4", None), "nodes": ("int8", "int4", 2)}


def _gathers(secondary) -> tuple[list[int], list[int]]:
    """How many processes every gather of parameters is among, in a forward and in a backward pass."""
    lm = LM(LMConfig(vocab_size=64, width=32, layers=2, heads=2, hidden=64, max_seq=16), seed=0)
    layout = Layout(dp_shard=4)
    shard(lm, layout, mesh(layout), plan=Plan(layout, **({"secondary": secondary} if secondary else {})))
    seen, gather = [], dist.all_gather_single

    def watched(*tensors, group=None, **how):
        seen.append(dist.get_world_size(group))
        return gather(*tensors, group=group, **how)

    id_BS = torch.arange(34).view(2, 17)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_single", watched)
        loss = lm.loss(id_BS[:, :-1], id_BS[:, 1:]).nats
        forward = seen.copy()
        loss.backward()
    return forward, seen[len(forward) :]


def _learn(gather, reduce, node) -> list[float]:
    lm = LM(LMConfig(vocab_size=64, width=32, layers=2, heads=2, hidden=64, max_seq=16, tie_embeddings=True), seed=0)
    layout = Layout(dp_shard=4)
    plan, meshes = Plan(layout, gather=gather, reduce=reduce), mesh(layout)
    shard(lm, layout, meshes, plan=plan, travel=travel(plan, node=node))
    adam = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        rows = torch.arange(17).add(torch.randint(0, 64, (8, 1), generator=generator)) * 3 % 64
        mine = rows[2 * meshes.data_rank : 2 * meshes.data_rank + 2]
        loss = lm.loss(mine[:, :-1], mine[:, 1:]).nats / (8 * 16)
        loss.backward()
        adam.step()
        adam.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


@pytest.mark.slow
def test_four_processes():
    found = spawn(4, _reduced)
    parts = [torch.randn(4 * 512, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    for each in found:
        # Four parts, each off by half a step of max / 7; in two hops the sums of two are rounded once more.
        assert 0 < each["one off"] < 4 * 4.5 / 14 and 0 < each["two off"] < 6 * 4.5 / 14
        assert each["one sent"] == 3 * 4 * (64 + 4) and each["one between"] == 0
        assert each["two between"] == 4 * (64 + 4), "between nodes half of a half, not three quarters"
        assert "must be a sum" in each["refused"]
        assert each["gather sent"] == 3 * 2 * (256 + 4)
        whole = torch.cat([part[:512] for part in parts])
        assert torch.equal(each["gathered"], found[0]["gathered"])
        assert 0 < float((each["gathered"] - whole).abs().max()) < 4.5 / 127
        full, small, nodes = (each["learnt"][name] for name in _WAYS)
        assert full[-1] < 0.7 * full[0]
        assert small[-1] == pytest.approx(full[-1], rel=0.01) and nodes[-1] == pytest.approx(full[-1], rel=0.01)
        # With a second copy inside a node nothing is gathered from other nodes for the backward pass.
        assert each["gathers"] == {None: ([4, 4, 4], [4, 4]), 2: ([4, 4, 4], [2, 2])}
        assert small != full and nodes != small


def test_a_plan_that_needs_nothing_gets_nothing():
    assert travel(Plan(Layout(dp_shard=2), gather="bf16")) is None
    assert copy.copy(travel(Plan(Layout(dp_shard=2), gather="int8"))) is not None
