"""The language model: what it computes does not depend on how it is asked, and what it costs is what is counted."""

import dataclasses
import itertools

import pytest
import torch
from variants import LATENT, ROUTED, TINY, VARIANTS, every_variant, ids, make

from turnout.errors import ShapeError, UnknownNameError, UsageError
from turnout.measure import count_flops
from turnout.models import LM, Cache, LMConfig, MoEConfig
from turnout.models.attention import attend


@every_variant
@torch.no_grad()
def test_a_cache_changes_nothing(name: str) -> None:
    lm, id_BS = make(name), ids(3, 21)
    whole = lm(id_BS).logits_BSV
    for cuts in ((1,) * 21, (21,), (7, 1, 1, 5, 7), (20, 1), (1, 20)):
        cache = Cache()
        parts = [lm(piece, cache=cache).logits_BSV for piece in id_BS.split(cuts, dim=1)]
        assert cache.length == 21
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-5, msg=lambda m: f"{cuts}: {m}")  # noqa: B023


@every_variant
@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(name: str) -> None:
    lm, id_BS = make(name), ids(4, 13)
    whole = lm(id_BS).logits_BSV
    for row in range(4):
        torch.testing.assert_close(lm(id_BS[row : row + 1]).logits_BSV[0], whole[row], rtol=0, atol=2e-5)


@every_variant
@torch.no_grad()
def test_no_token_sees_a_later_one(name: str) -> None:
    lm, id_BS = make(name), ids(2, 17)
    changed_BS = id_BS.clone()
    changed_BS[:, 11] = (changed_BS[:, 11] + 1) % TINY.vocab_size
    before, after = lm(id_BS).logits_BSV, lm(changed_BS).logits_BSV
    torch.testing.assert_close(after[:, :11], before[:, :11], rtol=0, atol=2e-5)
    assert (after[:, 11] - before[:, 11]).abs().max() > 1e-3


@torch.no_grad()
def test_expert_choice_does_see_later_ones() -> None:
    VARIANTS["expert choice"] = {"moe": dataclasses.replace(ROUTED, router="ExpertChoice")}
    lm, id_BS = make("expert choice"), ids(1, 17)
    del VARIANTS["expert choice"]
    changed_BS = id_BS.clone()
    changed_BS[:, 11:] = (changed_BS[:, 11:] + 1) % TINY.vocab_size
    assert (lm(id_BS).logits_BSV - lm(changed_BS).logits_BSV)[:, :11].abs().max() > 1e-3


