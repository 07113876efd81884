"""The fuzzer, small: a few tries of each kind of folder. ``python -m tests.fuzz`` does thousands."""

import pytest

from tests.fuzz.__main__ import table, wrong
from tests.fuzz.outcome import tries
from tests.fuzz.subjects import SUBJECTS

SEED, TRIES = 5, 25


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUBJECTS)
def test_harm_is_refused_clearly_or_changes_nothing(kind):
    found = tries(kind, SEED, range(TRIES))
    bad = [one for one in found if wrong(one)]
    assert not bad, f"seed {SEED}\n{table(found)}\n{bad[0]}\n{bad[0].said}"
    assert len(found) == TRIES and any(one.what == "clear" for one in found)
