"""The load generator: it counts what was answered, is not slowed by a slow server, and costs little."""

import asyncio
import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from turnout.errors import UsageError
from turnout.serve.load import LengthMix, Slo, Target, Traffic, ask, bench
from turnout.serve.load.drive import open_loop
from turnout.serve.load.traffic import arrivals


def traffic(prompt: str = "64", output: str = "6", **more) -> Traffic:
    return Traffic(LengthMix.parse(prompt), LengthMix.parse(output), **more)


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_server_that_answers(endpoint, kind) -> None:
    endpoint.step_s, endpoint.first_s = 0.004, 0.03
    report = bench(Target(endpoint.url), traffic(endpoint=kind), streams=[3], rates=[50.0], requests=12)
    assert report.model == "small"
    for one in report.points:
        assert (one.done, one.errors, one.output_tokens) == (12, {}, 72)
        assert 0.03 <= one.ttft_s.median < 0.1 and 0.004 <= one.itl_s.median < 0.03
        assert one.itl_s.count == 12 * 5 and one.counted and one.tokens_per_piece == 1
        assert one.prompt_tokens == pytest.approx(12 * 64, rel=0.03), "lengths are the server's tokens, not words"
    assert f"0 of {report.points[0].sent}" not in report.table() and "12/12" in report.table()
    assert json.loads(report.to_json())["points"][0]["done"] == 12


def test_the_role_of_a_chat_is_no_token(endpoint) -> None:
    endpoint.first_s = 0.1
    (one,) = bench(Target(endpoint.url), traffic(endpoint="chat"), streams=[1], requests=2).points
    assert one.ttft_s.median >= 0.1


@pytest.mark.parametrize(
    ("manner", "kind"),
    [("cut", "cut"), ("closed", "cut"), ("short", "short"), ("busy", "HTTP 429"), ("broken", "HTTP 500"),
     ("error", "error event"), ("lies", "short")],
)  # fmt: skip
def test_what_is_no_answer_is_not_counted(endpoint, manner, kind) -> None:
    endpoint.manner = manner
    if manner != "lies":
        endpoint.manner = "whole"
        bench(Target(endpoint.url), traffic(), streams=[1], requests=1)
        endpoint.manner = manner
    if manner in ("cut", "closed", "error"):
        with pytest.raises(UsageError, match=r"URL must answer"):
            bench(Target(endpoint.url), traffic(), streams=[1], requests=1)
    answer = _one(endpoint)
    assert answer.error == kind, answer.message
    if manner == "busy":
        assert answer.retry_after == 3.0 and answer.message == "too many"
    if manner in ("short", "busy", "broken", "lies"):
        (one,) = bench(Target(endpoint.url), traffic(), streams=[2], requests=4, slo=Slo(ttft_s=9.0)).points
        assert (one.done, one.errors, one.tokens_per_s, one.goodput_per_s) == (0, {kind: 4}, 0.0, 0.0)


def _one(endpoint, tokens: int = 6, **more):
    target = Target(endpoint.url)
    body = traffic().body("small", "a b", tokens)
    request = target.request("completions", json.dumps(body).encode())
    return asyncio.run(ask(target, request, asked_tokens=tokens, **more))


def test_more_pieces_than_the_server_counts(endpoint) -> None:
    answer = _one(endpoint)
    assert answer.text == " w0 w1 w2 w3 w4 w5" and not answer.error
    assert dataclasses.replace(answer, output_tokens=5, finish="stop").judged(fixed=False).error == "miscounted"
    assert dataclasses.replace(answer, output_tokens=7).judged(fixed=False).error == "miscounted"
    early = dataclasses.replace(answer, output_tokens=3, piece_s=(1.0,), finish="stop")
    assert not early.judged(fixed=False).error and early.judged(fixed=True).error == "short"


