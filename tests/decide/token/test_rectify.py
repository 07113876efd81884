import torch

from turnout.decide.token import Rectify, TopK

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def built(**options):
    router = Rectify(6, 8, **options)
    with torch.no_grad():
        router.weight.normal_(0, 0.7, generator=torch.Generator().manual_seed(1))
    return router


def test_without_a_capacity_it_is_top_k():
    router, other = built(top_k=2, capacity_factor=None), TopK(6, 8, top_k=2)
    other.load_state_dict(router.state_dict())
    torch.testing.assert_close(router(X).dense(), other(X).dense())


def test_with_places_for_all_nothing_changes():
    whole, wide = built(capacity_factor=None, fill_in=False), built(capacity_factor=8.0, fill_in=False)
    assert torch.equal(whole(X).dense(), wide(X).dense())


def test_nobody_is_without_an_expert_and_it_is_on_the_own_device():
    dropped = built(intra_device=False, fill_in=False)(X)
    routing = built(devices=4, fill_in=False)(X)
    lost_T = dropped.dense().sum(1) == 0
    assert 0 < int(lost_T.sum()) < 64
    chosen_T = routing.dense().argmax(1)
    assert torch.equal(chosen_T[lost_T] // 2, (torch.arange(64) // 16)[lost_T])
    assert torch.equal(chosen_T[~lost_T], dropped.dense().argmax(1)[~lost_T])
    torch.testing.assert_close(routing.dense().sum(1), torch.ones(64))


def test_free_places_go_to_second_choices_and_no_expert_has_more():
    routing = built(intra_device=False)(X)
    before = built(intra_device=False, fill_in=False)(X)
    assert int(routing.load_E.max()) <= 8 and routing.num_entries > before.num_entries
    assert bool(((before.dense() > 0) <= (routing.dense() > 0)).all())  # nobody loses a place


def test_demand_is_that_of_the_first_choices():
    routing = built(devices=4)(X).validate()
    first_E = torch.bincount(routing.score_TE.argmax(1), minlength=8)
    assert torch.equal(routing.wanted_E, first_E) and torch.equal(routing.before.load_E, first_E)


def test_weights_of_one_teach_the_router():
    router = built(devices=4)
    routing = router(X)
    pull = torch.randn(routing.num_entries, generator=torch.Generator().manual_seed(3))
    (routing.weight_R * pull).sum().backward()
    assert bool(router.weight.grad.any())
