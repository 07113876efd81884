"""Bits per byte against the definition, and load that counts only what was predicted."""

import math
import types

import numpy as np
import pytest
import torch

from turnout.errors import DataError, ShapeError
from turnout.measure import bits_per_byte
from turnout.types import Routing, Trace, TraceWriter

VOCAB, SEQ = 5, 6
LENGTH = np.array([0, 1, 1, 2, 3])


def batch(seed: int, rows: int, domains: int = 2, padding: bool = True) -> types.SimpleNamespace:
    g = torch.Generator().manual_seed(seed)
    id_BS = torch.randint(VOCAB, (rows, SEQ), generator=g)
    target_BS = torch.randint(1, VOCAB, (rows, SEQ), generator=g)
    if padding:
        target_BS[:, SEQ - 2 :] = -100
    return types.SimpleNamespace(
        id_BS=id_BS, target_BS=target_BS, domain_B=torch.randint(domains, (rows,), generator=g)
    )


def model(capacity: int | None = None):
    g = torch.Generator().manual_seed(7)
    table_VV = torch.randn(VOCAB, VOCAB, generator=g)

    def forward(id_BS: torch.Tensor) -> types.SimpleNamespace:
        flat_T = id_BS.reshape(-1)
        routings = []
        for layer, experts in enumerate((3, 4)):
            routing = Routing.from_topk(
                ((flat_T + layer) % experts)[:, None], torch.rand(len(flat_T), 1) + 0.1, num_experts=experts
            )
            routings.append(routing if capacity is None else routing.truncate(capacity))
        return types.SimpleNamespace(logits_BSV=table_VV[id_BS].to(torch.bfloat16), routings=tuple(routings))

    return forward


def by_hand(forward, batches, wanted: int | None = None) -> float:
    nats = total = 0.0
    for one in batches:
        logits_BSV = forward(one.id_BS).logits_BSV.double()
        for b in range(len(one.id_BS)):
            for s in range(SEQ):
                target = int(one.target_BS[b, s])
                if target != -100 and wanted in (None, int(one.domain_B[b])):
                    nats -= float(logits_BSV[b, s].log_softmax(-1)[target])
                    total += int(LENGTH[target])
    return nats / math.log(2) / total


def test_bits_per_byte_is_the_definition_overall_and_by_domain() -> None:
    batches = [batch(0, 4), batch(1, 1), batch(2, 3)]
    found = bits_per_byte(model(), batches, LENGTH, domains=["code", "prose"])
    assert found.bits_per_byte == pytest.approx(by_hand(model(), batches), rel=1e-5)
    assert found.by_domain["code"] == pytest.approx(by_hand(model(), batches, 0), rel=1e-5)
    assert found.by_domain["prose"] == pytest.approx(by_hand(model(), batches, 1), rel=1e-5)
    assert found.tokens == 8 * (SEQ - 2)
    assert found.nats / math.log(2) / found.bytes == pytest.approx(found.bits_per_byte)


def test_a_certain_model_needs_no_bits() -> None:
    one = batch(3, 2)

    def certain(id_BS: torch.Tensor) -> types.SimpleNamespace:
        right_BSV = torch.nn.functional.one_hot(one.target_BS.clamp(min=0), VOCAB) * 100.0
        return types.SimpleNamespace(logits_BSV=right_BSV, routings=())

    found = bits_per_byte(certain, [one], LENGTH, domains=["a", "b"])
    assert found.bits_per_byte == pytest.approx(0.0, abs=1e-6)
    assert (found.max_vio, found.entropy, found.dropped, found.load_LE) == (None, None, None, ())


def test_load_counts_only_tokens_with_a_target_and_splits_by_domain() -> None:
    batches = [batch(4, 3), batch(5, 2)]
    found = bits_per_byte(model(), batches, LENGTH, domains=["code", "prose"])
    expected = [[0] * 3, [0] * 4]
    for one in batches:
        for token in one.id_BS[one.target_BS != -100].tolist():
            expected[0][token % 3] += 1
            expected[1][(token + 1) % 4] += 1
    assert [list(layer) for layer in found.load_LE] == expected
    summed = [
        [sum(column) for column in zip(*layers, strict=True)]
        for layers in zip(*found.load_by_domain.values(), strict=True)
    ]
    assert summed == expected
    assert [sum(layer) for layer in found.share_LE] == pytest.approx([1.0, 1.0])
    assert found.dropped == 0.0


def test_dropped_counts_what_capacity_took() -> None:
    found = bits_per_byte(model(capacity=2), [batch(6, 4, padding=False)], LENGTH, domains=["a", "b"])
    kept = sum(sum(layer) for layer in found.load_LE)
    assert found.dropped == pytest.approx(1 - kept / (2 * 4 * SEQ))
    assert found.dropped > 0


@pytest.mark.parametrize("token_ids", [False, True])
def test_the_trace_holds_the_kept_tokens_row_by_row(tmp_path, token_ids: bool) -> None:
    batches = [batch(8, 3), batch(9, 2)]
    writer = TraceWriter(tmp_path / "t", num_experts_L=[3, 4], domains=["code", "prose"], token_ids=token_ids)
    with writer:
        found = bits_per_byte(model(), batches, LENGTH, domains=["code", "prose"], trace=writer)
    trace = Trace.open(tmp_path / "t")
    assert (trace.num_documents, trace.num_tokens) == (5, found.tokens)
    for layer in range(2):
        assert tuple(trace.load(layer).tolist()) == found.load_LE[layer]
        trace.routing(layer).validate()
        for domain, load_LE in found.load_by_domain.items():
            assert tuple(trace.load(layer, domain=domain).tolist()) == load_LE[layer]
    kept = torch.cat([one.id_BS[one.target_BS != -100] for one in batches])
    dense_TE = trace.routing(0).dense()
    assert dense_TE.argmax(1).tolist() == (kept % 3).tolist()
    if token_ids:
        assert trace.column("token_id").tolist() == kept.tolist()


def test_the_json_form_is_the_line_of_the_metrics_file() -> None:
    found = bits_per_byte(model(), [batch(10, 3)], LENGTH, domains=["code", "prose"])
    line = found.to_json_dict()
    assert {"bits_per_byte", "by_domain", "load", "max_vio", "entropy", "dropped"} <= set(line)
    assert "load_by_domain" not in line
    assert [len(layer) for layer in line["load"]] == [3, 4]
    assert set(found.to_json_dict(domains=True)["load_by_domain"]) <= {"code", "prose"}


def test_one_domain_needs_no_column() -> None:
    one = batch(11, 2)
    without = types.SimpleNamespace(id_BS=one.id_BS, target_BS=one.target_BS)
    assert list(bits_per_byte(model(), [without], LENGTH).by_domain) == ["all"]


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(DataError, match="at least one byte"):
        bits_per_byte(model(), [], LENGTH)


def test_what_does_not_fit_is_refused() -> None:
    one = batch(12, 2)
    with pytest.raises(ShapeError, match="domain"):
        bits_per_byte(model(), [types.SimpleNamespace(**{**vars(one), "domain_B": None})], LENGTH, domains=["a", "b"])
    with pytest.raises(ShapeError, match="domain"):
        one.domain_B[0] = 9
        bits_per_byte(model(), [one], LENGTH, domains=["a", "b"])
    with pytest.raises(ShapeError, match="logits"):
        bits_per_byte(
            lambda id_BS: types.SimpleNamespace(logits_BSV=torch.zeros(1, 1, VOCAB), routings=()),
            [batch(13, 2, domains=1)],
            LENGTH,
        )
