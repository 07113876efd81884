"""What a crowd's load tells: nothing that fewer than so many sent, and never what is left of a sum."""

import pytest
import torch

from turnout.errors import UsageError
from turnout.measure import crowd_load
from turnout.types import Routing, Trace, TraceWriter

EXPERTS = 6


def recorded(path, documents):
    """A trace of one layer; each document is the experts of its tokens."""
    with TraceWriter(path, num_experts_L=[EXPERTS], domains=["secret"]) as writer:
        for experts in documents:
            index_TK = torch.tensor(experts)[:, None]
            routing = Routing.from_topk(index_TK, torch.ones(len(experts), 1), num_experts=EXPERTS)
            writer.add([routing], document_tokens=[len(experts)], document_domains=[0])
    return Trace.open(path)


@pytest.mark.parametrize("seed", range(5))
def test_only_crowds_are_told_and_their_sums_are_right(tmp_path, seed):
    chance = torch.Generator().manual_seed(seed)
    many = [torch.randint(EXPERTS, (3,), generator=chance).tolist() for _ in range(12)]
    found = crowd_load(recorded(tmp_path / "t", many), floor=4)
    (load_E,), (hidden,) = found["load"], found["hidden"]
    for expert, load in enumerate(load_E):
        senders = sum(expert in document for document in many)
        assert load is None if senders < 4 else load in (None, sum(each.count(expert) for each in many))
    assert hidden == load_E.count(None) != 1


def test_one_hidden_cell_hides_a_second(tmp_path):
    found = crowd_load(recorded(tmp_path / "t", [[0, 1, 2, 3, 4]] * 3 + [[0, 1, 2, 3, 4, 5]]), floor=4)
    assert found["load"][0].count(None) == 2 and found["load"][0][5] is None


def test_it_says_nothing_of_documents_domains_or_the_few(tmp_path):
    trace = recorded(tmp_path / "t", [[0, 1]] * 3)
    assert "secret" not in crowd_load(trace, floor=3).to_json()
    for floor in (1, 4):
        with pytest.raises(UsageError, match="no more than there are documents"):
            crowd_load(trace, floor=floor)
