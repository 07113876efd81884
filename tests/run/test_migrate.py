"""Experts that move between processes in the middle of a run: the same losses to the bit, and the bytes predicted."""

import sys
from typing import Any

import pytest
import torch
from processes import spawn

from turnout.errors import UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.run.ranks.migrate import Moved, migrate
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.shard import experts_in, mesh, shard
from turnout.run.ranks.whole import settle, whole
from turnout.types.layout import Layout
from turnout.types.placement import Placement
from turnout.types.plan import Plan

WIDTH, HIDDEN, E = 16, 8, 8
# Of two layers: two experts of each change hands, and others their place on a process.
FIRST = Placement.contiguous((E, E), devices=2)
OTHER = Placement(2, (E, E), ((0, 2, 5, 7, 1, 3, 4, 6), (0, 1, 2, 4, 3, 5, 6, 7)), ((0, 0, 0, 0, 1, 1, 1, 1),) * 2)
# A slot more on each process: copies of two experts, which then become those of two others.
COPIES = Placement(2, (E, E), ((0, 1, 2, 3, 7, 0, 4, 5, 6, 7),) * 2, ((0,) * 5 + (1,) * 5,) * 2)
LATER = Placement(2, (E, E), ((0, 1, 2, 3, 4, 3, 4, 5, 6, 7),) * 2, ((0,) * 5 + (1,) * 5,) * 2)


def _run(layout: Layout, first: Placement, later: Placement | None) -> tuple[list[float], dict[str, Any], Moved | None]:
    """Losses of four steps of AdamW, the weights after them, and what moved after the second."""
    moe = MoEConfig(num_experts=E, top_k=3, hidden=HIDDEN, bias=True)
    model: Any = LM(LMConfig(vocab_size=31, width=WIDTH, layers=2, heads=2, max_seq=32, init_std=0.2, moe=moe), seed=1)
    meshes, moved, losses = mesh(layout), None, []
    shard(model, layout, meshes, plan=Plan(layout, placement=first))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        id_BS = torch.randint(31, (8, 9), generator=torch.Generator().manual_seed(step))
        own_BS = id_BS.chunk(layout.data_ranks)[meshes.data_rank]
        optimizer.zero_grad()
        loss = model.loss(own_BS[:, :-1], own_BS[:, 1:], backend="reference").nats / 64
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step == 1 and later is not None:
            optimizer.zero_grad()
            moved = migrate(model, later, meshes, optimizer=optimizer)
    settle(model)
    return losses, {name: tensor.clone() for name, tensor in whole(model, dict(model.named_parameters()))}, moved


def both(ranks: Ranks, layouts: list[Layout]) -> list[str]:
    """What is wrong with runs that migrate beside ones that do not."""
    return [f"{layout}: {each}" for layout in layouts for each in _wrong(layout)]


def _wrong(layout: Layout) -> list[str]:
    wrong = []
    stays, weights, _ = _run(layout, FIRST, None)
    moves, others, moved = _run(layout, FIRST, OTHER)
    if stays != moves:
        wrong.append(f"losses {stays} and {moves}")
    wrong += [name for name, weight in weights.items() if not torch.equal(weight, others[name])]
    each = 3 * WIDTH * HIDDEN + 2 * HIDDEN + WIDTH  # numbers of an expert; with two moments, of four bytes
    predicted = FIRST.moved(OTHER, expert_bytes=each * 3 * 4)
    assert moved is not None
    if moved.bytes != predicted.bytes or sorted(moved.copies) != sorted(predicted.copies):
        wrong.append(f"{moved}, not {predicted}")
    alike, known, _ = _run(layout, COPIES, None)
    copied, seen, _ = _run(layout, COPIES, LATER)
    if not torch.allclose(torch.tensor(alike), torch.tensor(copied), rtol=1e-5):
        wrong.append(f"with copies: losses {alike} and {copied}")
    wrong += [f"with copies: {name}" for name, w in known.items() if not torch.allclose(w, seen[name], atol=1e-4)]
    return wrong


@pytest.mark.slow
def test_a_move_changes_no_bit_and_sends_what_was_predicted() -> None:
    """Weights and both moments travel; with copies, whose sums are in another order, up to rounding."""
    assert spawn(2, both, [Layout(dp_shard=2, ep=2)]) == [[], []]
    assert spawn(4, both, [Layout(dp_shard=4, ep=2), Layout(dp_replicate=2, dp_shard=2, ep=2)]) == [[]] * 4


def left_behind(ranks: Ranks) -> dict[str, bool]:
    """Whether a run is another when the optimizer's moments stay where they were, and what is refused."""
    layout = Layout(dp_shard=2, ep=2)
    stays, _, _ = _run(layout, FIRST, None)
    module: Any = sys.modules["turnout.run.ranks.migrate"]
    send = module._send
    module._send = lambda parameter, tensors, *rest: send(parameter, tensors[:1], *rest)
    try:
        moves, _, _ = _run(layout, FIRST, OTHER)
    finally:
        module._send = send
    model, meshes = LM(LMConfig(vocab_size=9, width=8, layers=1, heads=1, moe=MoEConfig(4, 1, 4))), mesh(layout)
    shard(model, layout, meshes)
    said = {"moments matter": stays != moves}
    tries = {
        "4 that there is room for": Placement(2, (4,), ((0, 1, 2, 2, 3, 0),), ((0, 0, 0, 1, 1, 1),)),
        "zero_grad": Placement.contiguous((4,), devices=2),
    }
    for words, placement in tries.items():
        weight = next(experts_in(model)[0][1].parameters())
        weight.grad = torch.zeros_like(weight) if words == "zero_grad" else None
        try:
            migrate(model, placement, meshes)
            said[words] = False
        except UsageError as error:
            said[words] = words in str(error)
    return said


@pytest.mark.slow
def test_moments_left_behind_would_show() -> None:
    """The off arm; and what a migration refuses."""
    assert spawn(2, left_behind) == [{"moments matter": True, "4 that there is room for": True, "zero_grad": True}] * 2
