"""Merging: labels and weights as loops over experts find them, permutations undone exactly, copies merged for free."""

import itertools

import pytest
import torch
from small import gpt_oss, make, sparse
from torch.nn import functional as F

from turnout.errors import UsageError
from turnout.models import MoEConfig
from turnout.models.checkpoint import to_hf
from turnout.reshape import drop_experts, merge_experts
from turnout.reshape.to_smaller.merge_experts import _matching


@torch.no_grad()
def logits(lm, text) -> list[torch.Tensor]:
    """(T, E) per layer."""
    runs = [lm(id_BS).routings for id_BS in text]
    return [torch.cat([run[layer].logit_TE for run in runs]).double() for layer in range(len(runs[0]))]


@pytest.mark.parametrize("seed", range(30))
def test_no_expert_is_mislabelled(seed: int, text) -> None:
    lm = sparse(seed, num_experts=9)
    keep = 1 + seed % 8
    _, report = merge_experts(lm, keep=keep, batches=text)
    with torch.no_grad():
        loads = [sum(lm(id_BS).routings[layer].load_E for id_BS in text) for layer in range(2)]
    # Dominant: the best of each layer, then the best of all.
    ranked = sorted((-int(loads[n][e]), n, e) for n in range(2) for e in range(9))
    firsts = [min(item for item in ranked if item[1] == n) for n in range(2)]
    chosen = firsts + [item for item in ranked if item not in firsts][: 2 * keep - 2]
    for layer, logit_TE in enumerate(logits(lm, text)):
        dominant = sorted(e for _, n, e in chosen if n == layer)
        assert report["dominant"][str(layer)] == dominant
        assert report["distinct"][layer] == len(dominant)
        for e, leader in enumerate(report["leader"][str(layer)]):
            cosines = [float(F.cosine_similarity(logit_TE[:, e], logit_TE[:, d], dim=0)) for d in dominant]
            want = e if e in dominant else dominant[max(range(len(dominant)), key=cosines.__getitem__)]
            assert leader == want, f"seed {seed}, layer {layer}, expert {e}"


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@torch.no_grad()
def test_copies_with_shuffled_neurons_merge_without_loss_only_when_aligned(activation: str, text) -> None:
    lm = make(moe=MoEConfig(6, 2, 12, activation=activation))
    generator = torch.Generator().manual_seed(0)
    for block in lm.blocks:
        bank = block.ff.bank
        for e in range(1, 6):
            order_F = torch.randperm(12, generator=generator)
            bank.up[e] = bank.up[0].unflatten(0, (-1, 12))[:, order_F].flatten(0, 1)
            bank.down[e] = bank.down[0][:, order_F]
    merged, aligned = merge_experts(lm, keep=2, batches=text)
    _, plain = merge_experts(lm, keep=2, batches=text, align=False)
    assert aligned["relative_difference"] < 1e-6
    assert plain["relative_difference"] > 0.01
    assert sum(merged.config.moe.distinct) == 4
    assert aligned["params_after"] == sum(p.numel() for p in merged.parameters()) < aligned["params_before"]


@torch.no_grad()
def test_biases_are_shuffled_and_merged_with_their_neurons(text) -> None:
    lm = gpt_oss()
    generator = torch.Generator().manual_seed(0)
    for block in lm.blocks:
        bank = block.ff.bank
        for e in range(1, 6):
            order_F = torch.randperm(12, generator=generator)
            bank.up[e] = bank.up[0].unflatten(0, (2, 12))[:, order_F].flatten(0, 1)
            bank.up_bias[e] = bank.up_bias[0].unflatten(0, (2, 12))[:, order_F].flatten()
            bank.down[e], bank.down_bias[e] = bank.down[0][:, order_F], bank.down_bias[0]
    _, aligned = merge_experts(lm, keep=2, batches=text)
    _, plain = merge_experts(lm, keep=2, batches=text, align=False)
    assert aligned["relative_difference"] < 1e-6 and plain["relative_difference"] > 0.01


@pytest.mark.parametrize("make_lm", [sparse, gpt_oss])
@torch.no_grad()
def test_weights_are_the_frequencies(make_lm, text) -> None:
    lm = make_lm()
    merged, report = merge_experts(lm, keep=2, batches=text, align=False)
    for layer in range(2):
        bank, new = lm.blocks[layer].ff.bank, merged.blocks[layer].ff.bank
        leaders, frequency_E = report["leader"][str(layer)], report["frequency"][str(layer)]
        assert sum(frequency_E) == pytest.approx(1)
        for place, dominant in enumerate(report["dominant"][str(layer)]):
            members = [e for e in range(6) if leaders[e] == dominant]
            total = sum(frequency_E[e] for e in members)
            want = sum(frequency_E[e] / total * bank.up[e] for e in members)
            torch.testing.assert_close(new.up[place], want)
            want = sum(frequency_E[e] / total * bank.down[e] for e in members)
            torch.testing.assert_close(new.down[place], want)
            for name in ("up_bias", "down_bias") if bank.up_bias is not None else ():
                want = sum(frequency_E[e] / total * getattr(bank, name)[e] for e in members)
                torch.testing.assert_close(getattr(new, name)[place], want)


