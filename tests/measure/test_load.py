"""Load statistics against their definitions, at both ends of their ranges and on odd input."""

import math

import pytest
import torch

from turnout.errors import ShapeError
from turnout.measure import (
    coefficient_of_variation,
    dead_experts,
    dropped_share,
    entropy,
    load_report,
    max_vio,
)
from turnout.types import Routing, Trace, TraceWriter


def routing(index: list[int], experts: int) -> Routing:
    return Routing.from_topk(torch.tensor(index)[:, None], torch.ones(len(index), 1), num_experts=experts)


@pytest.mark.parametrize("experts", [1, 2, 7, 64])
def test_even_and_collapsed_loads_are_the_ends_of_every_scale(experts: int) -> None:
    even_E = torch.full((experts,), 5)
    one_E = torch.zeros(experts).index_fill(0, torch.tensor([experts - 1]), 9.0)
    assert max_vio(even_E) == pytest.approx(0.0)
    assert entropy(even_E) == pytest.approx(1.0)
    assert coefficient_of_variation(even_E) == pytest.approx(0.0)
    assert max_vio(one_E) == pytest.approx(experts - 1)
    assert entropy(one_E) == pytest.approx(0.0 if experts > 1 else 1.0)
    assert coefficient_of_variation(one_E) == pytest.approx(math.sqrt(experts - 1))


def test_values_by_hand() -> None:
    load_E = torch.tensor([1, 2, 3, 2], dtype=torch.int32)
    assert max_vio(load_E) == pytest.approx(0.5)
    assert coefficient_of_variation(load_E) == pytest.approx(math.sqrt(0.5) / 2)
    p = [1 / 8, 2 / 8, 3 / 8, 2 / 8]
    assert entropy(load_E) == pytest.approx(-sum(x * math.log(x) for x in p) / math.log(4))


def test_counts_and_shares_give_the_same_numbers() -> None:
    load_E = torch.tensor([3, 1, 0, 4])
    for meter in (max_vio, entropy, coefficient_of_variation, dead_experts):
        assert meter(load_E) == meter(load_E / 8), meter.__name__


def test_a_load_of_nothing_is_even() -> None:
    assert (max_vio(torch.zeros(4)), entropy(torch.zeros(4))) == (pytest.approx(0.0), pytest.approx(1.0))
    assert dead_experts(torch.zeros(3)) == (0, 1, 2)


@pytest.mark.parametrize("bad", [torch.ones(2, 2), torch.ones(0), torch.tensor([1.0, -1.0]), torch.tensor([math.nan])])
def test_what_is_not_a_load_is_refused(bad: torch.Tensor) -> None:
    for meter in (max_vio, entropy, coefficient_of_variation, dead_experts):
        with pytest.raises(ShapeError, match="Nearest fix"):
            meter(bad)


def test_dropped_share_counts_over_several_routings() -> None:
    crowded = routing([0, 0, 0, 1], 2).truncate(1)
    assert dropped_share(crowded) == pytest.approx(0.5)
    assert dropped_share([crowded, routing([0, 1, 1, 0], 2)]) == pytest.approx(2 / 8)
    assert dropped_share([]) == 0.0


def test_the_report_agrees_for_routings_loads_and_a_trace(tmp_path) -> None:
    layers = [routing([0, 0, 1, 2], 3), routing([2, 2, 2, 2], 3)]
    with TraceWriter(tmp_path / "trace", num_experts_L=[3, 3], domains=["all"]) as writer:
        writer.add(layers, document_tokens=[4], document_domains=[0])
    reports = [
        load_report(layers),
        load_report(torch.stack([layer.load_E for layer in layers])),
        load_report(Trace.open(tmp_path / "trace")),
    ]
    for report in reports:
        assert report["max_vio_by_layer"] == pytest.approx([0.5, 2.0])
        assert report["max_vio"] == pytest.approx(1.25)
        assert report["max_vio_worst"] == pytest.approx(2.0)
        assert report["dead_experts_by_layer"] == [[], [0, 1]]
        assert report["dead_experts"] == 2
    assert [report["dropped"] for report in reports] == [0.0, None, None]
    assert [report["tokens"] for report in reports] == [4, None, 4]
    assert load_report(layers[1])["layers"] == 1


def test_a_report_of_no_layer_is_refused() -> None:
    with pytest.raises(ShapeError, match="no layer"):
        load_report([])
