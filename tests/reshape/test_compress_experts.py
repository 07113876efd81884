"""Low rank plus rows: what is kept, what it costs, and that it goes out again."""

import itertools
import math

import pytest
import torch
from small import ids, make, sparse
from torch.nn import functional as F

from turnout.errors import UnknownNameError, UsageError
from turnout.models import LM, MoEConfig
from turnout.models.checkpoint import load, save, to_hf
from turnout.paths import FactoredBank
from turnout.reshape import compress_experts, densify, diversify, drop_experts, latent_experts, merge_experts
from turnout.reshape.to_smaller.compress_experts import planned

TEXT = [ids(seed=3), ids(seed=4)]


def bank(lm: LM, layer: int = 0) -> FactoredBank:
    found = lm.blocks[layer].ff.bank
    assert isinstance(found, FactoredBank)
    return found


def test_low_rank_alone_has_the_error_of_the_singular_values_left_out() -> None:
    lm = sparse()
    new, report = compress_experts(lm, rank=4, rows=0.0)
    whole = lm.blocks[1].ff.bank
    lost = size = 0.0
    for matrix in (*whole.up[:, :12].unbind(), *whole.up[:, 12:].unbind(), *whole.down.unbind()):
        value = torch.linalg.svdvals(matrix.detach().double())
        lost, size = lost + float(value[4:].square().sum()), size + float(value.square().sum())
    assert report["relative_error"]["1"]["both"] == pytest.approx(math.sqrt(lost / size), rel=1e-5)
    assert len(bank(new, 1).up_row) == len(bank(new, 1).down_row) == 0


def test_a_row_that_is_kept_is_exact_and_the_others_are_the_low_rank_part() -> None:
    lm = sparse()
    low = bank(compress_experts(lm, rank=3, rows=0.0)[0]).written_out()
    new = bank(compress_experts(lm, rank=3, rows=0.3, batches=TEXT)[0])
    up_EHD, low_EHD, was_EHD = (
        t.transpose(1, 2) for t in (new.written_out().up_EDH, low.up_EDH, lm.blocks[0].ff.bank.up_EDH)
    )
    kept_N = torch.zeros(6 * 24, dtype=torch.bool).index_fill(0, new.up_row, True)
    assert 0 < kept_N.sum() < 6 * 24
    torch.testing.assert_close(up_EHD.flatten(0, 1)[kept_N], was_EHD.flatten(0, 1)[kept_N])
    torch.testing.assert_close(up_EHD.flatten(0, 1)[~kept_N], low_EHD.flatten(0, 1)[~kept_N])


@pytest.mark.parametrize("rows", [0.0, 0.1, 0.5, 0.9])
def test_rows_use_up_their_share_of_all_layers_together(rows) -> None:
    new, report = compress_experts(sparse(), rank=0, rows=rows, by="magnitude")
    held = sum(p.numel() for layer in (0, 1) for p in (bank(new, layer).up_rest, bank(new, layer).down_rest))
    total = 2 * 6 * 3 * 12 * 16
    assert held <= rows * total < held + 16
    assert report["rows_kept"] == {str(n): [len(bank(new, n).up_row), len(bank(new, n).down_row)] for n in (0, 1)}
    for layer, row in itertools.product((0, 1), ("up_row", "down_row")):
        index_N = getattr(bank(new, layer), row)
        assert torch.equal(index_N, index_N.unique())


def test_sensitivity_is_the_products_of_weights_and_slopes_averaged_over_the_text() -> None:
    """Worked out again on a copy, plainly."""
    lm = sparse()
    score = {}
    for layer, name in itertools.product((0, 1), ("up", "down")):
        weight, total = getattr(lm.blocks[layer].ff.bank, name), 0
        for id_BS in TEXT:
            loss = F.cross_entropy(lm(id_BS).logits_BSV[:, :-1].flatten(0, 1), id_BS[:, 1:].flatten())
            total = total + (weight * torch.autograd.grad(loss, weight)[0]).abs().mean(2).detach()
        score[layer, name] = total.flatten()
    new = compress_experts(lm, rank=0, rows=0.25, batches=TEXT)[0]
    kept = {key: torch.zeros(len(s), dtype=torch.bool) for key, s in score.items()}
    for (layer, name), mask in kept.items():
        mask[getattr(bank(new, layer), f"{name}_row")] = True
    least = min(float(score[key][kept[key]].min()) for key in kept)
    # A longer row may no longer fit where a shorter one would.
    most = max(float(score[key][~kept[key]].max()) for key in kept)
    assert least >= most * (1 - 1e-4)


def test_experts_that_matter_more_keep_more_rows() -> None:
    lm = sparse(num_experts=4)
    with torch.no_grad():
        lm.blocks[0].ff.bank.down[:, :, :] *= 0.01
        lm.blocks[0].ff.bank.up[:, :, :] *= 0.01
    report = compress_experts(lm, rank=2, rows=0.3, by="magnitude")[1]
    assert report["rows_kept"]["0"] == [0, 0] and sum(report["rows_kept"]["1"]) > 0


