import torch

from turnout.decide.token import PatchChoice
from turnout.types import Given

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))


def test_each_expert_takes_its_best_of_every_sample():
    router = PatchChoice(6, 3, per_sample=4, std=0.5)
    routing = router(X, given=Given.of(3, 30))
    chosen_BnE = (routing.dense() > 0).view(3, 10, 3)
    assert bool((chosen_BnE.sum(1) == 4).all())
    logit_BnE = (X @ router.weight.t()).view(3, 10, 3)
    for sample in range(3):
        for expert in range(3):
            assert set(logit_BnE[sample, :, expert].topk(4).indices.tolist()) == set(
                chosen_BnE[sample, :, expert].nonzero()[:, 0].tolist()
            )
    torch.testing.assert_close(routing.dense().view(3, 10, 3).sum(1), torch.ones(3, 3))


def test_samples_do_not_see_each_other():
    router = PatchChoice(6, 3, per_sample=4, std=0.5)
    together = router(X, given=Given.of(3, 30)).dense()[10:20]
    torch.testing.assert_close(together, router(X[10:20], given=Given.of(1, 10)).dense())


def test_a_short_sample_gives_all_it_has():
    router = PatchChoice(6, 3, per_sample=20)
    assert router(X[:5], given=Given.of(1, 5)).load_E.tolist() == [5, 5, 5]
