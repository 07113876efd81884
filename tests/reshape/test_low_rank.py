"""Adapters of low rank on our model: nothing at first, folded exactly, written as PEFT has them, never lost."""

import pytest
import torch
from small import make, sparse

from turnout import reshape
from turnout.errors import UsageError
from turnout.models import LM, LMConfig, checkpoint
from turnout.paths import LowRank

CONFIG = LMConfig(vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, hidden=24, init_std=0.2, qkv_bias=True)
ID_BS = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(3))


def moved(lm: LM) -> LM:
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(1)
    for one in lm.modules():
        if isinstance(one, LowRank):
            torch.nn.init.normal_(one.up, std=0.3, generator=generator)
    return lm


@torch.no_grad()
def logits(lm: LM) -> torch.Tensor:
    return lm.eval()(ID_BS).logits_BSV


def test_nothing_is_added_at_first_and_all_of_it_is_folded():
    lm = LM(CONFIG)
    before = logits(lm)
    lm, report = reshape.add_low_rank(lm, rank=3, alpha=6)
    assert torch.equal(logits(lm), before)
    assert report["params_added"] == sum(p.numel() for name, p in lm.named_parameters() if "added" in name)
    with_them = logits(moved(lm))
    assert (with_them - before).abs().max() > 0.1
    lm, folded = reshape.fold_low_rank(lm)
    assert folded["modules"] == report["modules"]
    assert torch.allclose(logits(lm), with_them, atol=1e-5)
    assert not any("added" in name for name, _ in lm.named_parameters())


def test_what_is_written_is_what_is_added():
    lm = moved(reshape.add_low_rank(LM(CONFIG), rank=3, alpha=5)[0])
    before = {name: tensor.clone() for name, tensor in LM(CONFIG).state_dict().items()}
    factor = reshape.low_rank_adapter(lm, "a").factor
    a, b, scale = factor["model.layers.1.self_attn.k_proj"]
    assert (a.shape, b.shape, scale) == ((3, 16), (8, 3), 5 / 3)
    reshape.fold_low_rank(lm)
    change = lm.state_dict()["blocks.1.attention.qkv.weight"] - before["blocks.1.attention.qkv.weight"]
    assert torch.allclose(change[16:24], scale * b @ a, atol=1e-5)
    assert {name.rpartition(".")[2] for name in factor} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


def test_beside_experts_attention_alone_has_adapters():
    _, report = reshape.add_low_rank(sparse(), rank=2)
    assert report["modules"] and all(".attention." in name for name in report["modules"])


def test_they_are_never_lost(tmp_path):
    lm, _ = reshape.add_low_rank(make(), rank=2)
    for lose in (
        lambda: checkpoint.save(tmp_path / "own", lm),
        lambda: checkpoint.to_hf(lm, tmp_path / "hf"),
        lambda: reshape.upcycle(lm, num_experts=4, top_k=2),
    ):
        with pytest.raises(UsageError, match=r"call turnout\.reshape\.fold_low_rank"):
            lose()
    assert not list(tmp_path.iterdir())


def test_mistakes_are_worded():
    lm, _ = reshape.add_low_rank(make(), rank=2)
    with pytest.raises(UsageError, match="adapters already"):
        reshape.add_low_rank(lm, rank=2)
    with pytest.raises(UsageError, match="no adapters"):
        reshape.low_rank_adapter(LM(CONFIG), "a")
    with pytest.raises(UsageError, match="rank"):
        reshape.add_low_rank(make(), rank=0)
