import math

import pytest
import torch

from turnout.decide.token import CIGT
from turnout.decide.token.cigt import information_gain
from turnout.errors import UsageError
from turnout.types import Given

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % 3


def test_the_gain_of_a_choice_that_says_nothing_and_of_one_that_says_all():
    even = torch.full((30, 2), 0.5)
    assert float(information_gain(even, LABELS)) == pytest.approx(0, abs=1e-6)
    assert float(information_gain(even, LABELS, evenness=3.0)) == pytest.approx(2 * math.log(2), rel=1e-5)
    told = torch.eye(3)[LABELS]
    assert float(information_gain(told, LABELS)) == pytest.approx(math.log(3), rel=1e-5)
    assert float(information_gain(told, LABELS, evenness=2.0)) == pytest.approx(2 * math.log(3), rel=1e-5)


def test_labels_are_for_training_alone():
    router = CIGT(6, 3)
    about = Given.of(30, 30, label_B=LABELS)
    routing = router(X, given=about)
    torch.testing.assert_close(routing.penalty, -information_gain(routing.score_TE, LABELS))
    with pytest.raises(UsageError, match="label_B"):
        router(X, given=Given.of(30, 30))
    assert router.eval()(X, given=Given.of(30, 30)).penalty is None


def test_the_temperature_falls_and_warm_up_draws_evenly():
    router = CIGT(6, 4, start=2.0, end=0.5, decay=0.5, warmup=1)
    about = Given.of(400, 400, label_B=torch.zeros(400, dtype=torch.int64))
    x_TD = torch.ones(400, 6)
    load_E = router(x_TD, given=about, generator=torch.Generator().manual_seed(0)).load_E
    assert int(load_E.min()) > 70 and router.temperature == 2.0
    for _ in range(5):
        router.after_step(load_E)
    assert router.temperature == 0.5 and router(x_TD, given=about).load_E.max() == 400