def test_a_server_that_stalls_does_not_slow_the_load(endpoint) -> None:
    """Coordinated omission: during a stall requests go on to come, and what they wait is counted."""
    target, wanted = Target(endpoint.url), arrivals(100.0, 60, seed=1)
    requests = traffic(output="1").draw(60, target, "small", seed=0)
    endpoint.blocked_until_s = time.monotonic() + 3.0
    driven = asyncio.run(open_loop(target, requests, wanted))
    came = np.sort(np.array(endpoint.came_s) - endpoint.came_s[0])
    assert len(came) == 60 and max(endpoint.came_s) < endpoint.blocked_until_s, "all came while nothing was answered"
    assert (came - wanted).min() > -0.15, "none before it was due"
    waits = [answer.ttft_s for answer in driven.answers]
    for answer, due in zip(driven.answers, wanted, strict=True):
        assert answer.ttft_s >= 2.9 - due - 0.1, waits


def test_a_late_client_counts_from_when_requests_were_due(endpoint) -> None:
    answer = asyncio.run(_late(endpoint))
    assert answer.ttft_s >= 0.5 and answer.sent_s - answer.due_s >= 0.5


async def _late(endpoint):
    target, now = Target(endpoint.url), asyncio.get_running_loop().time()
    request = target.request("completions", json.dumps(traffic().body("small", "a", 2)).encode())
    return await ask(target, request, asked_tokens=2, due_s=now - 0.5)


def test_time_runs_out_and_nobody_is_there(endpoint) -> None:
    endpoint.first_s = 5.0
    assert _one(endpoint, timeout_s=0.1).error == "timeout"
    with pytest.raises(UsageError, match=r"ConnectionRefusedError.*Nearest fix: start it"):
        bench(Target("http://127.0.0.1:1"), traffic(), rates=[1])


def test_a_user_who_leaves(endpoint) -> None:
    endpoint.step_s = 0.01
    answer = _one(endpoint, tokens=200, leave_after=3)
    assert answer.error == "left" and len(answer.piece_s) == 3
    deadline = time.monotonic() + 5
    while not endpoint.left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert endpoint.left == 1, "the server saw it leave"


def test_a_slow_reader_gets_all(endpoint) -> None:
    answer = _one(endpoint, pause_s=0.02)
    assert not answer.error and answer.output_tokens == 6


def test_a_server_without_counts(endpoint) -> None:
    endpoint.usage = False
    report = bench(Target(endpoint.url), traffic(prompt="10"), streams=[1], requests=2)
    assert report.points[0].output_tokens == 12 and not report.points[0].counted
    assert "each piece counts as one" in report.table() and "lengths of prompts are in words" in report.table()


def test_answers_of_the_length_that_was_asked_for_did_not_end_by_themselves(endpoint) -> None:
    """Nor do a few drawn lengths below the mean of all say so, nor pieces that the server does not count."""
    mix = traffic(output="2:9,200:1")
    report = bench(Target(endpoint.url), mix, streams=[1], requests=2, seed=0)
    assert report.points[0].output_tokens == 4 and "by themselves" not in report.table()
    endpoint.usage = False
    assert "by themselves" not in bench(Target(endpoint.url), mix, streams=[1], requests=2, seed=0).table()
    endpoint.usage, endpoint.manner = True, "ended"
    assert "by themselves after 3 tokens" in bench(Target(endpoint.url), traffic(), streams=[1], requests=2).table()


def test_a_model_of_short_texts_is_asked_short_questions(endpoint) -> None:
    endpoint.most_words = 40
    (one,) = bench(Target(endpoint.url), traffic(), streams=[1], requests=2).points
    assert one.done == 2 and one.prompt_tokens == pytest.approx(2 * 64, rel=0.03)
    endpoint.most_words = 30  # of which nine can be asked
    (one,) = bench(Target(endpoint.url), traffic(), streams=[1], requests=2).points
    assert one.done == 2 and one.prompt_tokens == pytest.approx(2 * 64, rel=0.03)
    endpoint.most_words = 8
    with pytest.raises(UsageError, match=r"HTTP 400: too long\. Nearest fix: serve a model that reads longer texts"):
        bench(Target(endpoint.url), traffic(), streams=[1], requests=2)


