"""Soup: a shard comes and goes to the bit, and only the shard that came may go."""

import itertools

import pytest
import torch
from small import make, sparse
from torch import nn

from turnout.errors import UnknownNameError, UsageError
from turnout.reshape import Soup, average, soup


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_removed_shard_leaves_the_bits_of_the_soup_without_it(dtype) -> None:
    shards = {f"s{seed}": sparse(seed).to(dtype) for seed in range(5)}
    counts = {"s0": 3, "s1": 1, "s2": 1000, "s3": 17, "s4": 2}
    whole = Soup.start(shards["s0"])
    for name, model in shards.items():
        whole = whole.add(name, model, count=counts[name])
    for gone, model in shards.items():
        left = {name: shard for name, shard in shards.items() if name != gone}
        want, _ = soup(left, counts={name: counts[name] for name in left})
        got, report = whole.remove(gone, model).model()
        assert equal(got, want), gone
        assert report["counts"] == {name: counts[name] for name in left}
    assert equal(whole.remove("s2", shards["s2"]).add("s2", shards["s2"], count=1000).model()[0], whole.model()[0])


def test_in_float64_it_is_equal_up_to_rounding() -> None:
    shards = {f"s{seed}": make(seed).double() for seed in range(3)}
    whole = Soup.start(shards["s0"])
    for name, model in shards.items():
        whole = whole.add(name, model)
    got = whole.remove("s1", shards["s1"]).model()[0]
    want = soup({name: shards[name] for name in ("s0", "s2")})[0]
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_the_order_in_which_shards_come_changes_no_bit() -> None:
    shards = {f"s{seed}": make(seed) for seed in range(3)}
    found = [soup(dict(order))[0] for order in itertools.permutations(shards.items())]
    assert all(equal(found[0], other) for other in found)


def test_it_is_the_average_and_counts_are_its_weights() -> None:
    models = [make(seed) for seed in range(3)]
    named = dict(zip("abc", models, strict=True))
    counts = {"a": 1, "b": 2, "c": 5}
    for new, mean in (
        (soup(named)[0], average(models)[0]),
        (soup(named, counts=counts)[0], average(models, weights=[1, 2, 5])[0]),
    ):
        for a, b in zip(new.parameters(), mean.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-9)


def test_a_soup_of_one_is_that_model_and_adding_leaves_the_old_soup_as_it_was() -> None:
    a, b = make(0), make(1)
    one = Soup.start(make(9)).add("a", a)
    two = one.add("b", b)
    assert equal(one.model()[0], a) and one.counts == {"a": 1} and two.counts == {"a": 1, "b": 1}
    assert equal(two.remove("a", a).model()[0], b)


def test_only_the_model_that_was_added_can_be_removed() -> None:
    a, b = make(0), make(1)
    both = Soup.start(a).add("a", a).add("b", b)
    with pytest.raises(UsageError, match="must be the one that was added"):
        both.remove("a", b)
    with torch.no_grad():
        next(a.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(UsageError, match="the model of 'a'"):
        both.remove("a", a)
    with pytest.raises(UnknownNameError, match="Did you mean 'b'"):
        both.remove("bb", b)


def test_what_makes_no_soup_is_refused() -> None:
    a = make(0)
    with pytest.raises(UsageError, match="map names to models"):
        soup({})
    with pytest.raises(UsageError, match="map names to models"):
        soup([a])
    with pytest.raises(UsageError, match="be new to the soup"):
        Soup.start(a).add("a", a).add("a", a)
    with pytest.raises(UsageError, match="have a shard"):
        Soup.start(a).add("a", a).remove("a", a).model()
    with pytest.raises(UnknownNameError, match="Did you mean 'news'"):
        soup({"news": a}, counts={"new": 1})
    for counts in ({"a": 0}, {"a": 0.5}, {}):
        with pytest.raises(UsageError, match="whole number of at least 1"):
            soup({"a": a}, counts=counts)
    bad = make(0)
    with torch.no_grad():
        bad.embedding[0, 0] = float("nan")
    with pytest.raises(UsageError, match="finite"):
        Soup.start(a).add("bad", bad)
