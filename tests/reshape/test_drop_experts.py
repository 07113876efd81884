"""Expert pruning: scores worked by hand, unused experts cost nothing, and what cannot be pruned is refused."""

import pytest
import torch
from small import gpt_oss, make, sparse

from turnout.decide.token import loss_free
from turnout.errors import DataError, UsageError
from turnout.recipes.steps import Drop
from turnout.reshape import drop_experts
from turnout.reshape.to_smaller.drop_experts import planned
from turnout.run import activate


def silence(lm, *experts: int) -> None:
    """Makes these experts the last that any token would take."""
    with torch.no_grad():
        for router in lm.routers:
            router.bias_E[list(experts)] = -10.0


@torch.no_grad()
def by_hand(lm, layer: int, batches) -> list[float]:
    """REAP's score, one token and one expert at a time."""
    block, router, bank = lm.blocks[layer], lm.blocks[layer].ff.router, lm.blocks[layer].ff.bank
    seen = []
    handle = block.ff.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for id_BS in batches:
        lm(id_BS)
    handle.remove()
    values: list[list[float]] = [[] for _ in range(router.num_experts)]
    for x_D in torch.cat([x.flatten(0, 1) for x in seen]):
        logit_E = router.weight @ x_D + (0 if getattr(router, "bias", None) is None else router.bias)
        score_E = logit_E.sigmoid() if hasattr(router, "bias_E") else logit_E.softmax(0)
        chosen_K = (score_E + getattr(router, "bias_E", 0)).topk(router.top_k).indices
        for e in chosen_K.tolist():
            up_bias_H, down_bias_D = (0, 0) if bank.up_bias is None else (bank.up_bias[e], bank.down_bias[e])
            f_D = bank.down[e] @ activate(bank.up[e] @ x_D + up_bias_H, bank.activation) + down_bias_D
            whole = score_E[chosen_K].sum() if getattr(router, "renormalize", router.top_k > 1) else 1.0
            values[e].append(float(getattr(router, "scale", 1.0) * score_E[e] / whole * f_D.norm()))
    return [sum(v) / len(v) if v else 0.0 for v in values]


@pytest.mark.parametrize(
    ("router", "options"),
    [("TopK", {"renormalize": True}), ("TopK", {"renormalize": False}), ("Switch", {"top_k": 1}), ("LossFree", {}),
     ("LossFree", {"renormalize": True}), ("GroupLimited", {"scale": 2.5})],
)  # fmt: skip
def test_scores_equal_those_worked_out_token_by_token(router: str, options: dict, text) -> None:
    lm = sparse(router=router, **options)
    _, report = drop_experts(lm, keep=4, batches=text)
    for layer in range(2):
        want = by_hand(lm, layer, text)
        assert report["scores"][str(layer)] == pytest.approx(want, rel=1e-4)
        best = sorted(sorted(range(6), key=lambda e: -want[e])[:4])
        assert report["kept"][str(layer)] == best


@torch.no_grad()
def test_biases_of_experts_and_router_go_with_them(text) -> None:
    lm = gpt_oss()
    for router in lm.routers:
        router.bias[[1, 4]] = -50.0
    new, report = drop_experts(lm, keep=4, batches=text)
    assert report["kept"] == {"0": [0, 2, 3, 5], "1": [0, 2, 3, 5]} and report["relative_difference"] <= 1e-6
    for old, cut in zip(lm.blocks, new.blocks, strict=True):
        assert torch.equal(cut.ff.router.bias, old.ff.router.bias[[0, 2, 3, 5]])
        for name in ("up_bias", "down_bias"):
            assert torch.equal(getattr(cut.ff.bank, name), getattr(old.ff.bank, name)[[0, 2, 3, 5]])
    lm = gpt_oss(seed=1)
    _, report = drop_experts(lm, keep=4, batches=text)
    assert report["scores"]["1"] == pytest.approx(by_hand(lm, 1, text), rel=1e-4)


