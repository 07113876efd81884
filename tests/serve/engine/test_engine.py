"""The engine: every request as it is alone, whoever shares its batch."""

from variants import make

import turnout
from turnout.models import Drawing
from turnout.serve.engine import Engine, Request


def test_greedy_is_generate() -> None:
    lm = make("moe")
    with Engine(lm) as engine:
        tokens, end = engine.submit(Request((3, 1, 4), tokens=9, logprobs=2)).result(60)
    want = turnout.generate(lm, [[3, 1, 4]], tokens=9, temperature=0, logprobs=True)
    assert [token.id for token in tokens] == want.rows[0] and end.reason == "length"
    assert [token.logprob for token in tokens] == want.logprob_BN[0].tolist()
    assert all(token.top[0] == (token.id, token.logprob) for token in tokens)


def test_drawn_is_generate() -> None:
    lm = make("dense")
    drawing = Drawing(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2)
    with Engine(lm) as engine:
        tokens, _ = engine.submit(Request((3, 1, 4), tokens=30, drawing=drawing, seed=5)).result(60)
    how = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}
    assert [token.id for token in tokens] == turnout.generate(lm, [[3, 1, 4]], tokens=30, **how).rows[0]