def test_frozen_weights_are_scored_and_stay_frozen() -> None:
    lm = sparse()
    lm.requires_grad_(False)
    new = compress_experts(lm, rank=2, rows=0.2, batches=TEXT)[0]
    assert not any(p.requires_grad for p in lm.parameters()) and all(p.grad is None for p in lm.parameters())
    assert len(bank(new).up_row) > 0


@torch.no_grad()
def test_merged_then_compressed_it_runs_saves_loads_generates_and_trains(tmp_path) -> None:
    merged = merge_experts(sparse(), keep=3, batches=TEXT)[0]
    new, report = compress_experts(merged, rank=3, rows=0.1, batches=TEXT)
    assert report["params_after"] < report["params_before"] and report["flops_after"] < report["flops_before"]
    assert report["params_active_after"] < report["params_active_before"]
    save(tmp_path / "model", new)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    save(tmp_path / "before", merged)
    assert size < (tmp_path / "before" / "model.safetensors").stat().st_size
    again = load(tmp_path / "model")
    assert again.config == new.config
    assert torch.equal(again(TEXT[0]).logits_BSV, new(TEXT[0]).logits_BSV)
    assert again.generate(TEXT[0][:1, :4], tokens=3, temperature=0).shape == (1, 7)
    with torch.enable_grad():
        F.cross_entropy(new(TEXT[0]).logits_BSV.flatten(0, 1), TEXT[0].flatten()).backward()
    assert all(p.grad is not None for name, p in new.named_parameters() if "bank" in name and p.numel())


@torch.no_grad()
def test_the_export_says_what_keeps_it_out_and_densify_lets_it_out(tmp_path) -> None:
    merged = merge_experts(sparse(), keep=3, batches=TEXT)[0]
    new = compress_experts(merged, rank=3, rows=0.1, batches=TEXT)[0]
    with pytest.raises(UsageError, match=r"moe.factored is .*turnout.reshape.densify"):
        to_hf(new, tmp_path / "hf")
    with pytest.raises(UsageError, match=r"moe.distinct is .*turnout.reshape.densify"):
        to_hf(merged, tmp_path / "hf")
    dense, report = densify(new, batches=TEXT)
    assert report["relative_difference"] < 1e-5
    assert dense.config.moe.factored is None and dense.config.moe.distinct is None
    assert to_hf(dense, tmp_path / "hf") == "MixtralForCausalLM"


@pytest.mark.parametrize("activation, bias", [("gelu", True), ("swiglu", True)])
@torch.no_grad()
def test_biases_and_plain_activations(activation, bias) -> None:
    lm = make(moe=MoEConfig(4, 2, 12, activation=activation, bias=bias))
    new = compress_experts(lm, rank=12, rows=0.0)[0]
    torch.testing.assert_close(new(TEXT[0]).logits_BSV, lm(TEXT[0]).logits_BSV, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(densify(new)[0](TEXT[0]).logits_BSV, lm(TEXT[0]).logits_BSV, rtol=1e-3, atol=1e-4)


def test_planned_is_near_what_comes() -> None:
    lm = sparse()
    assert planned(lm.config, rank=2, rows=1.0) == lm.config
    config, new = planned(lm.config, rank=2, rows=0.1), compress_experts(lm, rank=2, rows=0.1, by="random")[0]
    theirs, ours = LM(config).cost().params, new.cost().params
    assert abs(theirs / ours - 1) < 0.02


def test_factored_experts_are_refused_where_whole_ones_are_needed() -> None:
    new = compress_experts(sparse(), rank=2, by="magnitude")[0]
    for call in (
        lambda: merge_experts(new, keep=2, batches=TEXT),
        lambda: drop_experts(new, keep=3, batches=TEXT),
        lambda: diversify(new, masked=0.1),
        lambda: compress_experts(new, rank=2),
        lambda: latent_experts(new, rank=2),
    ):
        with pytest.raises(UsageError, match="factored"):
            call()


def test_user_mistakes() -> None:
    with pytest.raises(UsageError, match="be from 0 to 12"):
        compress_experts(sparse(), rank=13)
    with pytest.raises(UsageError, match="rows must be a share"):
        compress_experts(sparse(), rank=2, rows=1.5)
    with pytest.raises(UsageError, match="batches must be given: the loss is differentiated on it"):
        compress_experts(sparse(), rank=2)
    with pytest.raises(UnknownNameError, match="sensitivity"):
        compress_experts(sparse(), rank=2, by="sensitiviti")
    with pytest.raises(UsageError, match="a dense one"):
        compress_experts(make(), rank=2)
    assert "no smaller" in compress_experts(sparse(), rank=12, rows=0.0)[1].notes[0]
