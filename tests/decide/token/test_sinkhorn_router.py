import torch

from turnout.decide.token import Sinkhorn

X = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))


def test_training_is_even_and_evaluation_the_own_choice():
    router = Sinkhorn(6, 4, top_k=1, temperature=0.1)
    with torch.no_grad():
        router.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        router.weight[0, 0] += 3
    train_E, own_E = router(X).load_E, router.eval()(X).load_E
    assert int(train_E.max()) < 60 < int(own_E.max())
    assert torch.equal(router(X).dense().argmax(1), (X @ router.weight.t()).argmax(1))


def test_weights_are_sigmoids_of_one_and_softmaxes_of_several():
    one, two = Sinkhorn(6, 4, top_k=1), Sinkhorn(6, 4, top_k=2)
    torch.testing.assert_close(one(X).score_TE, (X @ one.weight.t()).sigmoid())
    torch.testing.assert_close(two(X).score_TE, (X @ two.weight.t()).softmax(1))
