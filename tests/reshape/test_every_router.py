"""Every router in every reshape: done, and then it is a model that is written and read; or refused by a clear error."""

import pytest
import torch
from every_router import IDS, NAMES, network, told

from turnout.errors import TurnoutError
from turnout.models import checkpoint
from turnout.reshape import quantize
from turnout.reshape.many_to_one import average
from turnout.reshape.to_smaller import compress_experts, densify, drop_experts, latent_experts, merge_experts
from turnout.reshape.to_sparse import diversify

TEXT = [IDS]
RESHAPES = {
    "drop": lambda lm: drop_experts(lm, batches=TEXT, keep=2),
    "compress": lambda lm: compress_experts(lm, rank=2, batches=TEXT),
    "densify": lambda lm: densify(lm, batches=TEXT),
    "latent": lambda lm: latent_experts(lm, rank=2, batches=TEXT),
    "merge": lambda lm: merge_experts(lm, keep=2, batches=TEXT),
    "quantize": lambda lm: quantize(lm, bits=8, group=8, batches=TEXT),
    "average": lambda lm: average([lm, lm]),
    "diversify": lambda lm: diversify(lm, batches=TEXT),
}
NOT_DROPPED = {
    *("ByKind", "CIGT", "Hash", "HyperRouter", "MoEPlusPlus", "Prototyping", "RMoE", "Rectify", "Skills"),
    *("StableMoE", "XMoE"),
}


@pytest.mark.parametrize("name", NAMES)
def test_done_or_refused(name, tmp_path):
    lm, done = network(name).eval(), set()
    with told(name), torch.no_grad():
        for what, reshape in RESHAPES.items():
            try:
                new = reshape(lm)
            except TurnoutError as refused:
                assert "Nearest" in str(refused), (what, refused)
                continue
            done.add(what)
            new = (new[0] if isinstance(new, tuple) else new).eval()
            checkpoint.save(tmp_path / what, new)
            again = checkpoint.load(tmp_path / what).eval()
            assert torch.equal(again(IDS).logits_BSV, new(IDS).logits_BSV), what
    assert ("drop" in done) == (name not in NOT_DROPPED)
    assert {"densify", "average"} <= done, "what changes no expert takes any router"
