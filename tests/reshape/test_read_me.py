"""Read-ME: masks that are what they say, experts that compute what their masks do, a router that learns its labels."""

import sys

import pytest
import torch
from small import ids, make, sparse

from turnout.errors import DataError, UsageError
from turnout.models import LM
from turnout.reshape import read_me
from turnout.reshape.calibrate import watch
from turnout.reshape.to_sparse import neuron_masks as masked
from turnout.run import activate
from turnout.types import Routing

SIZES = {"gate": {"width": 8, "layers": 1}, "router_steps": 2}


def domains() -> dict[str, list[torch.Tensor]]:
    """Three kinds of text that share no token."""
    kinds = {"low": (0, 20), "middle": (20, 40), "high": (40, 61)}
    return {
        name: [torch.randint(a, b, (2, 32), generator=torch.Generator().manual_seed(a + n)) for n in range(3)]
        for name, (a, b) in kinds.items()
    }


def hidden(lm: LM, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
    ff = lm.blocks[layer].ff
    return activate(x_TD @ ff.up.t(), ff.activation)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("router", ["pre_gate", "layers"])
@torch.no_grad()
def test_a_token_of_an_expert_gets_the_dense_layer_without_the_neurons_outside_its_mask(activation, router) -> None:
    lm, text = make(activation=activation), domains()
    new, report = read_me(lm, text, router=router, **SIZES)
    x_TD = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    for layer, block in enumerate(lm.blocks):
        shared = report["shared_neurons"][str(layer)]
        for expert, name in enumerate(text):
            own = report["expert_neurons"][str(layer)][name]
            mask_F = torch.zeros(24)
            mask_F[shared + own] = 1
            assert len({*shared, *own}) == len(shared) + len(own) == 12 == report["mask_size"]
            want_TD = (hidden(lm, layer, x_TD) * mask_F) @ block.ff.down.t()
            forced = Routing.from_topk(torch.full((9, 1), expert), torch.ones(9, 1), num_experts=3)
            got_TD = new.blocks[layer].ff(x_TD, routing=forced).output
            torch.testing.assert_close(got_TD, want_TD, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_masks_are_the_most_active_neurons_of_their_text() -> None:
    lm, text = make(), domains()
    _, report = read_me(lm, text, keep=0.25, **SIZES)
    commons = []
    for layer in range(2):
        tops = []
        for name, batches in text.items():
            seen: list[torch.Tensor] = []
            watch(lm, batches, lambda at, x_TD, _, seen=seen, layer=layer: seen.append(x_TD) if at == layer else None)
            mean_F = hidden(lm, layer, torch.cat(seen)).abs().mean(0)
            tops.append(set(mean_F.topk(6)[1].tolist()))
            shared, own = report["shared_neurons"][str(layer)], report["expert_neurons"][str(layer)][name]
            assert {*shared, *own} == tops[-1]
        common = set.intersection(*tops)
        commons.append(len(common))
        assert set(report["shared_neurons"][str(layer)]) <= common
        assert report["left_out"][layer] == 24 - len(set.union(*tops))
        shared = len(report["shared_neurons"][str(layer)])
        assert report["copies"][layer] == shared + 3 * (6 - shared) - len(set.union(*tops))
    assert report["shared_by_all"] == commons
    assert {len(shared) for shared in report["shared_neurons"].values()} == {min(commons)}


@torch.no_grad()
def test_with_all_neurons_or_all_experts_on_it_is_the_dense_layer(monkeypatch) -> None:
    lm, text = make(), domains()
    same, report = read_me(lm, text, keep=1.0)
    assert report["relative_difference"] == 0 and same.config == lm.config
    # Two halves that share nothing: each neuron is in one expert, none is always on.
    halves_EF = torch.stack([torch.arange(24) % 2, 1 - torch.arange(24) % 2]).double()
    monkeypatch.setattr(
        sys.modules["turnout.reshape.to_sparse.read_me"], "importance", lambda lm, text: [halves_EF, halves_EF]
    )
    new, report = read_me(lm, {"a": text["low"], "b": text["high"]}, **SIZES)
    assert report["copies"] == report["left_out"] == [0, 0] and new.blocks[0].ff.shared is None
    x_TD = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    for layer, block in enumerate(lm.blocks):
        both = new.blocks[layer].ff(x_TD, routing=Routing.from_dense(torch.ones(9, 2))).output
        torch.testing.assert_close(both, block.ff(x_TD), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_domain_makes_a_narrower_dense_model() -> None:
    lm = make()
    new, report = read_me(lm, {"low": domains()["low"]})
    assert new.config.moe is None and new.config.hidden == 12 and report["shared_by_all"] == [12, 12]
    assert report["params_after"] < report["params_before"]


@torch.no_grad()
def test_random_masks_are_of_the_same_sizes() -> None:
    new, report = read_me(make(), domains(), by="random", **SIZES)
    like, want = read_me(make(), domains(), **SIZES)
    assert new.config == like.config
    for key in ("copies", "left_out", "params_after", "mask_size"):
        assert report[key] == want[key]
    assert report["expert_neurons"] != want["expert_neurons"]


def test_labels_count_the_top_activations_in_each_mask() -> None:
    hidden_TF = torch.tensor([[9.0, -8, 7, 6, 5, 4, 3, 2, 1, 0.5]])
    expert_EF = torch.zeros(2, 10, dtype=torch.bool)
    expert_EF[0, :5], expert_EF[1, 1:6] = True, True
    want = [(5 + 4 + 3 + 2 + 1) / 15, (4 + 3 + 2 + 1 + 0) / 15]
    assert masked.labels(hidden_TF, expert_EF)[0].tolist() == pytest.approx(want)


@pytest.mark.parametrize("router", ["pre_gate", "layers"])
def test_the_router_learns_where_tokens_of_each_domain_belong(router: str) -> None:
    """Domains that share no token, in layers whose neurons look at the domain: the best mask is that of the domain."""
    lm = make()
    with torch.no_grad():
        lm.embedding.mul_(0.1)
        for n, (a, b) in enumerate(((0, 20), (20, 40), (40, 61))):
            lm.embedding[a:b, n] += 3
        for block in lm.blocks:
            block.attention.out.weight.mul_(0.01)
            block.ff.up.mul_(0.1)
            block.ff.down.mul_(0.01)
            for n in range(3):
                block.ff.up[8 * n : 8 * n + 8, n] += 2
                block.ff.up[24 + 8 * n : 32 + 8 * n, n] += 2
    before, after = (
        read_me(lm, domains(), keep=1 / 3, router=router, gate=SIZES["gate"], router_steps=steps, lr=0.03)
        for steps in (0, 60)
    )
    assert min(after[1]["agreement"]) > 0.95 > max(before[1]["agreement"])
    if router == "pre_gate":
        for expert, batches in enumerate(domains().values()):
            assert all(r.load_E[expert] > 0.95 * r.num_tokens for r in after[0].route(batches[0]))
    for expert, shares in enumerate(after[1]["experts_of_domain"].values()):
        assert shares[expert] > 0.95


def test_the_rounds_lower_the_loss_and_leave_the_router_fixed_while_the_model_learns() -> None:
    lm, text = make(), domains()
    losses = []
    for steps in (0, 15):
        new, report = read_me(lm, text, gate=SIZES["gate"], rounds=2, router_steps=3, backbone_steps=steps, lr=0.01)
        logits_BSV = new(text["low"][0]).logits_BSV[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), text["low"][0][:, 1:].flatten()))
        assert len(report["agreement"]) == 2
    assert losses[1] < losses[0] - 0.5
    one, _ = read_me(lm, text, gate=SIZES["gate"], router_steps=3, backbone_steps=0)
    two, _ = read_me(lm, text, gate=SIZES["gate"], router_steps=3, backbone_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(one.pre_gate.parameters(), two.pre_gate.parameters(), strict=True))
    assert not torch.equal(one.embedding, two.embedding)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0.0}, "keep"),
        ({"by": "norm"}, "norm"),
        ({"router": "layer"}, "layers"),
        ({"rounds": -1}, "rounds"),
        ({"lr": 0.0}, "lr"),
        ({"gate": {"heads": 3, "width": 8}}, "heads"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        read_me(make(), domains(), **options)


def test_models_and_text_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="be dense"):
        read_me(sparse(), domains())
    with pytest.raises(UsageError, match="domains"):
        read_me(make(), {})
    with pytest.raises(DataError, match="domain 'a'"):
        read_me(make(), {"a": [], "b": [ids()]})