def test_a_closed_loop_has_so_many_users(endpoint) -> None:
    endpoint.step_s = 0.01
    told: list[tuple[str, int, int]] = []
    report = bench(Target(endpoint.url), traffic(), streams=[4], requests=8, told=lambda *said: told.append(said))
    (one,) = report.points
    assert 4 * 6 / one.tokens_per_s == pytest.approx(6 * 0.0105, rel=0.5)
    assert [done for _, done, _ in told] == list(range(1, 9)) and {of for _, _, of in told} == {8}


def test_the_same_seed_asks_the_same() -> None:
    target = Target("http://127.0.0.1:1")
    mix = traffic("20:1,40:3", "2,9", shared=8, prefixes=2)
    first, again, other = (mix.draw(400, target, "m", seed=seed) for seed in (5, 5, 6))
    assert first == again != other
    prompts = [json.loads(one.request.partition(b"\r\n\r\n")[2])["prompt"].split() for one in first]
    assert {len(prompt) for prompt in prompts} == {20, 40}
    assert sum(len(prompt) == 40 for prompt in prompts) == pytest.approx(300, abs=40)
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 2
    assert len({tuple(prompt) for prompt in prompts}) == 400


def test_arrivals_are_poisson() -> None:
    gaps = np.diff(arrivals(4.0, 20_001, seed=3))
    assert gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(0.25, rel=0.04)
    assert all(a <= b for a, b in itertools.pairwise(arrivals(4.0, 100, seed=3)))


@pytest.mark.parametrize("text", ["", "ttft", "ttft=5", "ttft=0s", "what=1s", "ttft=1s,ttft=2s", "itl=-1ms"])
def test_objectives_that_cannot_be_read(text) -> None:
    with pytest.raises(UsageError, match=r"--slo ttft=0\.5s,itl=50ms"):
        Slo.parse(text)


def test_goodput_counts_what_keeps_to_it(endpoint) -> None:
    endpoint.step_s = 0.02
    for slo, kept in ((Slo.parse("itl=1s,e2e=9s"), 4), (Slo.parse("itl=1ms"), 0), (Slo.parse("tpot=1ms"), 0)):
        (one,) = bench(Target(endpoint.url), traffic(), streams=[2], requests=4, slo=slo).points
        assert one.goodput_per_s == pytest.approx(kept / one.seconds)


@pytest.mark.parametrize("text", ["0", "a", "8:", "8:0", "8:nan", "", "8:-1,9", "8:inf"])
def test_lengths_that_cannot_be_read(text) -> None:
    if text == "8:":
        assert LengthMix.parse(text).lengths == (8,)
        return
    with pytest.raises(UsageError, match="128:3,2048:1"):
        LengthMix.parse(text)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:y", "http://x?y=1"])
def test_addresses_that_are_none(url) -> None:
    with pytest.raises(UsageError, match="write http"):
        Target(url)


def test_a_key_is_not_shown() -> None:
    target = Target("http://h/api", key="secret")
    assert b"Bearer secret" in target.request("models") and "secret" not in repr(target)
    assert target.path("models") == "/api/v1/models" == Target("http://h/api/v1/").path("models")


def test_the_client_costs_little(endpoint) -> None:
    """What it takes for each token, on the slowest machine that runs tests, is far below what a server needs."""
    target = Target(endpoint.url)
    body = json.dumps(traffic().body("small", "a", 2000)).encode()

    async def timed() -> float:
        start = time.thread_time()
        answer = await ask(target, target.request("completions", body), asked_tokens=2000)
        assert not answer.error and len(answer.piece_s) == 2000
        return time.thread_time() - start

    assert asyncio.run(timed()) / 2000 < 200e-6