@pytest.mark.parametrize("by", ["reap", "frequency"])
@torch.no_grad()
def test_dropping_experts_that_no_token_takes_changes_no_bit(by: str, text, monkeypatch) -> None:
    # A product whose bits do not depend on how many rows the router has, as those of BLAS may.
    monkeypatch.setattr(loss_free, "linear", lambda x_TD, weight_ED: (x_TD[:, None] * weight_ED).sum(2))
    lm = sparse(router="LossFree", num_experts=8)
    silence(lm, 0, 3, 6)
    new, report = drop_experts(lm, keep=5, by=by, batches=text)
    assert report["kept"] == {"0": [1, 2, 4, 5, 7], "1": [1, 2, 4, 5, 7]}
    assert report["routed_share_dropped"] == 0
    assert report["largest_difference"] == 0
    assert all(torch.equal(new(id_BS).logits_BSV, lm(id_BS).logits_BSV) for id_BS in text)
    assert torch.equal(new.routers[0].bias_E, lm.routers[0].bias_E[[1, 2, 4, 5, 7]])
    assert torch.equal(new.routers[0].weight, lm.routers[0].weight[[1, 2, 4, 5, 7]])
    monkeypatch.undo()
    assert drop_experts(lm, keep=5, by=by, batches=text)[1]["relative_difference"] <= 1e-6


@torch.no_grad()
def test_under_a_renormalised_softmax_they_change_no_more_than_rounding(text) -> None:
    lm = sparse(num_experts=8)
    unused = drop_experts(lm, keep=8, batches=text[:1])[0]
    for block in unused.blocks:  # a row that always loses: minus the sum of two that do not
        block.ff.router.weight[5] = -10 * block.ff.router.weight[[0, 1]].sum(0)
        block.ff.router.weight[2] = 0
    one = [text[0][:1, :2]]
    loads = [routing.load_E for routing in unused(one[0]).routings]
    left = max(int((load_E > 0).sum()) for load_E in loads)
    new, report = drop_experts(unused, keep=max(left, 2), by="frequency", batches=one)
    assert report["routed_share_dropped"] == 0
    torch.testing.assert_close(new(one[0]).logits_BSV, unused(one[0]).logits_BSV, rtol=1e-5, atol=1e-5)


def test_an_expert_that_does_nothing_ranks_last_by_reap_but_not_by_frequency(text) -> None:
    lm = sparse()
    with torch.no_grad():
        for block in lm.blocks:
            block.ff.bank.down[4] = 0
            block.ff.router.weight[4] *= 3
    _, reap = drop_experts(lm, keep=5, batches=text)
    _, frequency = drop_experts(lm, keep=5, by="frequency", batches=text)
    assert all(4 not in kept for kept in reap["kept"].values())
    assert any(4 in kept for kept in frequency["kept"].values())


