"""What a trace says of its experts is what a loop over its tokens says, however it is cut into pieces."""

import sys

import numpy as np
import pytest
import torch

from turnout.errors import ShapeError
from turnout.types import Placement, Routing, Trace, TraceWriter, Traffic


@pytest.mark.parametrize("seed", range(4))
def test_a_trace_is_read_as_token_by_token(seed, tmp_path, monkeypatch):
    """Tokens with no, one and several experts in a layer."""
    rng = np.random.default_rng(seed)
    sizes, tokens = (3, 5, 4), 40
    chosen = [[np.nonzero(rng.random(experts) < 0.4)[0] for _ in range(tokens)] for experts in sizes]
    with TraceWriter(tmp_path / "t", num_experts_L=sizes, domains=["all"]) as writer:
        routings = []
        for experts, rows in zip(sizes, chosen, strict=True):
            token_R = torch.tensor([t for t, row in enumerate(rows) for _ in row])
            expert_R = torch.tensor([int(e) for row in rows for e in row])
            ones = torch.ones(len(expert_R))
            routings.append(Routing.from_entries(token_R, expert_R, ones, num_tokens=tokens, num_experts=experts))
        writer.add(routings, document_tokens=[tokens], document_domains=[0])
    monkeypatch.setattr(sys.modules["turnout.types.traffic"], "_TOKENS", 7)
    told = Traffic.of(Trace.open(tmp_path / "t"))
    for layer in range(3):
        assert told.load_LE[layer].tolist() == [sum(e in row for row in chosen[layer]) for e in range(sizes[layer])]
    for layer in range(2):
        wanted = np.zeros((sizes[layer], sizes[layer + 1]))
        for left, right in zip(chosen[layer], chosen[layer + 1], strict=True):
            for e in left:
                wanted[e, right] += 1 / (len(left) * len(right)) if len(right) else 0
        assert told.step_LEE[layer] == pytest.approx(wanted), f"seed {seed}"
    assert told.num_tokens == tokens and len(told.source) == 64


def test_dealing_evenly_is_what_drawing_copies_gives():
    rng = np.random.default_rng(0)
    step_EE = rng.random((4, 4))
    told = Traffic((step_EE.sum(1), step_EE.sum(0)), (step_EE,))
    held = np.array([[1, 1, 0, 0], [1, 0, 1, 1]], dtype=bool)
    placement = Placement.of([held, held[::-1]])
    drawn, left, right = 0.0, placement.held(0), placement.held(1)
    for e in range(4):
        for f in range(4):
            pairs = [(g, h) for g in left[:, e].nonzero()[0] for h in right[:, f].nonzero()[0]]
            drawn += step_EE[e, f] * np.mean([g != h for g, h in pairs])
    assert told.crossing(placement) == pytest.approx(drawn / step_EE.sum())
    assert told.time(placement)[0].sum() == pytest.approx(step_EE.sum())


def test_tables_of_different_models_are_refused():
    with pytest.raises(ShapeError, match=r"Traffic\.of"):
        Traffic((np.ones(2), np.ones(2)), (np.ones((2, 3)),))
    with pytest.raises(ShapeError, match="that the trace is of"):
        Traffic((np.ones(2),), ()).imbalance(Placement.contiguous([3], devices=1))
