"""DiLoCo: equal to data parallelism at its edge, met on torchft's schedule, in the bytes that it says."""

import copy

import pytest
import torch
from torch import nn

from tests.train.local.fleet import batches, data_parallel, flat, fleet, model, step, walk
from turnout.errors import UsageError
from turnout.train.local import DiLoCo, nesterov, payload_bytes, rounded


def plain(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_one_local_step_of_sgd_and_a_plain_outer_one_are_data_parallel_sgd(replicas):
    models, inner = fleet(replicas)
    with DiLoCo(models, inner, every=1, outer=plain) as met:
        walk(models, inner, 20)
    assert (flat(models[0]) - data_parallel(replicas, 20)).abs().max() <= 1e-12
    assert all(torch.equal(flat(models[0]), flat(one)) for one in models)
    assert len(met.meetings) == 20


def test_the_outer_step_is_nesterov_on_how_far_the_replicas_came():
    models, inner = fleet(2, adam=True)
    start = flat(models[0])
    alone, own = fleet(2, adam=True)
    momentum = torch.zeros_like(start)
    data = [batches(12, at) for at in range(2)]
    for _ in range(3):
        for one, optimizer, mine in zip(alone, own, data, strict=True):
            for _ in range(4):
                step(one, optimizer, next(mine))
        outer = start - (flat(alone[0]) + flat(alone[1])) / 2
        momentum = 0.9 * momentum + outer
        start = start - 0.7 * (outer + 0.9 * momentum)
        for one in alone:
            torch.nn.utils.vector_to_parameters(start.clone(), one.parameters())
    with DiLoCo(models, inner, every=4):
        walk(models, inner, 12)
    assert (flat(models[0]) - start).abs().max() <= 1e-12


@pytest.mark.parametrize("every, fragments, delay", [(6, 1, 0), (6, 2, 0), (6, 2, 2), (12, 4, 1), (4, 4, 0)])
def test_fragments_meet_on_torchfts_schedule(every, fragments, delay):
    """There a fragment is prepared at ``sync_every / K - delay`` of its turn, and performed at ``sync_every / K``."""
    models, inner = fleet(2)
    seen = []

    def average(mine_N, *, bits):
        seen.append(("begin", met._lockstep.steps[0], len(mine_N)))
        return lambda: seen.append(("meet", met._lockstep.steps[0], len(mine_N))) or mine_N

    met = DiLoCo(models, inner, every=every, fragments=fragments, delay=delay, average=average)
    data = [batches(2 * every, at) for at in range(2)]
    with met:
        for _ in range(2 * every):
            for one, optimizer, mine in zip(models, inner, data, strict=True):
                step(one, optimizer, next(mine))
    local, turn, expected = 0, 0, []  # torchft's counters: _local_step and manager.current_step()
    for at in range(1, 2 * every + 1):
        local += 1
        if local == every // fragments - delay:
            expected.append(("begin", at, turn % fragments))
        if local == every // fragments:
            expected.append(("meet", at, turn % fragments))
            local, turn = 0, turn + 1
    sizes = [sum(one.numel() for one in anchors.values()) for anchors, _ in met._fragments]
    assert seen == [(what, at, sizes[k]) for what, at, k in expected]
    assert met.meetings == [(at, k) for what, at, k in expected if what == "meet"]


def test_an_overlapped_fragment_is_what_it_was_when_it_was_begun_mixed_with_what_came_after():
    models, inner = fleet(1)
    met = DiLoCo(models, inner, every=4, delay=1, mix=0.25, outer=plain)
    data, begun = batches(4, 0), flat(models[0])
    with met:
        for at in range(4):
            if at == 3:
                begun = flat(models[0])
            lone = copy.deepcopy(models[0])
            step_on = torch.optim.SGD(lone.parameters(), lr=0.1)
            batch = next(data)
            step(lone, step_on, batch)
            step(models[0], inner[0], batch)
    assert (flat(models[0]) - (0.75 * begun + 0.25 * flat(lone))).abs().max() <= 1e-12
    assert (torch.cat([one.flatten() for one in met.anchors().values()]) - begun).abs().max() <= 1e-12


@pytest.mark.parametrize("every", [5, 10])
def test_bytes_are_those_of_data_parallelism_over_h(every):
    models, inner = fleet(2)
    count = len(flat(models[0]))
    with DiLoCo(models, inner, every=every, fragments=2 if every == 10 else 1) as met:
        walk(models, inner, 4 * every)
    assert met.sent_bytes * every == 4 * count * 4 * every


def test_fewer_bits_send_fewer_bytes_and_round():
    models, inner = fleet(2)
    with DiLoCo(models, inner, every=2, bits=4, outer=plain) as met:
        walk(models, inner, 2)
    alone, own = fleet(2)
    walk(alone, own, 2)
    start = flat(model())
    sent = [rounded(start - flat(one), 4) for one in alone]
    assert (flat(models[0]) - (start - (sent[0] + sent[1]) / 2)).abs().max() <= 1e-12
    assert met.sent_bytes == payload_bytes(len(start), 4) < payload_bytes(len(start), 32)


@pytest.mark.parametrize("bits, worst", [(8, 0.5 / 127), (4, 0.25)])
def test_rounding_is_to_the_nearest_and_exact_at_its_levels(bits, worst):
    value = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    back = rounded(value, bits)
    largest = torch.cat([part.abs().max().expand(len(part)) for part in value.split(256)])
    assert ((back - value).abs() <= worst * largest + 1e-7).all()
    assert torch.equal(rounded(back, bits), back) and torch.equal(rounded(-value, bits), -back)
    assert torch.equal(rounded(torch.zeros(3), bits), torch.zeros(3))


def test_saved_and_loaded_it_goes_on_to_the_bit():
    models, inner = fleet(2)
    with DiLoCo(models, inner, every=4, fragments=2) as met:
        walk(models, inner, 8)
        kept = copy.deepcopy(met.state_dict())
        saved = copy.deepcopy([one.state_dict() for one in models])
        data = [batches(6, 7 + at) for at in range(2)]
        for _ in range(6):
            for one, optimizer, mine in zip(models, inner, data, strict=True):
                step(one, optimizer, next(mine))
    again, theirs = fleet(2)
    other = DiLoCo(again, theirs, every=4, fragments=2)
    other.load_state_dict(kept)
    for one, state in zip(again, saved, strict=True):
        one.load_state_dict(state)
    data = [batches(6, 7 + at) for at in range(2)]
    with other:
        for _ in range(6):
            for one, optimizer, mine in zip(again, theirs, data, strict=True):
                step(one, optimizer, next(mine))
    assert torch.equal(flat(models[0]), flat(again[0])) and torch.equal(flat(models[1]), flat(again[1]))


def test_a_fragment_on_its_way_is_not_saved():
    models, inner = fleet(1)
    with DiLoCo(models, inner, every=4, delay=2) as met:
        walk(models, inner, 2)
        with pytest.raises(UsageError, match="on its way"):
            met.state_dict()


def test_an_outer_optimizer_of_two_fragments_is_refused():
    """In torchft it is accepted, and ends in numbers that are not numbers."""
    models, inner = fleet(1)
    one: list[torch.optim.Optimizer] = []

    def shared(parameters):
        one.append(torch.optim.SGD(parameters, lr=0.7, momentum=0.9)) if not one else one[0].add_param_group(
            {"params": parameters}
        )
        return one[0]

    with pytest.raises(UsageError, match="outer"):
        DiLoCo(models, inner, every=4, fragments=2, outer=shared)
    whole = nesterov(list(models[0].parameters()))
    with pytest.raises(UsageError, match="outer"):
        DiLoCo(models, inner, every=4, outer=lambda parameters: whole)


@pytest.mark.parametrize(
    "what, settings",
    [
        ("every", {"every": 0}), ("every", {"every": 5, "fragments": 2}), ("delay", {"every": 4, "delay": 4}),
        ("delay", {"every": 4, "fragments": 2, "delay": 2}), ("mix", {"every": 4, "mix": 1.5}),
        ("bits", {"every": 4, "bits": 16}), ("fragments", {"every": 4, "fragments": 0}),
        ("fragments", {"every": 4, "fragments": [["0.weight"], ["0.bias"]]}),
        ("fragments", {"every": 4, "fragments": [["0.weight", "0.bias", "2.weight", "2.bias"], ["2.bias"]]}),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(what, settings):
    models, inner = fleet(1)
    with pytest.raises(UsageError, match=what):
        DiLoCo(models, inner, **settings)


def test_replicas_that_do_not_fit_are_refused():
    models, inner = fleet(2)
    with pytest.raises(UsageError, match="optimizer each"):
        DiLoCo(models, inner[:1], every=2)
    with pytest.raises(UsageError, match="step all of its model"):
        DiLoCo(models, inner[::-1], every=2)
    nn.init.zeros_(next(models[1].parameters()))
    with pytest.raises(UsageError, match="start from the same numbers"):
        DiLoCo(models, inner, every=2)


def test_replicas_out_of_step_are_refused():
    models, inner = fleet(2)
    data = batches(2, 0)
    with DiLoCo(models, inner, every=2), pytest.raises(UsageError, match="step together"):
        step(models[0], inner[0], next(data))
        step(models[0], inner[0], next(data))


@pytest.mark.parametrize("fragments", [1, 2, 3, 4])
def test_fragments_by_number_hold_everything_once(fragments):
    models, inner = fleet(1)
    met = DiLoCo(models, inner, every=12, fragments=fragments)
    names = [list(anchors) for anchors, _ in met._fragments]
    assert [name for part in names for name in part] == [name for name, _ in models[0].named_parameters()]
    assert all(names) and len(names) == fragments
