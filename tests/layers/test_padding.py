"""Whatever the router, a layer decides about tokens as if the padding among them were not there."""

import inspect

import pytest
import torch
from torch import nn

from turnout.decide import token
from turnout.errors import ShapeError
from turnout.layers import Adapter, MoE, Turnout, given
from turnout.paths import Bank, LoRA
from turnout.types import Routing, spread

WIDTH, EXPERTS = 12, 4
OPTIONS = {"GShard": {"top_k": 2}, "Switch": {"top_k": 1}, "Poly": {"num_tasks": 2}, "Glider": {"query_width": 5}}


def router(name: str) -> nn.Module:
    kind, options = getattr(token, name), dict(OPTIONS.get(name, {}))
    if "capacity_factor" in inspect.signature(kind).parameters:
        options["capacity_factor"] = 0.6
    made = kind(WIDTH, EXPERTS, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return made


def batch(left: int, right: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, ids and mask: two sequences of 9, the second with a hole, the same whatever the padding."""
    generator = torch.Generator().manual_seed(2)
    x_BSD, id_BS = torch.randn(2, 9, WIDTH, generator=generator), torch.randint(99, (2, 9), generator=generator)
    real_BS = torch.ones(2, 9, dtype=torch.bool)
    pad = nn.functional.pad
    return pad(x_BSD, (0, 0, left, right), value=50.0), pad(id_BS, (left, right)), pad(real_BS, (left, right))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("left, right", [(1, 0), (0, 5), (40, 30)])
@pytest.mark.parametrize("name", token.__all__)
def test_every_router_decides_as_without(name: str, left: int, right: int, training: bool) -> None:
    layer = Turnout(Bank(EXPERTS, WIDTH, 8), router(name)).train(training)
    labels = {"task_B": torch.tensor([0, 1]), "label_B": torch.tensor([0, 1])}
    about = labels | {"query_BQ": torch.randn(2, 5, generator=torch.Generator().manual_seed(3))}

    def run(left: int, right: int, *, by_given: bool = False):
        x_BSD, id_BS, real_BS = batch(left, right)
        with given(**about, kind_BS=id_BS % EXPERTS, mask_BS=real_BS if by_given else None):
            say = {} if by_given else {"real": real_BS}
            done = layer(x_BSD, token_id=id_BS, generator=torch.Generator().manual_seed(4), **say)
        return done.output[real_BS], done.routing, real_BS.flatten()

    alone, before, _ = run(0, 0)
    for by_given in (False, True):
        output, routing, real_T = run(left, right, by_given=by_given)
        routing.validate()
        torch.testing.assert_close(output, alone, atol=1e-5, rtol=1e-4)
        assert torch.equal(routing.load_E, before.load_E) and torch.equal(routing.dropped_E, before.dropped_E)
        if not hasattr(layer.policy, "parts"):
            assert routing.num_real == before.num_tokens == 18 and not routing.dense()[~real_T].any()


def test_a_capacity_of_adapters_is_for_tokens() -> None:
    torch.manual_seed(0)
    layer = Adapter(nn.Linear(WIDTH, 3), LoRA(WIDTH, 3, ranks=(2,) * EXPERTS), router("TopK"))
    with torch.no_grad():
        layer.paths.down.normal_(), layer.paths.up.normal_()
    outputs = []
    for left in (0, 30):
        x_BSD, _, real_BS = batch(left, 0)
        with given(mask_BS=real_BS):
            outputs.append(layer(x_BSD)[real_BS])
    torch.testing.assert_close(*outputs)


def test_padding_that_does_not_fit_is_refused() -> None:
    layer = MoE(WIDTH, 8, EXPERTS, router=router("TopK"))
    with pytest.raises(ShapeError, match="real"):
        layer(torch.zeros(2, 3, WIDTH), real=torch.ones(2, 4).bool())
    routing = Routing.from_topk(torch.tensor([[0], [1]]), torch.ones(2, 1), num_experts=2)
    with pytest.raises(ShapeError, match="real_T"):
        spread(routing, torch.tensor([True, False, False]))


def test_a_routing_with_padding_keeps_what_it_knows(tmp_path) -> None:
    index_TK, score_TE = torch.tensor([[0], [0], [1]]), torch.rand(3, 2)
    tight = Routing.from_topk(index_TK, torch.ones(3, 1), num_experts=2, score_TE=score_TE).truncate(1)
    among = spread(tight, torch.tensor([False, True, True, False, True])).validate()
    assert among.before is not None and among.before.num_real == 3 and among.dropped_E.tolist() == [1, 0]
    assert "1 dropped" in str(among) and "0.67 per token" in str(among)
    among.save(tmp_path / "a")
    assert Routing.load(tmp_path / "a").num_real == 3
    assert among.relabel(torch.tensor([1, 0]), 2).num_real == 3
