import pytest
import torch

from turnout.decide.token import ExpertChoice, Hash, LossFree, TopK
from turnout.errors import ShapeError, UsageError
from turnout.train.balance import load_balance_loss, router_z_loss
from turnout.types import Routing

WIDTH = 12


def routed(index_T: list[int], score_TE: torch.Tensor) -> Routing:
    index_TK = torch.tensor(index_T)[:, None]
    return Routing.from_topk(index_TK, score_TE.gather(1, index_TK), num_experts=score_TE.shape[1], score_TE=score_TE)


def test_one_when_even():
    assert load_balance_loss(routed([0, 1, 2, 3], torch.full((4, 4), 0.25))).item() == 1.0
    assert load_balance_loss(routed([0, 1, 2, 3], torch.eye(4))).item() == 1.0


def test_the_number_of_experts_when_collapsed():
    score_TE = torch.zeros(6, 4)
    score_TE[:, 2] = 1.0
    assert load_balance_loss(routed([2] * 6, score_TE)).item() == 4.0


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula(top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    router = TopK(WIDTH, 5, top_k=top_k, std=0.5, generator=generator)
    routing = router(torch.randn(30, WIDTH, generator=generator))
    chosen = (routing.dense() != 0).double()
    f_E = chosen.sum(0) / (30 * top_k)
    p_E = routing.score_TE.detach().double().mean(0)
    assert load_balance_loss(routing).item() == pytest.approx(5 * float((f_E * p_E).sum()), rel=1e-6)


def test_two_layers_with_different_dead_halves_are_not_even():
    """Pooled over layers, counts and scores look even; the loss per layer must not."""
    half = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).repeat(4, 1)
    layers = [routed([0, 1, 0, 1], half), routed([2, 3, 2, 3], half.flip(1))]
    assert torch.stack([load_balance_loss(layer) for layer in layers]).mean().item() == 2.0


def test_the_gradient_pushes_tokens_off_the_crowded_expert():
    logit_TE = torch.tensor([[2.0, 0.0, 0.0]]).repeat(5, 1).requires_grad_()
    routing = routed([0] * 5, logit_TE.softmax(1))
    load_balance_loss(routing).backward()
    assert (logit_TE.grad[:, 0] > 0).all() and (logit_TE.grad[:, 1:] < 0).all()


def test_descending_the_loss_balances_a_router():
    generator = torch.Generator().manual_seed(0)
    router = TopK(WIDTH, 4, top_k=1, std=0.5, generator=generator)
    x_TD = torch.randn(256, WIDTH, generator=generator) + 1
    before = load_balance_loss(router(x_TD)).item()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        load_balance_loss(router(x_TD)).backward()
        optimizer.step()
    assert load_balance_loss(router(x_TD)).item() < 1.05 < before


def test_sigmoid_scores_cannot_cheat_by_all_going_down():
    generator = torch.Generator().manual_seed(0)
    router = LossFree(WIDTH, 4, top_k=2, std=0.5, generator=generator)
    routing = router(torch.randn(40, WIDTH, generator=generator))
    loss = load_balance_loss(routing).item()
    for scale in (1e-3, 1e-12, 1e-25):
        shrunk = Routing.from_dense(routing.dense().detach())
        shrunk = Routing(**{**shrunk.__dict__, "score_TE": routing.score_TE.detach() * scale})
        assert load_balance_loss(shrunk).item() == pytest.approx(loss, rel=1e-4), scale
    assert torch.isfinite(load_balance_loss(routed([0, 0], torch.zeros(2, 4))))


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_padding_does_not_count(capacity_factor, seed):
    """The masked loss of a padded batch is the loss of the batch without its padding, also under capacity."""
    generator = torch.Generator().manual_seed(seed)
    router = TopK(WIDTH, 5, top_k=2, std=0.5, generator=generator, capacity_factor=capacity_factor)
    x_TD = torch.randn(40, WIDTH, generator=generator)
    mask_T = torch.rand(40, generator=generator) < 0.6
    padded, alone = router(x_TD), router(x_TD[mask_T])
    for loss in (load_balance_loss, router_z_loss):
        torch.testing.assert_close(loss(padded, mask_T=mask_T), loss(alone), msg=f"{loss.__name__}, seed {seed}")
        assert loss(padded).item() != pytest.approx(loss(alone).item(), rel=1e-4)
        torch.testing.assert_close(loss(padded, mask_T=torch.ones(40, dtype=torch.bool)), loss(padded))


