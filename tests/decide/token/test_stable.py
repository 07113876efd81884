import pytest
import torch

from turnout.decide.token import StableMoE
from turnout.errors import UsageError

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 10, (20,), generator=torch.Generator().manual_seed(1))


def built(**options):
    return StableMoE(6, 4, vocab_size=10, rank=3, std=0.5, **options)


def test_stage_1_is_written_out():
    router = built(balance=0.3, distil=0.7)
    routing = router(X, token_id_T=IDS)
    affinity_TE = X @ router.weight.t()
    best_T = affinity_TE.argmax(1)
    alpha_T = affinity_TE.gather(1, best_T[:, None]).sigmoid()[:, 0]
    load_E = torch.bincount(best_T, minlength=4)
    uneven = sum((load_E[e] - 5) / 5 * alpha_T[best_T == e].sum() for e in range(4)) / 20
    apart = torch.nn.functional.cross_entropy(router.id_VR[IDS] @ router.expert_ER.t(), best_T)
    torch.testing.assert_close(routing.penalty, 0.3 * uneven + 0.7 * apart)
    assert torch.equal(routing.dense().argmax(1), best_T)


def test_frozen_it_is_the_copy_as_it_was_whatever_moves_the_copy():
    router = built(freeze_after=2)
    for _ in range(2):
        router.after_step(torch.zeros(4))
    want_T = (router.id_VR[IDS] @ router.expert_ER.t()).argmax(1)
    with torch.no_grad():
        router.id_VR.normal_()  # as weight decay and momentum would
    routing = router(X, token_id_T=IDS)
    assert torch.equal(routing.dense().argmax(1), want_T) and routing.penalty is None
    again = built(freeze_after=2)
    again.load_state_dict(router.state_dict())
    assert torch.equal(again.eval()(X, token_id_T=IDS).dense().argmax(1), want_T)


def test_ids_are_needed_and_known():
    with pytest.raises(UsageError, match="token_id_T"):
        built()(X)
    with pytest.raises(UsageError, match="vocab_size"):
        built()(X, token_id_T=IDS + 1)
    assert built().eval()(X).num_entries == 20  # stage 1 looks at no id
