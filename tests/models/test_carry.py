"""What one layer's router hands to the next one's: exact under recomputation, padding and a cache."""

import dataclasses

import pytest
import torch
from torch import nn

from turnout.decide.token import TopK
from turnout.errors import UsageError
from turnout.layers import MoE
from turnout.models import LM, Cache, LMConfig, MoEConfig
from turnout.paths import Bank, every
from turnout.types import Routing


class Memory(TopK):
    """Adds the logits of the router before to its own."""

    needs_carry = True

    def forward(self, x_TD, *, token_id_T=None, generator=None, carry_TX=None):
        own_TE = x_TD.float() @ self.weight.t()
        logit_TE = own_TE if carry_TX is None else own_TE + carry_TX
        weight_TK, index_TK = logit_TE.softmax(1).topk(2)
        routing = Routing.from_topk(index_TK, weight_TK, num_experts=self.num_experts, logit_TE=logit_TE)
        return dataclasses.replace(routing, carry_TX=logit_TE)


def network():
    moe = MoEConfig(num_experts=4, top_k=2, hidden=16, layers=(0, 2))
    lm = LM(LMConfig(vocab_size=32, width=16, layers=3, heads=2, hidden=32, max_seq=16, moe=moe, init_std=0.3), seed=0)
    for layer in (0, 2):
        lm.blocks[layer].ff.router.__class__ = Memory
    return lm


IDS = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(4))


def test_it_reaches_the_next_routed_layer_over_a_dense_one():
    first, second = network()(IDS).routings
    own_TE = second.logit_TE - first.logit_TE
    alone = network()
    alone.blocks[2].ff.router.needs_carry = False
    torch.testing.assert_close(own_TE, alone(IDS).routings[1].logit_TE, rtol=1e-5, atol=1e-5)
    assert bool(first.logit_TE.any())


def test_the_gradient_goes_through_it():
    lm = network()
    lm(IDS).routings[1].logit_TE.square().sum().backward()
    before = lm.blocks[0].ff.router.weight.grad
    assert before is not None and bool(before.any())


def test_recomputation_gives_the_same_gradients_to_the_bit():
    found = []
    for recompute in (False, True):
        lm = network().train()
        for block in lm.blocks:
            block.recompute = recompute
        done = lm.loss(IDS, IDS.roll(-1, 1))
        (done.nats + done.routings[1].logit_TE.square().sum()).backward()
        found.append([p.grad for p in lm.parameters() if p.grad is not None])
    assert len(found[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_padded_batch_decides_as_each_text_alone():
    mask_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    together = network()(IDS, attention_mask=mask_BS).routings[1]
    for row, start in ((0, 3), (1, 0)):
        alone = network()(IDS[row : row + 1, start:]).routings[1]
        torch.testing.assert_close(together.carry_TX.view(2, 9, 4)[row, start:], alone.carry_TX, rtol=1e-5, atol=1e-5)
    assert not bool(together.carry_TX.view(2, 9, 4)[0, :3].any())


def test_one_token_at_a_time_with_a_cache_is_the_whole():
    lm, cache = network().eval(), Cache()
    with torch.no_grad():
        whole = lm(IDS).routings[1].carry_TX.view(2, 9, 4)
        steps = [lm(IDS[:, at : at + 1], cache=cache).routings[1].carry_TX for at in range(9)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-5, atol=1e-5)


# ---- a router that runs the experts


class Norms(nn.Module):
    """Each token to the expert whose output is the longest."""

    needs_experts = True

    def forward(self, x_TD, *, token_id_T=None, generator=None, experts=None):
        length_TE = experts(x_TD).norm(dim=2)
        index_T1 = length_TE.argmax(1, keepdim=True)
        return Routing.from_topk(index_T1, torch.ones(len(x_TD), 1), num_experts=length_TE.shape[1])


def test_a_router_that_needs_the_experts_may_run_them():
    layer = MoE(8, 6, 4, router=Norms(), std=0.3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    routing = layer(x).routing
    assert isinstance(layer.bank, Bank)
    best_T = every(layer.bank, x.view(10, 8)).norm(dim=2).argmax(1)
    assert torch.equal(routing.dense().argmax(1), best_T)


def test_where_there_are_no_experts_it_is_said():
    from turnout.layers.turnout import decide

    with pytest.raises(UsageError, match="experts"):
        decide(Norms(), torch.zeros(1, 2, 8), None, None)


def test_what_runs_layers_one_by_one_refuses_it():
    from turnout.models.carried import refuse_carry
    from turnout.models.stages import cut
    from turnout.reshape.quantize.moments import Stream

    refuse_carry(nn.Linear(2, 2), "read", where="here")
    with pytest.raises(UsageError, match=r"blocks\.0\.ff\.router \(Memory\)"):
        cut(network(), (2, 1))
    with pytest.raises(UsageError, match="look at one layer"):
        Stream(network(), [IDS])