def test_padding_gets_no_gradient():
    logit_TE = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing = Routing.from_topk(
        torch.tensor([[0], [0], [1], [2]]),
        torch.ones(4, 1),
        num_experts=3,
        score_TE=logit_TE.softmax(1),
        logit_TE=logit_TE,
    )
    mask_T = torch.tensor([True, True, False, False])
    (load_balance_loss(routing, mask_T=mask_T) + router_z_loss(routing, mask_T=mask_T)).backward()
    assert (logit_TE.grad[:2] != 0).all() and (logit_TE.grad[2:] == 0).all()


def test_capacity_does_not_hide_the_imbalance():
    score_TE = torch.zeros(8, 4)
    score_TE[:, 1] = 1.0
    routing = routed([1] * 8, score_TE).truncate(2)
    assert load_balance_loss(routing).item() == 4.0
    assert load_balance_loss(routing, mask_T=torch.ones(8, dtype=torch.bool)).item() == 4.0


def test_a_mask_for_a_truncated_routing_from_disk_is_refused(tmp_path):
    routing = routed([1] * 8, torch.full((8, 4), 0.25)).truncate(2)
    routing.save(tmp_path / "r.safetensors")
    loaded = Routing.load(tmp_path / "r.safetensors")
    assert torch.equal(load_balance_loss(loaded), load_balance_loss(routing))
    with pytest.raises(UsageError, match="truncated"):
        load_balance_loss(loaded, mask_T=torch.ones(8, dtype=torch.bool))


def test_z_loss_equals_the_formula():
    logit_TE = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    routing = Routing.from_topk(torch.zeros(30, 1).long(), torch.ones(30, 1), num_experts=6, logit_TE=logit_TE)
    explicit = sum(float(torch.log(torch.exp(row).sum())) ** 2 for row in logit_TE) / 30
    assert router_z_loss(routing).item() == pytest.approx(explicit, rel=1e-12)
    large = Routing.from_topk(
        torch.zeros(1, 1).long(), torch.ones(1, 1), num_experts=2, logit_TE=torch.full((1, 2), 1e4)
    )
    assert router_z_loss(large).item() == pytest.approx(1e8, rel=1e-3)


def test_z_loss_equals_transformers_switch():
    peer = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    routing = TopK(WIDTH, 6, std=0.5)(torch.randn(30, WIDTH))
    torch.testing.assert_close(router_z_loss(routing), peer.router_z_loss_func(routing.logit_TE[None]))


def test_load_balance_loss_equals_transformers_switch():
    peer = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    routing = TopK(WIDTH, 6, top_k=1, std=0.5)(torch.randn(30, WIDTH))
    order_R, _ = routing.by_token
    theirs = peer.load_balancing_loss_func(routing.score_TE[None], routing.expert_R[order_R][None, :, None])
    torch.testing.assert_close(load_balance_loss(routing), theirs)


def test_expert_choice_is_always_even():
    routing = ExpertChoice(WIDTH, 4, std=2.0)(torch.randn(40, WIDTH))
    assert load_balance_loss(routing).item() == pytest.approx(1.0, abs=1e-6)


def test_no_tokens_is_no_loss():
    for mask_T in (None, torch.zeros(0, dtype=torch.bool)):
        routing = TopK(WIDTH, 4)(torch.zeros(0, WIDTH))
        assert load_balance_loss(routing, mask_T=mask_T).item() == router_z_loss(routing, mask_T=mask_T).item() == 0.0
    routing = TopK(WIDTH, 4)(torch.randn(5, WIDTH))
    nobody = torch.zeros(5, dtype=torch.bool)
    assert load_balance_loss(routing, mask_T=nobody).item() == router_z_loss(routing, mask_T=nobody).item() == 0.0


def test_a_routing_without_scores_is_refused():
    routing = Hash(WIDTH, 4)(torch.zeros(3, WIDTH), token_id_T=torch.arange(3))
    for loss in (load_balance_loss, router_z_loss):
        with pytest.raises(UsageError, match="weight to 0"):
            loss(routing)


@pytest.mark.parametrize("mask", [torch.ones(4, dtype=torch.bool), torch.ones(3), torch.ones(3, 1, dtype=torch.bool)])
def test_a_mask_that_does_not_fit_is_refused(mask):
    routing = TopK(WIDTH, 4)(torch.randn(3, WIDTH))
    for loss in (load_balance_loss, router_z_loss):
        with pytest.raises(ShapeError, match="mask_T"):
            loss(routing, mask_T=mask)
