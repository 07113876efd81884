"""Fisher merging: information against closed forms and finite sums, and the minimiser that it must find."""

import math

import pytest
import torch
from small import ids, make, sparse
from torch import nn

from turnout.errors import DataError, ShapeError, UnknownNameError, UsageError
from turnout.reshape import average, fisher, fisher_information


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def mlp(seed: int = 0, labels: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, labels)).double()


def split(vector: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """The vector in the shapes of the model's parameters."""
    parts = vector.split([p.numel() for p in model.parameters()])
    return {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}


def inputs(count: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_information_of_a_softmax_layer_is_its_closed_form() -> None:
    # log p_y = z_y - logsumexp z: E (d log p / d W_kd)^2 = p_k (1 - p_k) x_d^2.
    torch.manual_seed(0)
    model, x_ND = nn.Linear(5, 4).double(), inputs()
    p_NV = model(x_ND).softmax(1).detach()
    variance_NV = p_NV * (1 - p_NV)
    found = fisher_information(model, x_ND.split(2))
    torch.testing.assert_close(found["weight"], torch.einsum("nv,nd->vd", variance_NV, x_ND.square()) / 6)
    torch.testing.assert_close(found["bias"], variance_NV.mean(0))


def test_information_of_a_network_is_the_variance_of_its_jacobian() -> None:
    model, x_ND = mlp(), inputs()
    found = fisher_information(model, [x_ND])
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x_D in x_ND:  # Var_y of d z_y / d theta, from the logits' Jacobian: no log-probability is taken
        p_V = model(x_D).softmax(0).detach()
        jacobian = torch.func.jacrev(lambda p, x=x_D: torch.func.functional_call(model, p, x))(dict(want_of(model)))
        for name, j_V in jacobian.items():
            weight_V = p_V.view(-1, *[1] * (j_V.ndim - 1))
            want[name] += (weight_V * (j_V - (weight_V * j_V).sum(0)).square()).sum(0) / len(x_ND)
    for name, value in found.items():
        torch.testing.assert_close(value, want[name])


def want_of(model: nn.Module):
    return ((name, p.detach()) for name, p in model.named_parameters())


def test_batches_are_only_a_way_to_pass_examples() -> None:
    model, x_ND = mlp(), inputs()
    whole = fisher_information(model, [x_ND])
    for other in (x_ND, x_ND.split(1), [(x_ND,)], [{"input": x_ND}]):
        found = fisher_information(model, other)
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_draws_come_near_all_labels_and_repeat_under_a_seed() -> None:
    model, x_ND = mlp(), inputs(3)
    exact = fisher_information(model, [x_ND])
    drawn = fisher_information(model, [x_ND], samples=2000, seed=3)
    again = fisher_information(model, [x_ND], samples=20, seed=3)
    assert all(torch.equal(v, again[n]) for n, v in fisher_information(model, [x_ND], samples=20, seed=3).items())
    for name, value in exact.items():
        assert float((drawn[name] - value).norm() / value.norm()) < 0.1, name


def test_a_language_model_counts_every_position_and_the_model_stays_as_it_was() -> None:
    lm = make().train()
    lm.embedding.requires_grad_(False)
    before, id_BS = flat(lm), ids(2, 3)
    found = fisher_information(lm, [id_BS])
    assert torch.equal(flat(lm), before) and lm.training and all(p.grad is None for p in lm.parameters())
    assert (found["embedding"] == 0).all()
    lm.eval()
    name, want = "norm.weight", torch.zeros(16, dtype=torch.float64)
    parameter = dict(lm.named_parameters())[name]
    for row in id_BS:
        for s in range(3):
            log_V = lm(row[None]).logits_BSV[0, s].double().log_softmax(0)
            for v in range(len(log_V)):
                (slope,) = torch.autograd.grad(log_V[v], parameter, retain_graph=True)
                want += log_V[v].exp().detach() * slope.double().square() / 6
    torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-9)


def test_experts_that_no_token_takes_have_no_information() -> None:
    lm, id_BS = sparse(num_experts=6, top_k=1), ids(1, 2)
    found = fisher_information(lm, [id_BS], samples=3)
    for layer, routing in enumerate(lm(id_BS).routings):
        up = found[f"blocks.{layer}.ff.bank.up"]
        assert [bool(part.any()) for part in up] == [load > 0 for load in routing.load_E.tolist()]


def test_scores_come_from_where_they_are_said_to() -> None:
    model, x_ND = mlp(), inputs()
    twice = fisher_information(model, [x_ND], logits=lambda m, x: m(2 * x))
    assert all(torch.equal(v, twice[n]) for n, v in fisher_information(model, [2 * x_ND]).items())


def test_quadratic_losses_with_a_diagonal_hessian_give_the_joint_minimiser() -> None:
    # L_i = 1/2 sum_d h_id (theta_d - theta_id)^2: the merge is where the gradient of sum lambda_i L_i is zero.
    models = [mlp(seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(5)
    steep = [torch.rand(len(flat(m)), dtype=torch.float64, generator=generator) + 0.01 for m in models]
    weights = [0.2, 1.0, 3.0]
    new, _ = fisher(models, [split(h, m) for h, m in zip(steep, models, strict=True)], weights=weights, floor=0.0)
    parts = zip(weights, steep, models, strict=True)
    slope = sum(w * h * (flat(new) - flat(m)) for w, h, m in parts)
    assert float(slope.abs().max()) < 1e-12
    mean = flat(average(models, weights=weights)[0])
    parts = zip(weights, steep, models, strict=True)
    assert float(sum(w * h * (mean - flat(m)) for w, h, m in parts).abs().max()) > 0.01


def test_equal_information_is_the_weighted_average() -> None:
    models = [make(seed) for seed in range(3)]
    same = split(torch.rand(len(flat(models[0])), generator=torch.Generator().manual_seed(2)) + 0.1, models[0])
    for weights in (None, [1, 0, 4]):
        for normalize in (False, True):
            new, report = fisher(models, [same] * 3, weights=weights, normalize=normalize)
            torch.testing.assert_close(flat(new), flat(average(models, weights=weights)[0]), rtol=1e-6, atol=1e-8)
    assert report["coefficient_shares"] == pytest.approx([0.2, 0.0, 0.8])


def test_one_model_is_itself_to_the_bit_whatever_its_information() -> None:
    lm = make()
    information = split(torch.rand(len(flat(lm)), generator=torch.Generator().manual_seed(2)), lm)
    assert torch.equal(flat(fisher([lm, lm], [information, information])[0]), flat(lm))
    assert torch.equal(flat(fisher([lm], [information])[0]), flat(lm))


def pair(a: list[float], b: list[float], **options):
    """Two layers of zeros and ones, merged: the weights are the second one's coefficients."""
    models = nn.Linear(len(a), 1, bias=False), nn.Linear(len(a), 1, bias=False)
    nn.init.zeros_(models[0].weight), nn.init.ones_(models[1].weight)
    new, report = fisher(models, [{"weight": torch.tensor([a])}, {"weight": torch.tensor([b])}], **options)
    return new.weight[0].tolist(), report


def test_the_floor_by_hand() -> None:
    # Means 2 and 1; a floor of 0.1 is 0.2 for the first model and 0.1 for the second.
    got, report = pair([4.0, 0.0], [1.0, 1.0], floor=0.1)
    assert got == pytest.approx([1 / 5, 1 / 1.2])
    assert report["floored_share"] == [0.5, 0.0] and report["mean_information"] == [2.0, 1.0]
    assert pair([4.0, 0.0], [2.0, 0.0], floor=0.1)[0] == pytest.approx([1 / 3, 0.1 / 0.3])
    assert pair([4.0, 0.0], [2.0, 0.0], floor=0.0)[0] == pytest.approx([1 / 3, 0.5])
    assert pair([4.0, 0.0], [2.0, 0.0], floor=0.0, weights=[3, 1])[0] == pytest.approx([1 / 7, 0.25])


def test_normalisation_takes_the_steepness_out() -> None:
    assert pair([3.0, 4.0], [30.0, 40.0], normalize=True)[0] == pytest.approx([0.5, 0.5])
    assert pair([3.0, 4.0], [30.0, 40.0])[0] == pytest.approx([10 / 11, 10 / 11])


def test_a_model_without_information_is_told() -> None:
    got, report = pair([0.0, 0.0], [1.0, 2.0])
    assert got == [1.0, 1.0] and report.notes == ("model 0 has no information at all",)


def test_information_that_does_not_fit_is_refused() -> None:
    a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    good = {"weight": torch.ones(1, 2)}
    for wrong, error in (
        ([good], UsageError),
        (good, UsageError),
        ([good, {"wieght": torch.ones(1, 2)}], UnknownNameError),
        ([good, {"weight": torch.ones(2, 1)}], ShapeError),
        ([good, {"weight": -torch.ones(1, 2)}], UsageError),
        ([good, {"weight": torch.full((1, 2), math.nan)}], UsageError),
    ):
        with pytest.raises(error):
            fisher([a, b], wrong)
    with pytest.raises(UsageError, match="floor"):
        fisher([a, b], [good, good], floor=-1.0)


def test_what_gives_no_information_is_refused() -> None:
    with pytest.raises(DataError, match="no example"):
        fisher_information(mlp(), [])
    with pytest.raises(UsageError, match="samples"):
        fisher_information(mlp(), [inputs()], samples=0)
    with pytest.raises(UsageError, match="pass samples=4"):
        fisher_information(nn.Linear(5, 5000), [inputs().float()])
    with pytest.raises(UsageError, match="a batch"):
        fisher_information(mlp(), ["text"])
    with pytest.raises(ShapeError, match=r"one size B.*\[6, 2\]"):
        fisher_information(mlp(), [(inputs(), inputs(2))])
    with pytest.raises(UsageError, match="logits"):
        fisher_information(nn.LSTM(5, 3).double(), [inputs()])