@pytest.mark.parametrize("window", [None, 4])
def test_sinks_are_one_more_term_of_the_softmax(window: int | None) -> None:
    """Against the softmax written out, values and gradients; a sink of -inf is none."""
    g = torch.Generator().manual_seed(7)
    for new, total in ((9, 9), (3, 9), (1, 9), (1, 1), (3, 3)):
        q, k, v = (torch.randn(2, h, n, 6, generator=g) for h, n in ((4, new), (2, total), (2, total)))
        sink_H = torch.randn(4, generator=g)
        given = [t.requires_grad_() for t in (q, k, v, sink_H)]
        y = attend(q, k, v, scale=0.4, window=window, sink_H=sink_H)
        score = 0.4 * q @ k.repeat_interleave(2, 1).transpose(2, 3)
        away = torch.arange(total - new, total)[:, None] - torch.arange(total)
        score = score.masked_fill((away < 0) | (away >= (window or total)), -torch.inf)
        share = torch.cat((score, sink_H.view(1, 4, 1, 1).expand(2, 4, new, 1)), -1).softmax(-1)[..., :-1]
        expected = (share @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        slope = torch.randn(y.shape, generator=g)
        for a, b in zip(*(torch.autograd.grad(out, given, slope) for out in (y, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        none = attend(q, k, v, scale=0.4, window=window, sink_H=torch.full((4,), -1e9))
        torch.testing.assert_close(none, attend(q, k, v, scale=0.4, window=window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_scores_are_capped_before_the_softmax(window: int | None) -> None:
    """Against the formula, one score at a time; a cap far away is none."""
    g = torch.Generator().manual_seed(8)
    for new, total in ((9, 9), (3, 9), (1, 9), (1, 1)):
        q, k, v = (torch.randn(2, h, n, 6, generator=g) for h, n in ((4, new), (2, total), (2, total)))
        given = [t.requires_grad_() for t in (q, k, v)]
        y_BSD = attend(q, k, v, scale=0.9, window=window, softcap=0.7)
        rows = []
        for b, h, s in itertools.product(range(2), range(4), range(new)):
            at = s + total - new
            seen = range(max(0, at - (window or total) + 1), at + 1)
            score = torch.stack([0.7 * torch.tanh(0.9 * q[b, h, s] @ k[b, h // 2, t] / 0.7) for t in seen])
            rows.append(score.softmax(0) @ v[b, h // 2, seen.start : seen.stop])
        expected = torch.stack(rows).view(2, 4, new, 6).transpose(1, 2).flatten(2)
        torch.testing.assert_close(y_BSD, expected, rtol=1e-4, atol=1e-5)
        slope = torch.randn(y_BSD.shape, generator=g)
        for a, b in zip(*(torch.autograd.grad(out, given, slope) for out in (y_BSD, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        far = attend(q, k, v, scale=0.9, window=window, softcap=1e4)
        torch.testing.assert_close(far, attend(q, k, v, scale=0.9, window=window), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_window_hides_what_lies_before_it() -> None:
    lm = LM(dataclasses.replace(TINY, window=4, layers=1, init_std=0.2)).eval()
    id_BS = ids(1, 12)
    changed_BS = id_BS.clone()
    changed_BS[:, 3] = (changed_BS[:, 3] + 1) % TINY.vocab_size
    difference_S = (lm(id_BS).logits_BSV - lm(changed_BS).logits_BSV).abs().amax((0, 2))
    assert (difference_S[3:7] > 1e-4).all() and (difference_S[7:] < 1e-5).all() and (difference_S[:3] == 0).all()


@torch.no_grad()
def test_one_expert_is_a_dense_layer() -> None:
    sparse = LM(dataclasses.replace(TINY, moe=MoEConfig(1, 1, TINY.hidden), init_std=0.2), seed=5).eval()
    dense = LM(dataclasses.replace(TINY, init_std=0.2), seed=6).eval()
    for ours, theirs in zip(dense.blocks, sparse.blocks, strict=True):
        theirs.ff.bank.up_EDH[0].copy_(ours.ff.up_DH)
        theirs.ff.bank.down_EFD[0].copy_(ours.ff.down_FD)
    sparse.load_state_dict({k: v for k, v in dense.state_dict().items() if ".ff." not in k}, strict=False)
    torch.testing.assert_close(sparse(ids(2, 9)).logits_BSV, dense(ids(2, 9)).logits_BSV, rtol=0, atol=1e-5)


@every_variant
def test_the_cost_is_what_is_counted(name: str) -> None:
    lm, seq = make(name), 24
    cost = lm.cost(seq=seq)
    assert cost.params == sum(parameter.numel() for parameter in lm.parameters())
    with torch.no_grad():
        counted = count_flops(lambda: lm(ids(3, seq), backend="reference")).flops
    assert cost.flops == pytest.approx(counted / (3 * seq), rel=1e-12)
    inactive = 0
    for block in lm.blocks:
        if hasattr(block.ff, "bank"):
            each = sum(parameter[0].numel() for parameter in block.ff.bank.parameters())
            inactive += each * (lm.config.moe.num_experts - lm.config.moe.top_k)
    assert cost.params_active == cost.params - inactive


@torch.no_grad()
def test_the_cost_is_what_is_counted_where_faster_products_run() -> None:
    lm = LM(LMConfig(vocab_size=512, width=128, layers=1, heads=4, moe=MoEConfig(4, 2, 96), max_seq=256)).eval()
    counted = count_flops(lambda: lm(torch.zeros(1, 256, dtype=torch.long), backend="reference")).flops
    assert lm.cost().flops == counted / 256


@every_variant
def test_every_parameter_learns(name: str) -> None:
    lm = make(name).train()
    out = lm(ids(4, 20))
    out.logits_BSV.square().mean().backward()
    assert [key for key, p in lm.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert len(out.routings) == len(lm.routers)


@pytest.mark.parametrize("place", ["before", "after", "both"])
@torch.no_grad()
def test_the_norms_stand_where_it_says(place: str) -> None:
    lm, x_BSD = make("dense"), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    block = LM(dataclasses.replace(lm.config, norm_place=place, residual_scale=0.5), seed=1).blocks[0]
    for norm in (module for name, module in block.named_modules() if name.endswith("norm")):
        norm.weight.normal_(1, 0.3, generator=torch.Generator().manual_seed(norm.weight.numel()))
    angles, want_BSD = lm.rope(0, 5, x_BSD.dtype), x_BSD
    for part, first, last in (("attention", "attention_norm", "attention_out_norm"), ("ff", "ff_norm", "ff_out_norm")):
        y_BSD = want_BSD if place == "after" else getattr(block, first)(want_BSD)
        y_BSD = block.attention(y_BSD, angles, None) if part == "attention" else block.ff(y_BSD)
        want_BSD = want_BSD + 0.5 * (y_BSD if place == "before" else getattr(block, last)(y_BSD))
    assert (block.ff_norm is None, block.ff_out_norm is None) == (place == "after", place == "before")
    got_BSD, _ = block(x_BSD, angles, None, token_id_BS=ids(1, 5), backend="auto", generator=None)
    torch.testing.assert_close(got_BSD, want_BSD, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_layer_without_rope_knows_no_order() -> None:
    """Alone and without a causal mask in the way: the last token sees the same in any order of those before it."""
    id_BS = ids(1, 9)
    shuffled_BS = id_BS[:, [3, 0, 7, 5, 1, 2, 6, 4, 8]]
    for layers, equal in (((), True), ("all", False)):
        lm = LM(dataclasses.replace(TINY, layers=1, init_std=0.2, rope_layers=layers)).eval()
        last_V, again_V = (lm(x).logits_BSV[0, -1] for x in (id_BS, shuffled_BS))
        assert torch.allclose(last_V, again_V, rtol=0, atol=1e-5) == equal


def test_the_seed_decides_the_weights() -> None:
    for name in ("moe", "latent"):
        first, again, other = make(name, 1).state_dict(), make(name, 1).state_dict(), make(name, 2).state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["embedding"], other["embedding"])


@torch.no_grad()
def test_generation() -> None:
    lm, id_BS = make("moe").train(), ids(2, 5)
    greedy = lm.generate(id_BS, tokens=6, temperature=0)
    assert lm.training and greedy.shape == (2, 11) and torch.equal(greedy[:, :5], id_BS)
    lm.eval()
    for step in range(5, 11):
        assert torch.equal(lm(greedy[:, :step]).logits_BSV[:, -1].argmax(1), greedy[:, step])
    assert torch.equal(lm.generate(id_BS, tokens=6, top_k=1), greedy)

    def drawn(seed: int) -> torch.Tensor:
        return lm.generate(id_BS, tokens=20, top_k=5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert lm.generate(id_BS, tokens=0) is id_BS


@torch.no_grad()
def test_drawn_tokens_follow_the_model() -> None:
    lm, seed = make("dense"), 7
    prompt_BS = ids(1, 4).expand(4000, -1)
    drawn = lm.generate(prompt_BS, tokens=1, temperature=0.7, generator=torch.Generator().manual_seed(seed))[:, -1]
    share_V = torch.bincount(drawn, minlength=61) / 4000
    wanted_V = (lm(prompt_BS[:1]).logits_BSV[0, -1] / 0.7).softmax(0)
    assert (share_V - wanted_V).abs().max() < 0.03, f"seed {seed}"


def test_autocast_and_bf16() -> None:
    id_BS = ids(2, 16)
    for name in ("moe", "latent", "head norm", "gemma", "gpt-2"):
        lm = make(name)
        exact = lm(id_BS).logits_BSV
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = lm(id_BS).logits_BSV
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).square().mean() < 0.01 * exact.square().mean(), name
        half = lm.to(torch.bfloat16)
        assert half.rope.frequency_P.dtype == torch.float32
        assert (half(id_BS).logits_BSV.float() - exact).square().mean() < 0.01 * exact.square().mean(), name


def test_mistakes_are_worded() -> None:
    lm = make("moe")
    for bad, kind in (
        (torch.zeros(5, dtype=torch.long), ShapeError),
        (torch.zeros(1, 0, dtype=torch.long), ShapeError),
        (torch.zeros(1, 5), ShapeError),
        (ids(1, 49), ShapeError),
        (torch.tensor([[61]]), UsageError),
        (torch.tensor([[-1]]), UsageError),
    ):
        with pytest.raises(kind, match="Nearest fix"):
            lm(bad)
    with pytest.raises(UsageError, match="without gradients"):
        lm(ids(1, 3), cache=Cache())
    with pytest.raises(UnknownNameError, match="backend"):
        lm(ids(1, 3), backend="sorted")
    with pytest.raises(ShapeError, match="max_seq"):
        lm.generate(ids(1, 40), tokens=9)
    with pytest.raises(UsageError, match="temperature"):
        lm.generate(ids(1, 4), tokens=9, temperature=-1)
    with torch.no_grad(), pytest.raises(ShapeError, match="2 rows"):
        cache = Cache()
        lm(ids(2, 3), cache=cache)
        lm(ids(1, 1), cache=cache)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"heads": 5, "kv_heads": None}, "heads=4"),
        ({"kv_heads": 3}, "kv_heads=2"),
        ({"head_dim": 7}, "head_dim=8"),
        ({"width": 0}, "width"),
        ({"rope_share": 0.4}, "rope_share=0.25"),
        ({"rope_share": 1.5}, "rope_share"),
        ({"layers": True}, "layers"),
        ({"norm_eps": 0.0}, "norm_eps=1e-05"),
        ({"qk_norm": "heads"}, "'head'"),
        ({"attention": "mla"}, "MLAConfig"),
        ({**LATENT, "qk_norm": "head"}, "'none'"),
        ({**LATENT, "sinks": True}, "sinks=False"),
        ({"rope_scaling": {"rope_type": "yarm"}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
        ({"window_layers": (0, 2)}, "window_layers"),
        ({"rope_layers": (1, 1)}, "rope_layers='all'"),
        ({**LATENT, "rope_layers": (1,)}, "rope_layers='all'"),
        ({"norm_place": "afters"}, "'after'"),
        ({"moe": dataclasses.replace(ROUTED, layers=(7,))}, "moe.layers"),
    ],
)
def test_impossible_configurations_are_refused(fields: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        dataclasses.replace(TINY, **fields)


def test_impossible_routing_is_refused() -> None:
    for fields, match in (
        ({"top_k": 9}, "top_k=5"),
        ({"router": "topk"}, "'TopK'"),
        ({"shared_gate": True}, "shared_hidden"),
        ({"hidden": 0}, "hidden"),
    ):
        with pytest.raises(UsageError, match=match):
            dataclasses.replace(ROUTED, **fields)
    with pytest.raises(UsageError, match=r"help.turnout\.decide"):
        LM(dataclasses.replace(TINY, moe=dataclasses.replace(ROUTED, router_options={"renormalise": True})))


@every_variant
def test_configurations_go_to_json_and_back(name: str) -> None:
    config = make(name).config
    assert LMConfig.from_json_dict(config.to_json_dict()) == config