@torch.no_grad()
def test_the_merged_layer_is_the_one_whose_experts_all_hold_their_groups_weights(text) -> None:
    lm = sparse(num_experts=8, top_k=3)
    merged, report = merge_experts(lm, keep=2, batches=text)
    whole = drop_experts(lm, keep=8, batches=text)[0]
    for layer, block in enumerate(whole.blocks):
        new = merged.blocks[layer].ff
        dominant = report["dominant"][str(layer)]
        for e, leader in enumerate(report["leader"][str(layer)]):
            assert new.label_E[e] == dominant.index(leader)
            block.ff.bank.up[e] = new.bank.up[dominant.index(leader)]
            block.ff.bank.down[e] = new.bank.down[dominant.index(leader)]
    out, want = merged(text[0]), whole(text[0])
    torch.testing.assert_close(out.logits_BSV, want.logits_BSV, rtol=1e-4, atol=1e-5)
    assert [routing.num_experts for routing in out.routings] == [8, 8]
    assert merged.cost().params_active <= merged.cost().params


@pytest.mark.parametrize("seed", range(10))
def test_the_matching_is_the_best_permutation_and_keeps_the_function(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    leader_FX, member_FX = torch.randn(2, 5, 7, generator=generator).double()
    found_F = _matching(leader_FX, member_FX)
    gains = {p: float((leader_FX * member_FX[list(p)]).sum()) for p in itertools.permutations(range(5))}
    assert sorted(found_F.tolist()) == list(range(5))
    assert gains[tuple(found_F.tolist())] == pytest.approx(max(gains.values()))


def test_a_merged_model_trains_and_says_what_it_cannot(text, tmp_path) -> None:
    merged, _ = merge_experts(sparse(renormalize=True), keep=3, batches=text)
    merged.train()(text[0]).logits_BSV.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in merged.parameters())
    with pytest.raises(UsageError, match="none merged yet"):
        merge_experts(merged, keep=2, batches=text)
    with pytest.raises(UsageError, match="none merged yet"):
        drop_experts(merged, keep=3, batches=text)
    with pytest.raises(UsageError, match="distinct"):
        to_hf(merged, tmp_path / "hf")


def test_what_cannot_be_merged_is_refused(text) -> None:
    with pytest.raises(UsageError, match=r"from 1 to num_experts=6.*keep=6"):
        merge_experts(sparse(), keep=7, batches=text)
    with pytest.raises(UsageError, match="a dense one"):
        merge_experts(make(), keep=1, batches=text)
    with pytest.raises(UsageError, match="router with logits"):
        merge_experts(sparse(router="Hash"), keep=1, batches=text)
    with pytest.raises(UsageError, match="batches must be given"):
        merge_experts(sparse(), keep=1)


@pytest.mark.parametrize("router", ["LossFree", "GroupLimited", "Switch"])
def test_routers_with_correction_biases_and_groups_stay_untouched(router: str, text) -> None:
    options = {"num_groups": 2, "top_groups": 1} if router == "GroupLimited" else {}
    lm = sparse(router=router, top_k=1 if router == "Switch" else 2, **options)
    merged, _ = merge_experts(lm, keep=2, batches=text)
    for old, new in zip(lm.routers, merged.routers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))


def test_random_groups_are_drawn_and_weigh_their_members_alike(text) -> None:
    lm = sparse(num_experts=8)
    _, report = merge_experts(lm, keep=3, batches=text, by="random", seed=1)
    assert report["leader"] != merge_experts(lm, keep=3, batches=text)[1]["leader"]
    assert report["leader"] == merge_experts(lm, keep=3, batches=text[:1], by="random", seed=1)[1]["leader"]
    plain, told = merge_experts(lm, keep=3, batches=text, by="random", seed=1, align=False)
    leader_E = torch.tensor(told["leader"]["0"])
    for place, leader in enumerate(told["dominant"]["0"]):
        members = lm.blocks[0].ff.bank.down[leader_E == leader]
        torch.testing.assert_close(plain.blocks[0].ff.bank.down[place], members.mean(0))
    with pytest.raises(UsageError, match="routing"):
        merge_experts(lm, keep=3, batches=text, by="rooting")
