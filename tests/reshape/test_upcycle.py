"""Upcycling is exact for every valid (E, K, G), and every other one is refused with the nearest."""

import re

import pytest
import torch
from small import ids, make

from turnout.errors import UsageError
from turnout.layers import MoE
from turnout.reshape import upcycle
from turnout.reshape.calibrate import reach

HIDDEN = 24
VALID = [
    (experts, top_k, shards)
    for shards in (1, 2, 3, 4, 8)
    for experts in (shards, 2 * shards, 3 * shards, 16 // shards * shards)
    for top_k in (shards, 2 * shards, experts)
    if top_k <= experts
]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@torch.no_grad()
def test_each_layer_computes_what_the_dense_one_did(activation: str) -> None:
    lm = make(layers=1, activation=activation)
    x_TD = torch.randn(200, 16, generator=torch.Generator().manual_seed(5))
    want_TD = lm.blocks[0].ff(x_TD)
    for experts, top_k, shards in sorted(set(VALID)) if activation == "swiglu" else VALID[-4:]:
        new, report = upcycle(lm, num_experts=experts, top_k=top_k, granularity=shards, seed=experts)
        got_TD = new.blocks[0].ff(x_TD).output
        worst_T = (got_TD - want_TD).norm(dim=1) / want_TD.norm(dim=1)
        assert worst_T.max() <= 1e-5, (experts, top_k, shards)
        assert report["relative_difference"] <= 1e-5, (experts, top_k, shards)


@torch.no_grad()
def test_a_group_of_shards_is_chosen_together_and_not_always_the_same() -> None:
    new, _ = upcycle(make(), num_experts=12, top_k=6, granularity=3)
    x_TD = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    chosen_TCG = (new.routers[0](x_TD).dense() > 0).unflatten(1, (4, 3))
    assert torch.equal(chosen_TCG.all(2), chosen_TCG.any(2))
    assert (chosen_TCG.all(2).sum(1) == 2).all()
    assert (chosen_TCG.any(2).sum(0) > 0).all()


@torch.no_grad()
def test_one_expert_a_token_starts_spread_over_the_copies() -> None:
    new, _ = upcycle(make(), num_experts=8, top_k=1)
    load_E = new.routers[0](torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))).load_E
    assert (load_E > 0).sum() >= 6
    assert load_E.max() < 1000


@pytest.mark.parametrize("place", ["before", "after", "both"])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_starting_weights_of_one_expert_are_even_wherever_the_norms_stand(place: str, seed: int) -> None:
    """Without a norm before it a feed-forward layer takes the stream itself, which grows from layer to layer."""
    lm = make(seed, layers=3, norm_place=place, embedding_scale=30.0, residual_scale=2.0)
    new, report = upcycle(lm, num_experts=8, top_k=1, batches=[ids()])
    assert report["relative_difference"] <= 1e-5
    seen: list[torch.Tensor] = []
    for block in lm.blocks:
        block.ff.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    lm(ids())
    for layer, x_BSD in enumerate(seen):
        most = float(x_BSD.square().mean(-1).sqrt().max())
        assert 0.05 * reach(lm, layer) < most <= reach(lm, layer) * 1.001
        assert 0 < new.blocks[layer].ff.router(x_BSD.flatten(0, 1)).weight_R.std() < 1e-5


@pytest.mark.parametrize(
    ("sizes", "near"),
    [((8, 3, 2), "(8, 4, 2)"), ((9, 2, 2), "(8, 2, 2)"), ((8, 5, 5), "(8, 4, 4)"), ((4, 6, 1), "(4, 4, 1)"),
     ((0, 1, 1), "(1, 1, 1)")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_does(sizes: tuple[int, int, int], near: str) -> None:
    experts, top_k, shards = sizes
    with pytest.raises(UsageError, match="Nearest fix") as caught:
        upcycle(make(), num_experts=experts, top_k=top_k, granularity=shards)
    offered = re.findall(r"\((\d+), (\d+), (\d+)\)", str(caught.value))
    assert offered and near in str(caught.value)
    for e, k, g in offered:  # what is offered works
        upcycle(make(), num_experts=int(e), top_k=int(k), granularity=int(g))


def test_models_with_experts_are_refused() -> None:
    new, _ = upcycle(make(), num_experts=4, top_k=2)
    with pytest.raises(UsageError, match="must be dense"):
        upcycle(new, num_experts=4, top_k=2)
    with pytest.raises(UsageError, match="router_std"):
        upcycle(make(), num_experts=4, top_k=1, router_std=0.1)
    with pytest.raises(UsageError, match="layers"):
        upcycle(make(), num_experts=4, top_k=2, layers=(7,))


def test_only_the_layers_asked_for_become_sparse_and_the_report_counts_them() -> None:
    lm = make(layers=3)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    new, report = upcycle(lm, num_experts=4, top_k=2, layers=(1,))
    assert [isinstance(block.ff, MoE) for block in new.blocks] == [False, True, False]
    assert report["layers"] == [1]
    assert report["params_after"] == sum(p.numel() for p in new.parameters())
    assert report["params_before"] == sum(p.numel() for p in lm.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    new.embedding.data.zero_()  # nothing is shared
    assert lm.embedding.abs().sum() > 0


def test_the_copies_part_when_trained() -> None:
    new, _ = upcycle(make(), num_experts=8, top_k=4, granularity=2)
    new.train()
    id_BS = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(new.parameters(), lr=0.5)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(new(id_BS[:, :-1]).logits_BSV.flatten(0, 1), id_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    up_EHD = new.blocks[0].ff.bank.up.detach()
    assert all(not torch.equal(up_EHD[a], up_EHD[a + 2]) for a in range(6))
    assert not torch.equal(new.routers[0].weight[0], new.routers[0].weight[1])


def test_half_precision_keeps_its_dtype() -> None:
    new, report = upcycle(make().bfloat16(), num_experts=4, top_k=2)
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert report["relative_difference"] < 0.02


@pytest.mark.parametrize(("top_k", "shards"), [(2, 1), (4, 2), (1, 1)])
@pytest.mark.parametrize("activation", ["gelu_tanh", "geglu_tanh"])
def test_biases_are_those_of_the_dense_layer(top_k: int, shards: int, activation: str) -> None:
    """As GPT-2 has them, and norms with a bias before them."""
    lm = make(ff_bias=True, norm="layer", activation=activation, rope_layers=(), learned_positions=True)
    new, report = upcycle(lm, num_experts=8, top_k=top_k, granularity=shards)
    assert report["relative_difference"] < 1e-5 and new.config.moe.bias
    torch.testing.assert_close(new(ids()).logits_BSV, lm(ids()).logits_BSV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_gemma_is_upcycled_exactly(top_k: int) -> None:
    norms = {"norm": "rms_plus_one", "norm_place": "both", "embedding_scale": 4.0, "embedding_rounded": True}
    caps = {"attention_softcap": 2.0, "logit_softcap": 5.0, "window": 8, "window_layers": (0,), "local_rope_theta": 1e3}
    lm = make(**norms, **caps, activation="geglu_tanh")
    _, report = upcycle(lm, num_experts=4, top_k=top_k)
    assert report["relative_difference"] < 1e-5
