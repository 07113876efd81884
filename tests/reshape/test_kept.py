"""A reshape that was stopped goes on where it was, to the same bits."""

import pytest
import torch
from small import ids, make, sparse

from turnout.reshape import drop_experts, merge_experts, split, upcycle
from turnout.reshape.calibrate import difference
from turnout.reshape.resumable import Nowhere, by_batch, by_layer, keeping


class Stop(Exception):
    """What stops it."""


class Memory(Nowhere):
    """Keeps pieces in memory, counts what is put, and stops after so many."""

    def __init__(self, pieces, stop_after=None):
        self.pieces, self.stop_after, self.puts, self.told, self.names = pieces, stop_after, 0, [], 0

    def name(self, what):
        self.names += 1
        return f"{self.names} {what}"

    def get(self, name):
        return self.pieces.get(name)

    def put(self, name, piece):
        if self.puts == self.stop_after:
            raise Stop
        self.puts += 1
        self.pieces[name] = {key: tensor.clone() for key, tensor in piece.items()}

    def tell(self, what, done, of):
        self.told.append((what, done, of))


def text():
    return [ids(seed=3), ids(seed=4), ids(seed=5)]


RESHAPES = {
    "upcycle": lambda: upcycle(make(), num_experts=4, top_k=2, batches=text()),
    "split by cluster": lambda: split(make(), num_experts=4, top_k=2, batches=text()),
    "split by coactivation": lambda: split(make(), num_experts=4, top_k=2, by="coactivation", batches=text()),
    "split by gradient": lambda: split(make(), num_experts=4, top_k=2, by="gradient", batches=text()),
    "drop": lambda: drop_experts(sparse(), keep=4, batches=text()),
    "merge": lambda: merge_experts(sparse(), keep=3, batches=text()),
}


@pytest.mark.parametrize("reshape", RESHAPES.values(), ids=RESHAPES)
def test_stopped_after_any_piece_it_ends_the_same(reshape):
    plain, plain_report = reshape()
    with keeping(whole := Memory({})):
        reshape()
    assert whole.puts >= 3
    for stop in range(whole.puts):
        pieces = {}
        with pytest.raises(Stop), keeping(Memory(pieces, stop)):
            reshape()
        assert pieces or stop == 0
        with keeping(again := Memory(pieces)):
            model, report = reshape()
        assert again.puts == whole.puts - stop, "finished work was done again"
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        assert report == plain_report
        assert again.told[-1][1] == again.told[-1][2]


def test_what_is_kept_is_what_is_used():
    """The pieces are not worked out again beside being kept."""
    pieces = {}
    with keeping(Memory(pieces)):
        drop_experts(sparse(), keep=4, batches=text())
    name = next(name for name in pieces if "scoring" in name)
    for key in pieces[name]:
        if key.startswith("sum"):
            pieces[name][key] = -pieces[name][key]
    with keeping(Memory(pieces)):
        _, turned = drop_experts(sparse(), keep=4, batches=text())
    _, plain = drop_experts(sparse(), keep=4, batches=text())
    assert turned["scores"]["0"] == [-score for score in plain["scores"]["0"]]


def test_nothing_is_kept_outside():
    memory = Memory({})
    with keeping(memory):
        pass
    by_layer("squares", [1, 2], lambda layer: {"x": torch.tensor(layer)})
    by_batch("sums", text(), {}, lambda id_BS: None)
    assert not memory.pieces and not memory.told


@torch.no_grad()
def test_difference_is_that_of_whole_batches():
    before, after = make(seed=1), make(seed=2)
    found = difference(before, after, text())
    gaps, sizes = [], []
    for id_BS in text():
        old, new = before(id_BS).logits_BSV.double(), after(id_BS).logits_BSV.double()
        gaps.append(float((new - old).norm() / old.norm()))
        sizes.append(float((new - old).abs().max()))
    assert found["relative_difference"] == pytest.approx(max(gaps), rel=1e-12)
    assert found["largest_difference"] == max(sizes)
    assert found["compared_tokens"] == sum(id_BS.numel() for id_BS in text())
