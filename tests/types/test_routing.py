import dataclasses
import random

import pytest
import torch

from turnout.errors import CheckpointError, ShapeError, StorageError, UsageError
from turnout.types import Routing, spread


def drawn(seed: int) -> tuple[Routing, torch.Tensor]:
    """A routing of random size and pattern, made in one of three ways, and its dense form."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_tokens, num_experts = chance.randint(0, 40), chance.choice([1, 2, 7, 16, 300, 40_000])
    score_TE = torch.rand(num_tokens, num_experts, generator=generator) + 0.1
    if chance.random() < 0.5:
        top_k = chance.randint(1, min(num_experts, 9))
        weight_TK, index_TK = score_TE.topk(top_k, dim=1)
        dense_TE = torch.zeros_like(score_TE).scatter(1, index_TK, weight_TK)
        return Routing.from_topk(index_TK, weight_TK, num_experts=num_experts), dense_TE
    chosen_TE = torch.rand(score_TE.shape, generator=generator) < chance.random()
    dense_TE = score_TE * chosen_TE
    if chance.random() < 0.5:
        return Routing.from_dense(dense_TE), dense_TE
    token_R, expert_R = chosen_TE.nonzero(as_tuple=True)
    order_R = torch.randperm(len(token_R), generator=generator)
    token_R, expert_R = token_R[order_R], expert_R[order_R]
    sizes = {"num_tokens": num_tokens, "num_experts": num_experts}
    return Routing.from_entries(token_R, expert_R, score_TE[token_R, expert_R], **sizes), dense_TE


seeds = pytest.mark.parametrize("seed", range(60))


@seeds
def test_is_the_matrix_it_was_made_from(seed):
    routing, dense_TE = drawn(seed)
    routing.validate()
    assert torch.equal(routing.dense(), dense_TE)
    assert (routing.num_tokens, routing.num_experts) == dense_TE.shape
    assert routing.num_entries == int((dense_TE != 0).sum())
    assert torch.equal(routing.load_E, (dense_TE != 0).sum(0))
    assert routing.token_R.dtype == routing.offset_E.dtype == routing.expert_R.dtype == torch.int64
    assert routing.wanted_E is None and not routing.dropped_E.any()


@seeds
def test_rows_are_the_entries_by_token(seed):
    routing, dense_TE = drawn(seed)
    order_R, start_T = routing.by_token
    assert start_T.shape == (routing.num_tokens + 1,) and sorted(order_R.tolist()) == list(range(routing.num_entries))
    for t in range(routing.num_tokens):
        row_R = order_R[start_T[t] : start_T[t + 1]]
        assert set(routing.token_R[row_R].tolist()) <= {t}
        assert sorted(routing.expert_R[row_R].tolist()) == dense_TE[t].nonzero().flatten().tolist(), f"seed {seed}"


@seeds
@pytest.mark.parametrize("priority", ["weight", "position"])
def test_truncation_is_that_of_a_loop_over_experts(seed, priority):
    routing, dense_TE = drawn(seed)
    if routing.num_experts > 300:
        routing, dense_TE = drawn(seed + 1000)
    capacity = 1 + seed % 5
    expected_TE = torch.zeros_like(dense_TE)
    for e in range(min(routing.num_experts, 300)):
        asking = dense_TE[:, e].nonzero().flatten().tolist()
        if priority == "weight":
            asking.sort(key=lambda t, e=e: (-float(dense_TE[t, e]), t))
        expected_TE[asking[:capacity], e] = dense_TE[asking[:capacity], e]
    kept = routing.truncate(capacity, priority=priority).validate()
    if routing.num_experts <= 300:
        assert torch.equal(kept.dense(), expected_TE), f"seed {seed}"
    assert torch.equal(kept.wanted_E, routing.load_E)
    assert torch.equal(kept.dropped_E, routing.load_E - routing.load_E.clamp(max=capacity))
    assert int(kept.by_token[1][-1]) == kept.num_entries
    # A second truncation still knows what was wanted at first, and whom.
    again = kept.truncate(1).validate()
    assert torch.equal(again.wanted_E, routing.load_E)
    assert torch.equal(again.before.token_R, routing.token_R)


@pytest.mark.parametrize("num_tokens", [5, 3000])
def test_equal_weights_keep_the_earlier_token(num_tokens):
    generator = torch.Generator().manual_seed(0)
    weight_T1 = torch.randint(1, 4, (num_tokens, 1), generator=generator) / 4  # three weights, many ties
    routing = Routing.from_topk(torch.zeros(num_tokens, 1, dtype=torch.long), weight_T1, num_experts=2)
    order = sorted(range(num_tokens), key=lambda t: (-weight_T1[t].item(), t))
    for capacity in (1, num_tokens // 2, num_tokens - 1):
        kept = routing.truncate(capacity, priority="weight")
        assert kept.token_R.tolist() == sorted(order[:capacity])


@pytest.mark.parametrize(("capacity", "priority"), [(0, "weight"), (-3, "weight"), (2, "first")])
def test_a_senseless_truncation_is_refused(capacity, priority):
    with pytest.raises(UsageError, match="capacity and priority"):
        drawn(0)[0].truncate(capacity, priority=priority)


@seeds
def test_affinity_is_that_of_a_loop_over_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = seed % 23
    first_TE = torch.rand(num_tokens, 5, generator=generator) * (torch.rand(num_tokens, 5, generator=generator) < 0.5)
    then_TE = torch.rand(num_tokens, 7, generator=generator) * (torch.rand(num_tokens, 7, generator=generator) < 0.5)
    count = [[0] * 7 for _ in range(5)]
    for t in range(num_tokens):
        for i in range(5):
            for j in range(7):
                count[i][j] += int(first_TE[t, i] != 0 and then_TE[t, j] != 0)
    found = Routing.from_dense(first_TE).affinity(Routing.from_dense(then_TE))
    assert found.tolist() == count and found.dtype == torch.int64, f"seed {seed}"


def test_affinity_needs_the_same_tokens():
    one, two = (Routing.from_dense(torch.ones(count, 2)) for count in (3, 4))
    with pytest.raises(ShapeError, match="3 and 4 tokens"):
        one.affinity(two)


def test_gradients_reach_the_weights():
    index_TK = torch.tensor([[0, 3], [1, 0], [3, 2]])
    weight_TK = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def parts(weight_TK):
        routing = Routing.from_topk(index_TK, weight_TK, num_experts=4)
        return routing.weight_R, routing.dense(), routing.truncate(1).dense()

    assert torch.autograd.gradcheck(parts, (weight_TK,))
    dense_TE = torch.rand(3, 4, dtype=torch.float64).requires_grad_()
    mask_TE = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.autograd.gradcheck(lambda d: Routing.from_dense(d, mask_TE=mask_TE).weight_R, (dense_TE,))


def test_a_mask_keeps_zero_weights():
    routing = Routing.from_dense(torch.zeros(2, 2), mask_TE=torch.tensor([[True, False], [True, True]])).validate()
    assert routing.num_entries == 3 and not routing.weight_R.any()


def test_detached_has_no_gradient_and_no_scores():
    score_TE = torch.rand(3, 4).requires_grad_()
    routing = Routing.from_topk(
        *reversed(score_TE.topk(2)), num_experts=4, score_TE=score_TE, logit_TE=score_TE
    ).detach()
    assert not routing.weight_R.requires_grad and routing.score_TE is None and routing.logit_TE is None
    routing.validate()


def test_sizes_that_differ_are_refused():
    with pytest.raises(ShapeError, match="same shape"):
        Routing.from_topk(torch.zeros(3, 2).long(), torch.zeros(3, 1), num_experts=4)
    with pytest.raises(ShapeError, match="same shape"):
        Routing.from_topk(torch.zeros(3).long(), torch.zeros(3), num_experts=4)


def whole(**changes) -> Routing:
    parts = {
        "token_R": torch.tensor([0, 2, 1]),
        "weight_R": torch.tensor([0.5, 0.25, 1.0]),
        "offset_E": torch.tensor([0, 2, 2, 3]),
        "num_tokens": 3,
    }
    return Routing(**(parts | changes))


def test_the_unbroken_one_is_valid():
    assert whole().validate().dense().tolist() == [[0.5, 0, 0], [0, 0, 1.0], [0.25, 0, 0]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"token_R": torch.tensor([0, 3, 1])}, "tokens 0..3 of 3"),
        ({"token_R": torch.tensor([-1, 2, 1])}, "tokens -1..2"),
        ({"token_R": torch.tensor([2, 0, 1])}, "unsorted or repeated"),
        ({"token_R": torch.tensor([2, 2, 1])}, "unsorted or repeated"),
        ({"weight_R": torch.ones(2)}, "weights"),
        ({"weight_R": torch.tensor([0.5, float("nan"), 1.0])}, "not finite"),
        ({"offset_E": torch.tensor([0, 2, 2, 4])}, "offsets"),
        ({"offset_E": torch.tensor([1, 2, 2, 3])}, "offsets"),
        ({"offset_E": torch.tensor([0, 3, 2, 3])}, "offsets"),
        ({"offset_E": torch.tensor([], dtype=torch.long)}, "offsets"),
        ({"wanted_E": torch.tensor([2, 0])}, "wanted_E"),
        ({"wanted_E": torch.tensor([1, 0, 1])}, "wanted_E"),
        ({"score_TE": torch.ones(3, 2)}, "score_TE"),
        ({"logit_TE": torch.ones(2, 3)}, "logit_TE"),
    ],
)
def test_what_is_broken_is_named(changes, named):
    with pytest.raises(ShapeError, match=named):
        whole(**changes).validate()


def test_from_topk_of_an_expert_twice_does_not_validate():
    with pytest.raises(ShapeError):
        Routing.from_topk(torch.tensor([[0, 0]]), torch.ones(1, 2), num_experts=4).validate()


@pytest.mark.parametrize("wrong", [-1, -100, 4, 5, 255, 256, 1 << 40])
@pytest.mark.parametrize("num_experts", [4, 256, 257, 40_000])
def test_an_index_of_no_expert_is_refused_unless_it_is_named(wrong, num_experts):
    if 0 <= wrong < num_experts:
        return
    index_TK, weight_TK = torch.tensor([[0, wrong], [3, 1]]), torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    with pytest.raises(UsageError, match=f"got {wrong}"):
        Routing.from_topk(index_TK, weight_TK, num_experts=num_experts)
    made = Routing.from_topk(index_TK, weight_TK, num_experts=num_experts, dropped=wrong).validate()
    assert made.num_entries == 3 and made.dense()[0, 0] == 0.5 and made.dense()[1, 1] == 2
    with pytest.raises(UsageError, match="index of experts"):
        Routing.from_topk(index_TK, weight_TK, num_experts=num_experts, dropped=-7)
    with pytest.raises(UsageError, match="index of experts"):
        Routing.from_entries(
            torch.tensor([0]), torch.tensor([wrong]), torch.ones(1), num_tokens=1, num_experts=num_experts
        )


def test_what_stands_for_no_expert_is_no_expert():
    index, weight = torch.tensor([[0, 4]]), torch.ones(1, 2)
    with pytest.raises(UsageError, match="be an index of no expert"):
        Routing.from_topk(index, weight, num_experts=4, dropped=3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64])
def test_whole_numbers_of_any_kind(dtype):
    index, weight = torch.tensor([[2, 0], [2, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    made, wanted = (Routing.from_topk(one, weight, num_experts=3) for one in (index.to(dtype), index))
    assert torch.equal(made.token_R, wanted.token_R) and torch.equal(made.offset_E, wanted.offset_E)
    token, expert = torch.tensor([1, 0, 1], dtype=dtype), torch.tensor([2, 1, 0], dtype=dtype)
    listed = Routing.from_entries(token, expert, torch.ones(3), num_tokens=200, num_experts=200)
    assert listed.validate().token_R.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("index", "weight"),
    [
        (torch.tensor([[0.0, 1.7]]), torch.ones(1, 2)),
        (torch.tensor([[False, True]]), torch.ones(1, 2)),
        (torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.long)),
        (torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.complex64)),
    ],
)
def test_other_kinds_of_numbers_are_refused(index, weight):
    with pytest.raises(UsageError, match="whole numbers and floating point"):
        Routing.from_topk(index, weight, num_experts=4)


@pytest.mark.parametrize("token", [-1, 3])
def test_a_token_that_is_not_there_is_refused(token):
    with pytest.raises(UsageError, match="an index of tokens"):
        Routing.from_entries(torch.tensor([0, token]), torch.tensor([0, 1]), torch.ones(2), num_tokens=3, num_experts=2)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ShapeError, match="token_R, expert_R"):
        Routing.from_entries(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(2), num_tokens=3, num_experts=2)
    with pytest.raises(ShapeError, match="weight_TE and mask_TE"):
        Routing.from_dense(torch.ones(3, 2), mask_TE=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ShapeError, match="keep_R"):
        whole().keep(torch.tensor([0, 1, 2]))
    with pytest.raises(UsageError, match="an index of labels"):
        whole().relabel(torch.tensor([0, 1, 2]), 2)


def test_printing():
    assert str(whole()) == "Routing(3 tokens -> 3 experts, 3 entries, 1.00 per token, load 0..2, 0 dropped)"
    assert "1 dropped" in str(whole().truncate(1))
    empty = Routing.from_topk(torch.zeros(0, 2).long(), torch.zeros(0, 2), num_experts=4)
    assert str(empty) == "Routing(0 tokens -> 4 experts, 0 entries, 0.00 per token, load 0..0, 0 dropped)"


@seeds
def test_to_disk_and_back(seed, tmp_path):
    routing, _ = drawn(seed)
    if seed % 2:
        routing = routing.truncate(2)
    if seed % 3 == 0:
        routing = whole(score_TE=torch.rand(3, 3).t(), logit_TE=torch.rand(3, 3))
    routing.save(tmp_path / "deep" / "routing.safetensors")
    loaded = Routing.load(tmp_path / "deep" / "routing.safetensors")
    for name in ("token_R", "weight_R", "offset_E", "wanted_E", "score_TE", "logit_TE"):
        before, after = getattr(routing, name), getattr(loaded, name)
        assert (before is None) == (after is None)
        assert before is None or torch.equal(before, after), f"seed {seed}: {name}"
    assert loaded.num_tokens == routing.num_tokens
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["routing.safetensors"]


def test_bf16_weights_survive_the_disk(tmp_path):
    routing = whole(weight_R=torch.tensor([0.5, 0.25, 1.0], dtype=torch.bfloat16))
    routing.save(tmp_path / "r")
    assert Routing.load(tmp_path / "r").weight_R.dtype == torch.bfloat16


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "r.safetensors"
    whole().save(path)
    data = path.read_bytes()
    for size in (0, 4, 30, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"turnout\.routing/1"):
            Routing.load(path)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "r.safetensors"
    tensors = {"token_R": torch.tensor([0]), "weight_R": torch.ones(1), "offset_E": torch.tensor([0, 1])}
    right = {"format": "turnout.routing/1", "num_tokens": "1"}
    save_file(tensors, path, metadata=right)
    Routing.load(path)
    for held, metadata in (
        (tensors, None),
        (tensors, {"format": "other/1", "num_tokens": "1"}),
        (tensors, {"format": "turnout.routing/1"}),
        (tensors, right | {"num_tokens": "many"}),
        (tensors, right | {"num_tokens": "0"}),
        ({"token_R": tensors["token_R"]}, right),
        (tensors | {"extra": torch.ones(1)}, right),
        (tensors | {"token_R": torch.tensor([7])}, right),
        (tensors | {"offset_E": torch.tensor([0, 9])}, right),
        (tensors | {"offset_E": torch.tensor([[0, 1]])}, right),
        (tensors | {"weight_R": torch.ones(1, 1)}, right),
        (tensors | {"token_R": torch.ones(1)}, right),
    ):
        save_file(held, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=r"Routing\.load"):
            Routing.load(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        Routing.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        Routing.load(tmp_path)


def test_a_folder_cannot_be_overwritten_by_a_file(tmp_path):
    (tmp_path / "r").mkdir()
    with pytest.raises(StorageError, match="be a file"):
        whole().save(tmp_path / "r")


@seeds
def test_relabelled_it_is_the_product_with_the_labels(seed):
    routing, dense_TE = drawn(seed)
    generator = torch.Generator().manual_seed(seed)
    label_E = torch.randint(3, (routing.num_experts,), generator=generator)
    found = routing.relabel(label_E, 3).validate()
    one_hot_EN = torch.nn.functional.one_hot(label_E, 3).to(dense_TE.dtype)
    torch.testing.assert_close(found.dense(), dense_TE @ one_hot_EN)
    assert found.num_experts == 3
    with pytest.raises(ShapeError, match="one label for each"):
        routing.relabel(label_E[1:], 3)


@pytest.mark.parametrize("num_experts", [5, 200, 256, 300, 30_000])
def test_few_and_many_keys_are_sorted_alike(num_experts, monkeypatch):
    g = torch.Generator().manual_seed(num_experts)
    index_TK = torch.stack([torch.randperm(num_experts, generator=g)[:3] for _ in range(200)])
    weight_TK, found = torch.rand(200, 3, generator=g), []
    for many in (0, 1 << 40):
        monkeypatch.setattr("turnout.types.ordered._MANY", many)
        found.append(Routing.from_topk(index_TK, weight_TK, num_experts=num_experts))
    for name in ("token_R", "weight_R", "offset_E", "entry_R"):
        assert torch.equal(*(getattr(one, name) for one in found))


def test_columns_are_those_of_the_matrix():
    generator = torch.Generator().manual_seed(7)
    index_TK, weight_TK = torch.rand(9, 6, generator=generator).topk(3)[1], torch.rand(9, 3, generator=generator)
    score_TE = torch.rand(9, 6, generator=generator)
    whole = Routing.from_topk(index_TK, weight_TK, num_experts=6, score_TE=score_TE).truncate(3)
    for start, end in ((0, 6), (0, 2), (2, 5), (5, 6), (3, 3)):
        part = whole.columns(start, end).validate()
        assert torch.equal(part.dense(), whole.dense()[:, start:end])
        assert torch.equal(part.score_TE, score_TE[:, start:end])
        assert torch.equal(part.dropped_E, whole.dropped_E[start:end])
        assert torch.equal(part.before.dense(), whole.before.dense()[:, start:end])
    with pytest.raises(UsageError, match="columns"):
        whole.columns(2, 7)


def test_by_rank_first_choices_go_before_second_ones():
    """Expert 0 has place for two: tokens 1 and 2, whose first choice it is, though token 0 weighs most."""
    index_TK = torch.tensor([[1, 0], [0, 1], [0, 2], [2, 0]])
    weight_TK = torch.tensor([[0.95, 0.9], [0.6, 0.2], [0.5, 0.2], [0.8, 0.7]])
    routing = Routing.from_topk(index_TK, weight_TK, num_experts=3)
    kept = routing.truncate(2, priority="rank")
    assert kept.token_R[kept.expert_R == 0].tolist() == [1, 2]
    assert routing.truncate(2).columns(0, 1).token_R.tolist() == [0, 3]
    with pytest.raises(UsageError, match="from_topk"):
        kept.truncate(1, priority="rank")


def test_penalty_and_carry_stay_in_memory_and_out_of_records(tmp_path):
    routing = Routing.from_topk(torch.tensor([[0], [1]]), torch.ones(2, 1), num_experts=2)
    routing = dataclasses.replace(routing, penalty=torch.tensor(2.0), carry_TX=torch.ones(2, 3))
    assert routing.detach().penalty is None and routing.detach().carry_TX is None
    assert routing.keep(torch.tensor([True, False])).penalty is routing.penalty
    wide = spread(routing, torch.tensor([True, False, True]))
    assert wide.carry_TX.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 1]] and wide.penalty is routing.penalty
    routing.save(tmp_path / "r.safetensors")
    assert Routing.load(tmp_path / "r.safetensors").penalty is None
    for wrong in ({"penalty": torch.ones(1)}, {"penalty": torch.tensor(float("nan"))}, {"carry_TX": torch.ones(3, 1)}):
        with pytest.raises(ShapeError, match=next(iter(wrong)).removesuffix("_TX")):
            dataclasses.replace(routing, **wrong).validate()
