"""Batches: every window once an epoch, any of them at once, and evaluation rows that cover every token."""

import itertools

import numpy as np
import pytest
import torch

from turnout.errors import DataError, UsageError
from turnout.train.data.shards import Split
from turnout.train.data.stream import Stream, shuffled, windows


def flat(tokens: int) -> Split:
    return Split("train", np.arange(tokens, dtype="<u4"), np.array([0, tokens]), np.array([0]))


def split_of(lengths, domains) -> Split:
    offset_N = np.concatenate([[0], np.cumsum(lengths)])
    return Split("held_out", np.arange(offset_N[-1], dtype="<u2") + 1, offset_N, np.array(domains, "<u2"))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_a_permutation_of_any_size(size) -> None:
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (2**40, 7)):
        assert sorted(shuffled(n, size, seed, epoch) for n in range(size)) == list(range(size)), (seed, epoch)


def test_seeds_and_epochs_differ_and_nothing_stays_in_place() -> None:
    orders = [[shuffled(n, 1000, seed, epoch) for n in range(1000)] for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for a, first in enumerate(orders):
        assert sum(n == at for n, at in enumerate(first)) < 12  # one is expected
        assert sum(abs(x - y) == 1 for x, y in itertools.pairwise(first)) < 20  # two are expected
        assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.12  # four standard deviations
        for second in orders[a + 1 :]:
            assert sum(x == y for x, y in zip(first, second, strict=True)) < 12


def test_every_place_is_as_likely_as_any_other() -> None:
    """Chi-square of where index 0 goes in 7 places, over 7,000 seeds: 6 degrees of freedom, 1 in 10^4 is above 28."""
    for index in (0, 3):
        counts = np.bincount([shuffled(index, 7, seed) for seed in range(7000)], minlength=7)
        assert ((counts - 1000) ** 2 / 1000).sum() < 28, counts


def test_every_window_once_an_epoch_whatever_the_batch() -> None:
    stream = Stream(flat(103), batch=4, seq=3, seed=5)
    assert stream.num_windows == 34
    rows = [row for index in range(17) for row in stream.batch(index).id_BS.tolist()]
    for epoch in (rows[:34], rows[34:]):
        assert sorted(epoch) == [[n, n + 1, n + 2] for n in range(0, 102, 3)]
    assert rows[:34] != rows[34:]
    other = Stream(flat(103), batch=17, seq=3, seed=5)
    assert [row for index in range(4) for row in other.batch(index).id_BS.tolist()] == rows


def test_a_batch_is_a_function_of_its_index() -> None:
    stream = Stream(flat(500), batch=3, seq=8, seed=1)
    later = stream.batch(1_000_003)
    again = Stream(flat(500), batch=3, seq=8, seed=1).batch(1_000_003)
    assert torch.equal(later.id_BS, again.id_BS) and torch.equal(later.target_BS, again.target_BS)
    assert later.id_BS.dtype == later.target_BS.dtype == torch.int64 and later.id_BS.shape == (3, 8)
    assert torch.equal(later.target_BS, later.id_BS + 1)
    assert later.num_targets == 24 and later.domain_B is None
    assert not torch.equal(stream.batch(0).id_BS, Stream(flat(500), batch=3, seq=8, seed=2).batch(0).id_BS)


def test_the_smallest_split_that_fits() -> None:
    stream = Stream(flat(9), batch=2, seq=8, seed=0)
    assert stream.num_windows == 1 and stream.batch(3).id_BS.tolist() == [list(range(8))] * 2
    with pytest.raises(DataError, match=r"seq must be at most 7, one less than the 8 train tokens.*pass seq=7"):
        Stream(flat(8), batch=1, seq=8, seed=0)
    with pytest.raises(DataError, match="give more text"):
        Stream(flat(0), batch=1, seq=8, seed=0)


@pytest.mark.parametrize("bad", [{"batch": 0}, {"seq": 0}, {"seed": -1}])
def test_sizes_that_cannot_be(bad) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        Stream(flat(99), **{"batch": 1, "seq": 1, "seed": 0, **bad})


def predicted(batches) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for batch in batches:
        for row, domain in enumerate(batch.domain_B.tolist()):
            found.setdefault(domain, []).extend(t for t in batch.target_BS[row].tolist() if t != -100)
    return found


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (2, 3), (64, 5), (3, 100)])
def test_evaluation_predicts_every_token_but_the_separators_once(batch, seq) -> None:
    lengths, domains = [5, 1, 12, 2, 7, 3], [0, 1, 1, 0, 2, 2]
    split = split_of(lengths, domains)
    wanted: dict[int, list[int]] = {}
    for n, domain in enumerate(domains):
        wanted.setdefault(domain, []).extend(split.token_T[split.document_N[n] + 1 : split.document_N[n + 1]].tolist())
    batches = list(windows(split, batch=batch, seq=seq))
    assert predicted(batches) == wanted
    for b in batches:
        keep = b.target_BS != -100
        assert (b.id_BS[keep] + 1 == b.target_BS[keep]).all()
        assert keep[:, 0].all() and b.id_BS.shape == b.target_BS.shape == (len(b.domain_B), seq)


def test_a_limit_keeps_each_domain_in_its_share() -> None:
    split = split_of([1001] * 6 + [11] * 10, [0] * 6 + [1] * 10)
    batches = list(windows(split, batch=4, seq=10, limit=1000))
    found = predicted(batches)
    total = sum(map(len, found.values()))
    assert 900 <= total <= 1100
    assert len(found[0]) / total == pytest.approx(6000 / 6100, abs=0.01) and len(found[1]) >= 10
    documents = {int(np.searchsorted(split.document_N, t, side="left")) for t in found[0]}
    assert len(documents) == 6  # spread over all of them
    assert predicted(windows(split, batch=7, seq=10, limit=1000)) == found
    assert predicted(windows(split, batch=4, seq=10, limit=10**9)) == predicted(windows(split, batch=4, seq=10))


def test_nothing_to_evaluate() -> None:
    with pytest.raises(DataError, match="2 documents with 2 tokens"):
        next(windows(split_of([1, 1], [0, 0]), batch=1, seq=4))
    with pytest.raises(UsageError, match="limit"):
        next(windows(split_of([5], [0]), batch=1, seq=4, limit=0))
