"""Writing experts out."""

import torch
from small import ids, make, sparse

from turnout.models.checkpoint import from_hf, to_hf
from turnout.reshape import compress_experts, densify, merge_experts

TEXT = [ids(seed=3)]


@torch.no_grad()
def test_merged_experts_are_copied_to_their_members(tmp_path) -> None:
    lm = sparse()
    merged, report = merge_experts(lm, keep=2, batches=TEXT)
    dense, written = densify(merged, batches=TEXT)
    assert written["params_after"] == report["params_before"]
    torch.testing.assert_close(dense(TEXT[0]).logits_BSV, merged(TEXT[0]).logits_BSV, rtol=1e-4, atol=1e-5)
    leader_E = report["leader"]["1"]
    bank = dense.blocks[1].ff.bank
    for expert, leader in enumerate(leader_E):
        assert torch.equal(bank.up[expert], bank.up[leader])
    to_hf(dense, tmp_path / "hf")
    assert torch.equal(from_hf(tmp_path / "hf")(TEXT[0]).logits_BSV, dense(TEXT[0]).logits_BSV)


@torch.no_grad()
def test_rows_and_factors_are_added_up() -> None:
    lm = sparse()
    new = compress_experts(lm, rank=12, rows=0.5, batches=TEXT)[0]
    dense, report = densify(new, batches=TEXT)
    torch.testing.assert_close(dense.blocks[0].ff.bank.up, lm.blocks[0].ff.bank.up, rtol=1e-4, atol=1e-5)
    assert report["params_after"] == sum(p.numel() for p in lm.parameters()) and not report.notes


def test_what_is_whole_already_stays_and_says_so() -> None:
    for lm in (make(), sparse()):
        new, report = densify(lm)
        assert report.notes == ("nothing was factored, merged or in few bits",)
        assert torch.equal(new(TEXT[0]).logits_BSV, lm(TEXT[0]).logits_BSV)
