"""What is special about sort: what it keeps, how it groups experts, and where its gradients lie."""

import itertools

import pytest
import torch

from turnout.paths import Bank, FeedForward
from turnout.run import sort
from turnout.run.plan import _batches, _neighbours, _rounded
from turnout.types import ExpertWeights, Routing
from turnout.types.tuning import Tuning

USUAL = Tuning("any processor", "2", 1)


def case(tokens=64, width=16, experts=8, k=2, hidden=8, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight_TK, index_TK = torch.rand(tokens, experts, generator=g).topk(k)
    bank = Bank(experts, width, hidden, std=0.3, generator=g).to(dtype)
    x = torch.randn(tokens, width, generator=g).to(dtype).requires_grad_()
    return x, Routing.from_topk(index_TK, weight_TK.requires_grad_(), num_experts=experts), bank


def kept_bytes(run, known):
    """Bytes of everything saved for the backward pass that is not among ``known``."""
    seen, known = {}, {t.untyped_storage().data_ptr() for t in known}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    assert kept is not None
    return sum(seen.values())


@pytest.mark.parametrize("experts, hidden", [(8, 64), (64, 64)])
def test_keeps_about_half_of_what_the_dense_layer_keeps(experts, hidden):
    tokens, width, k = 256, 64, 4
    x, routing, bank = case(tokens, width, experts, k, hidden)
    sparse = kept_bytes(lambda: bank(x, routing, backend="sort"), [x, routing.weight_R, *bank.parameters()])
    dense_layer = FeedForward(width, k * hidden)
    dense = kept_bytes(lambda: dense_layer(x), [x, *dense_layer.parameters()])
    assert sparse == 2 * tokens * k * hidden * 4, "the up product and nothing else"
    assert sparse <= 0.55 * dense


def test_rows_that_round_up_a_count_are_not_kept():
    tokens, width, k, hidden = 256, 64, 4, 64
    x, routing, bank = case(tokens, width, 64, k, hidden, dtype=torch.bfloat16)
    sparse = kept_bytes(lambda: bank(x, routing, backend="sort"), [x, routing.weight_R, *bank.parameters()])
    assert sparse == 2 * tokens * k * hidden * 2
    leaves = [x, bank.up, bank.down, routing.weight_R]
    got, expected = (
        torch.autograd.grad(bank(x, routing, backend=name).float().square().sum(), leaves)
        for name in ("sort", "reference")
    )
    for a, b in zip(got, expected, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 3e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_taken_without_a_copy(dtype):
    """Autograd keeps the very tensor that the backward pass filled in when its layout is the parameter's."""
    x, routing, bank = case(dtype=dtype)
    made = []
    bank.up.register_hook(lambda grad: made.append(grad.data_ptr()))
    sort(x, routing, bank.weights()).sum().backward()
    assert bank.up.grad.data_ptr() == made[0]
    assert bank.up.grad.stride() == bank.up.stride() and bank.down.grad.stride() == bank.down.stride()


def test_weights_of_experts_without_tokens_are_not_read():
    x, routing, bank = case(tokens=3, experts=16)
    idle = routing.load_E == 0
    with torch.no_grad():
        bank.up[idle] = torch.nan
        bank.down[idle] = torch.nan
        assert idle.any() and torch.isfinite(sort(x, routing, bank.weights())).all()


def test_a_gradient_that_is_not_finite_stays_with_the_experts_of_its_token():
    """Rows that only round up the count must not carry it to others."""
    x, routing, bank = case(tokens=120, experts=8, k=1, dtype=torch.bfloat16)
    upstream = torch.ones(120, 16, dtype=torch.bfloat16)
    upstream[0] = torch.inf
    sort(x, routing, bank.weights()).backward(upstream)
    bad = ~torch.isfinite(bank.down.grad.float()).flatten(1).all(1)
    assert bad.sum() == 1 and bad[routing.expert_R[routing.token_R == 0]].all()


def test_second_backward_gives_the_same():
    x, routing, bank = case()
    y = sort(x, routing, bank.weights()).square().sum()
    first = torch.autograd.grad(y, [x, bank.up], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, [x, bank.up]), strict=True):
        assert torch.equal(a, b)


def test_accumulates_over_steps():
    x, routing, bank = case()
    routing = routing.detach()
    for _ in range(2):
        sort(x, routing, bank.weights()).sum().backward()
    twice = bank.up.grad.clone()
    bank.zero_grad()
    sort(x, routing, bank.weights()).sum().backward()
    torch.testing.assert_close(twice, 2 * bank.up.grad)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_reference_where_products_and_memory_are_large(dtype):
    """Large enough for huge pages, for the other fp32 kernel, and for batched products."""
    x, routing, bank = case(tokens=2100, width=256, experts=12, k=3, hidden=192, dtype=dtype)
    leaves = [x, bank.up, bank.down, routing.weight_R]
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    got, expected = (
        [y.detach(), *torch.autograd.grad(y, leaves, upstream)]
        for y in (bank(x, routing, backend=name) for name in ("sort", "reference"))
    )
    for a, b in zip(got, expected, strict=True):
        off = float((a.double() - b.double()).norm() / b.double().norm())
        assert off < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("seed", range(20))
def test_groups_hold_every_row_once(seed):
    g = torch.Generator().manual_seed(seed)
    load = (torch.rand(30, generator=g) * 200 * (torch.rand(30, generator=g) < 0.7)).long().tolist()
    load = [_rounded(count, sum(load) / len(load), True, USUAL) for count in load]
    for groups in (_neighbours(load, 256), _batches(load, 4096, 256, 3_000_000), _batches(load, 1, 10**9, 3_000_000)):
        experts = [expert for group in groups for expert in group.experts]
        assert experts == [expert for expert, count in enumerate(load) if count]
        assert [group.bound[0] for group in groups[1:]] == [group.bound[-1] for group in groups[:-1]]
        for group in groups:
            sizes = [b - a for a, b in itertools.pairwise(group.bound)]
            assert all(size >= load[expert] for size, expert in zip(sizes, group.experts, strict=True))
            if group.batched:
                assert len(set(sizes)) == 1 and group.experts == [*range(group.experts[0], group.experts[-1] + 1)]


@pytest.mark.parametrize("mean", [1.0, 37.5, 512.0, 1000.0, 5000.0])
@pytest.mark.parametrize("short", [False, True])
def test_counts_are_rounded_to_few_values(short, mean):
    assert _rounded(0, mean, short, USUAL) == 0 and 8 <= _rounded(1, mean, short, USUAL) <= max(8, mean / 16)
    rounded = {count: _rounded(count, mean, short, USUAL) for count in range(1, 1 << 14)}
    step = {count: max(count if short else 2 * count, mean) / 16 for count in rounded}
    assert all(count <= value < count + max(8, step[count]) for count, value in rounded.items())
    assert len(set(rounded.values())) < (200 if short else 90)
    near = [count for count in rounded if 0.75 * mean <= count <= 1.5 * mean]
    assert not short or all(rounded[count] < count + max(8, max(count, mean) / 32) for count in near)


def test_neighbours_of_equal_load_share_a_product_when_that_is_cheap():
    assert [len(group.experts) for group in _batches([64] * 8, 1024, 10**6, 3_000_000)] == [8]
    assert [len(group.experts) for group in _batches([64, 4096, *[64] * 6], 1 << 20, 10**6, 3_000_000)] == [
        1,
        1,
        4,
        1,
        1,
    ]


def test_expert_weights_in_either_storage_give_the_same():
    x, routing, bank = case(tokens=200)
    logical = ExpertWeights(bank.up_EDH.contiguous(), bank.down_EFD.contiguous())
    torch.testing.assert_close(sort(x, routing, bank.weights()), sort(x, routing, logical))
