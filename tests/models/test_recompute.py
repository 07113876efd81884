"""A block that is run again for its backward pass gives the same numbers, and keeps less."""

import torch

from turnout.models import LM, LMConfig, MoEConfig
from turnout.types import Routing


def network(router: str = "TopK", **options: object) -> LM:
    moe = MoEConfig(num_experts=4, top_k=2, hidden=16, router=router, router_options=options)
    return LM(LMConfig(vocab_size=32, width=16, layers=3, heads=2, hidden=32, max_seq=16, moe=moe), seed=0).train()


def step(lm: LM) -> tuple[list[torch.Tensor], int, list[Routing]]:
    """Every gradient, the numbers kept for the backward pass, and the routings."""
    kept = {}

    def look(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    ids = torch.arange(32).view(2, 16)
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        done = lm.loss(ids, ids.roll(-1, 1))
        alive = sum(kept.values())
    balance = sum((r.score_TE.mean(0) ** 2).sum() for r in done.routings if r.score_TE is not None)
    (done.nats + balance).backward()
    return [p.grad for p in lm.parameters() if p.grad is not None], alive, list(done.routings)


def test_gradients_are_the_same_to_the_bit_also_those_of_balance():
    plain, again = network(), network()
    for block in again.blocks:
        block.recompute = True
    (want, whole, routed), (got, little, routed_again) = step(plain), step(again)
    assert len(want) == len(got) > 10 and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert little < whole / 2
    assert [r.load_E.tolist() for r in routed] == [r.load_E.tolist() for r in routed_again]


def test_without_gradients_nothing_is_run_again():
    lm = network()
    for block in lm.blocks:
        block.recompute = True
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        assert torch.equal(lm(ids).logits_BSV, network()(ids).logits_BSV)


def test_a_router_that_draws_draws_the_same_again():
    """To the bit, and the generator stands where it stood without."""
    grads, drawn = [], []
    for recompute in (False, True):
        lm, generator = network("NoisyTopK"), torch.Generator().manual_seed(3)
        for block in lm.blocks:
            block.recompute = recompute
        lm.loss(torch.arange(32).view(2, 16), torch.arange(32).view(2, 16), generator=generator).nats.backward()
        grads.append([p.grad for p in lm.parameters() if p.grad is not None])
        drawn.append(torch.rand(1, generator=generator).item())
    assert len(grads[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert drawn[0] == drawn[1]
