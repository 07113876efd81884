"""Splitting: every neuron once, equal shares, and with all experts on the dense layer exactly."""

import itertools

import pytest
import torch
from small import make, sparse
from torch.nn import functional as F

from turnout.errors import UsageError
from turnout.paths import FeedForward
from turnout.reshape import split
from turnout.reshape.to_sparse.neuron_groups import _importance, balanced_means
from turnout.types import Routing

WAYS = ("cluster", "coactivation", "gradient", "random")
every_way = pytest.mark.parametrize("by", WAYS)


@every_way
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@torch.no_grad()
def test_all_experts_on_is_the_dense_layer_and_every_neuron_is_in_one_expert(by: str, activation: str, text) -> None:
    lm = make(activation=activation)
    new, report = split(lm, num_experts=6, top_k=6, by=by, batches=text)
    assert report["relative_difference"] <= 1e-5
    half, part = split(lm, num_experts=6, top_k=2, by=by, batches=text)
    assert part["relative_difference"] > 1e-3
    x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    for layer, block in enumerate(lm.blocks):
        want_TD = block.ff(x_TD)
        torch.testing.assert_close(new.blocks[layer].ff(x_TD).output, want_TD, rtol=1e-5, atol=1e-5)
        bank = half.blocks[layer].ff.bank  # unit weights, whatever the router says: K of them together are 1 each
        everything = Routing.from_dense(torch.full((50, 6), 1 / 2))
        torch.testing.assert_close(bank(x_TD, everything), want_TD, rtol=1e-5, atol=1e-5)
        assert [report["expert_of_neuron"][str(layer)].count(e) for e in range(6)] == [4] * 6
        rows = {tuple(row) for row in block.ff.up.tolist()}
        assert {tuple(row) for expert in new.blocks[layer].ff.bank.up.tolist() for row in expert} == rows


@pytest.mark.parametrize("place", ["before", "after", "both"])
@torch.no_grad()
def test_chosen_experts_weigh_nearly_one_each(text, place: str) -> None:
    new, _ = split(make(norm_place=place), num_experts=6, top_k=2, batches=text)
    assert isinstance(split(make(), num_experts=1, top_k=1)[0].blocks[0].ff, FeedForward)
    for routing in new(text[0]).routings:
        assert (2 * routing.weight_R - 1).abs().max() < 0.01
        assert (routing.load_E > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_balanced_means_finds_planted_groups_of_equal_size(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centre_GX = F.normalize(torch.randn(4, 12, generator=generator), dim=1)
    want_N = torch.randperm(40, generator=generator) % 4
    scale_N1 = torch.rand(40, 1, generator=generator) + 0.5
    point_NX = (centre_GX[want_N] + 0.1 * torch.randn(40, 12, generator=generator)) * scale_N1
    found_N = balanced_means(point_NX, 4, seed)
    assert found_N.bincount().tolist() == [10] * 4
    assert max((torch.tensor(names)[found_N] == want_N).sum() for names in itertools.permutations(range(4))) == 40


@torch.no_grad()
def test_neurons_that_are_active_together_come_together(text) -> None:
    lm = make(layers=1)
    up, gate = lm.blocks[0].ff.up, torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 2
    want_F = torch.arange(24) % 3
    up[:24] = gate[want_F]
    up[24:] = 1.0
    for by in ("cluster", "coactivation"):
        _, report = split(lm, num_experts=3, top_k=2, by=by, batches=text)
        found = report["expert_of_neuron"]["0"]
        assert all(len({found[n] for n in range(24) if want_F[n] == group}) == 1 for group in range(3)), by


def test_importance_is_what_finite_differences_give(text) -> None:
    lm, id_BS = make(layers=1).double(), text[0][:1, :6]
    found_TF = _importance(lm.requires_grad_(False), (id_BS,))[0]
    ff = lm.blocks[0].ff

    def loss(step: float, token: int, neuron: int) -> float:
        def nudge(_, args, y):
            y = y.clone()
            y[0, token] += step * h_TF[token, neuron] * ff.down[:, neuron]
            return y

        handle = ff.register_forward_hook(nudge)
        logits_BSV = lm(id_BS).logits_BSV
        handle.remove()
        return float(F.cross_entropy(logits_BSV[0, :-1], id_BS[0, 1:], reduction="sum"))

    seen = []
    handle = ff.register_forward_hook(lambda _, args, y: seen.append(args[0][0]))
    lm(id_BS)
    handle.remove()
    gate_TF, value_TF = (seen[0] @ ff.up.t()).chunk(2, 1)
    h_TF = F.silu(gate_TF) * value_TF
    for token, neuron in ((0, 0), (2, 5), (4, 23)):
        slope = (loss(0.1, token, neuron) - loss(-0.1, token, neuron)) / 0.2
        assert float(found_TF[token, neuron]) == pytest.approx(abs(slope), rel=0.02, abs=2e-5)


def test_what_cannot_be_split_is_refused(text) -> None:
    with pytest.raises(UsageError, match=r"divide the hidden width 24.*num_experts=6"):
        split(make(), num_experts=7, top_k=2)
    with pytest.raises(UsageError, match=r"from 2 to num_experts=4.*top_k=2"):
        split(make(), num_experts=4, top_k=1)
    with pytest.raises(UsageError, match="top_k=4"):
        split(make(), num_experts=4, top_k=5)
    with pytest.raises(UsageError, match="Did you mean 'cluster'"):
        split(make(), num_experts=4, top_k=2, by="clusters")
    with pytest.raises(UsageError, match="batches must be given"):
        split(make(), num_experts=4, top_k=2, by="gradient")
    for lm in (sparse(),):
        with pytest.raises(UsageError, match="be dense"):
            split(lm, num_experts=4, top_k=2)


@pytest.mark.parametrize("by", ["cluster", "coactivation", "gradient"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_biases_go_with_their_neurons(by: str, activation: str, text) -> None:
    lm = make(ff_bias=True, norm="layer", activation=activation, rope_layers=(), learned_positions=True)
    new, report = split(lm, num_experts=4, top_k=4, by=by, batches=text)
    assert report["relative_difference"] < 1e-5 and new.config.moe.bias
    _, report = split(lm, num_experts=4, top_k=2, by=by, batches=text)
    assert report["relative_difference"] > 1e-3