def test_groups_are_pruned_equally(text) -> None:
    lm = sparse(router="GroupLimited", num_experts=8, num_groups=2, top_groups=1)
    new, report = drop_experts(lm, keep=4, batches=text)
    for kept in report["kept"].values():
        assert [sum(e // 4 == group for e in kept) for group in (0, 1)] == [2, 2]
    assert new.config.moe.router_options["num_groups"] == 2
    assert new.routers[0].weight.shape == (4, 16)
    with pytest.raises(UsageError, match=r"multiple of num_groups=2.*keep=6"):
        drop_experts(lm, keep=5, batches=text)
    with pytest.raises(UsageError, match="from 4 experts"):  # one open group must hold both experts of a token
        drop_experts(lm, keep=2, batches=text)
    report = drop_experts(lm, share=0.4, batches=text)[1]
    assert report["num_experts"] == [8, 6]
    assert "3.2 of 8 experts were asked for; 2 went, whole ones in each of 2 groups" in report.notes


def test_more_than_none_is_proposed_where_groups_go_together() -> None:
    lm = sparse(router="GroupLimited", num_experts=8, num_groups=2, top_groups=1)
    with pytest.raises(UsageError, match=r"multiple of num_groups=2.*got 7.*keep=6"):
        planned(lm.config, keep=7)
    with pytest.raises(UsageError, match=r"multiple of 2.*got 1\. Nearest fix: pass count=2"):
        Drop(count=1).planned(lm.config)
    with pytest.raises(UsageError, match=r"leave 4 of 8 experts, in 2 groups.*got 5.*count=4"):
        Drop(count=5).planned(lm.config)


def test_a_share_of_less_than_one_expert_a_group_is_refused() -> None:
    lm = sparse(router="GroupLimited", num_experts=8, num_groups=2, top_groups=1)
    with pytest.raises(UsageError, match=r"each of the 2 groups.*share=0\.25 or more"):
        drop_experts(lm, share=0.2, by="random")
    small = sparse(router="GroupLimited", num_experts=8, num_groups=4, top_groups=2)
    with pytest.raises(UsageError, match="none can go: the router scores a group by its two best"):
        drop_experts(small, share=0.25, by="random")
    assert drop_experts(lm, share=0.0, by="random")[1].notes == ("nothing was dropped",)


def test_what_cannot_be_pruned_is_refused(text) -> None:
    lm = sparse()
    with pytest.raises(UsageError, match=r"top_k=2.*keep=2"):
        drop_experts(lm, keep=1, batches=text)
    with pytest.raises(UsageError, match="one of the two"):
        drop_experts(lm, keep=4, share=0.5, batches=text)
    with pytest.raises(UsageError, match="one of the two"):
        drop_experts(lm, share=1.0, batches=text)
    with pytest.raises(UsageError, match="Did you mean 'reap'"):
        drop_experts(lm, keep=4, by="rep", batches=text)
    with pytest.raises(UsageError, match="batches must be given"):
        drop_experts(lm, keep=4)
    with pytest.raises(DataError, match="token ids"):
        drop_experts(lm, keep=4, batches=[torch.randn(2, 3)])
    with pytest.raises(UsageError, match="have experts"):
        drop_experts(make(), keep=1, batches=text)
    with pytest.raises(UsageError, match="Hash"):
        drop_experts(sparse(router="Hash"), keep=3, batches=text)


@pytest.mark.parametrize("router", ["TopK", "Switch", "GShard", "NoisyTopK", "ExpertChoice", "LossFree"])
def test_every_router_with_rows_is_cut_and_still_trains(router: str, text) -> None:
    lm = sparse(router=router, top_k=1 if router == "Switch" else 2)
    new, report = drop_experts(lm, share=0.5, batches=text)
    assert report["num_experts"] == [6, 3]
    assert report["params_after"] == sum(p.numel() for p in new.parameters()) < report["params_before"]
    new.train()(text[0]).logits_BSV.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())


def test_shared_experts_and_dense_layers_stay(text) -> None:
    from turnout.models import MoEConfig

    lm = make(layers=3, moe=MoEConfig(4, 2, 12, shared_hidden=8, shared_gate=True, layers=(0, 2)))
    new, report = drop_experts(lm, keep=2, batches=text)
    assert set(report["kept"]) == {"0", "2"}
    assert torch.equal(new.blocks[1].ff.up, lm.blocks[1].ff.up)
    assert torch.equal(new.blocks[0].ff.shared.up, lm.blocks[0].ff.shared.up)


@torch.no_grad()
def test_what_a_router_holds_but_not_for_each_expert_stays(text) -> None:
    lm = sparse(router="DenseToSparse", steps=10)
    for router in lm.routers:
        router.done.fill_(7)
    new, _ = drop_experts(lm, keep=4, batches=text)
    assert [router.done.item() for router in new.routers] == [7.0, 7.0]
    assert new.routers[0].weight.shape == (4, 16)
