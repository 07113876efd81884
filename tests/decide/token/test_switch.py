import pytest
import torch

from turnout.decide.token import Switch
from turnout.errors import UsageError

WIDTH = 16


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 4.0])
def test_equals_transformers_switch(capacity_factor):
    peer = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    count, num_experts = 40, 16
    config = peer.SwitchTransformersConfig(
        hidden_size=WIDTH,
        d_model=WIDTH,
        num_experts=num_experts,
        expert_capacity=max(1, int(-(-capacity_factor * count // num_experts))),
        router_jitter_noise=0.0,
    )
    theirs = peer.SwitchTransformersTop1Router(config)
    ours = Switch(WIDTH, num_experts, jitter=0.0, capacity_factor=capacity_factor, std=0.5)
    with torch.no_grad():
        theirs.classifier.weight.copy_(ours.weight)
    x_TD = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))
    # The peer counts capacity along the second to last axis: (batch, sequence, experts).
    chosen_1TE, weight_1T1, logit_1TE = theirs(x_TD[None])
    routing = ours(x_TD)
    assert torch.equal(routing.logit_TE, logit_1TE[0])
    assert torch.equal(routing.dense(), chosen_1TE[0] * weight_1T1[0])
    assert int(routing.dropped_E.sum()) == count - int(chosen_1TE.sum())


def test_jitter_multiplies_the_input():
    """Each input is scaled by its own factor in [1 - jitter, 1 + jitter]; the logits show the factors."""
    jitter, router = 0.25, Switch(WIDTH, WIDTH, jitter=0.25)
    router.weight.data.copy_(torch.eye(WIDTH))
    x_TD = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(0)) * 10
    x_TD[0] = 0.0
    router.train()
    logit_TE = router(x_TD, generator=torch.Generator().manual_seed(1)).logit_TE.detach()
    assert torch.equal(logit_TE[0], torch.zeros(WIDTH)), "additive noise would move zeros"
    factor = (logit_TE / x_TD)[1:]
    assert 1 - jitter - 1e-5 <= float(factor.min()) < 1 - 0.9 * jitter
    assert 1 + 0.9 * jitter < float(factor.max()) <= 1 + jitter + 1e-5
    assert float(factor.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(router.eval()(x_TD).logit_TE, x_TD)


def test_jitter_does_not_change_the_callers_tokens():
    x_TD = torch.ones(4, WIDTH)
    Switch(WIDTH, 4).train()(x_TD)
    assert torch.equal(x_TD, torch.ones(4, WIDTH))


def test_the_earliest_tokens_come_first():
    router = Switch(WIDTH, 2, capacity_factor=1.0).eval()
    router.weight.data.zero_()
    assert router(torch.zeros(6, WIDTH)).token_R.tolist() == [0, 1, 2]


def test_only_one_expert_and_sensible_jitter():
    with pytest.raises(UsageError, match="TopK"):
        Switch(WIDTH, 4, top_k=2)
    for jitter in (-0.1, 1.0):
        with pytest.raises(UsageError, match="jitter"):
            Switch(WIDTH, 4, jitter=jitter)
