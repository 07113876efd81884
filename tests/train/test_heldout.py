"""Held-out rows: every token predicted once, no row over two documents, every domain in its share."""

import random
import types

import numpy as np
import pytest
import torch

from turnout.errors import DataError
from turnout.train import held_out_batches


def text(lengths, domains):
    token_T = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    split = types.SimpleNamespace(
        token_T=token_T, document_N=np.cumsum([0, *lengths]), domain_N=np.asarray(domains, dtype=np.uint8)
    )
    return types.SimpleNamespace(held_out=split)


def test_every_token_but_the_first_of_a_document_is_predicted_once():
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, 2, 5, 6, 7, 40]) for _ in range(20)] + [2]
    firsts = {1 + sum(lengths[:n]) for n in range(len(lengths)) if lengths[n]}
    targets, rows = [], 0
    for batch in held_out_batches(text(lengths, [n % 3 for n in range(21)]), batch=4, seq=6):
        assert batch.id_BS.shape == batch.target_BS.shape and batch.id_BS.shape[1] == 6
        keep_BS = batch.target_BS != -100
        assert torch.equal(batch.id_BS[keep_BS] + 1, batch.target_BS[keep_BS]), f"seed {seed}"
        assert bool(keep_BS.any(1).all())
        targets += batch.target_BS[keep_BS].tolist()
        rows += len(keep_BS)
        for row_S, domain in zip(batch.target_BS, batch.domain_B, strict=True):
            document = int(np.searchsorted(np.cumsum(lengths), int(row_S.max()), side="left"))
            assert int(domain) == document % 3, f"seed {seed}"
    assert sorted(targets) == sorted(set(range(1, sum(lengths) + 1)) - firsts), f"seed {seed}"


def test_a_limit_takes_rows_of_every_domain_and_always_the_same():
    tokens = text([61, 61, 61, 61], [0, 0, 1, 1])
    taken = list(held_out_batches(tokens, batch=3, seq=6, limit=48))
    assert sum(int((batch.target_BS != -100).sum()) for batch in taken) == 48
    assert torch.cat([batch.domain_B for batch in taken]).bincount().tolist() == [4, 4]
    again = list(held_out_batches(tokens, batch=3, seq=6, limit=48))
    assert all(torch.equal(a.id_BS, b.id_BS) for a, b in zip(taken, again, strict=True))


def test_a_limit_beyond_the_text_takes_all_and_a_tiny_one_takes_a_row():
    tokens = text([13], [0])
    assert sum(len(batch.id_BS) for batch in held_out_batches(tokens, batch=8, seq=6, limit=10**9)) == 2
    assert sum(len(batch.id_BS) for batch in held_out_batches(tokens, batch=8, seq=6, limit=1)) == 1


@pytest.mark.parametrize("lengths", [[], [0], [1, 1]])
def test_nothing_to_predict_is_an_error(lengths):
    with pytest.raises(DataError, match="at least two tokens"):
        next(held_out_batches(text(lengths, [0] * len(lengths)), batch=1, seq=4))
