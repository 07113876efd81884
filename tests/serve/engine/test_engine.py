"""The engine: every request as it is alone and as ``generate`` makes it, whoever shares its batch."""

import dataclasses
import random
import time

import pytest
import torch
from variants import TINY, VARIANTS, make

import turnout
from turnout.errors import ShapeError, UnknownNameError, UsageError
from turnout.models import LM, Drawing, checkpoint
from turnout.models.checkpoint.offloaded import load_offloaded
from turnout.models.decoding import paged
from turnout.models.decoding.pages import Pages
from turnout.run.compiled import why_not_compiled
from turnout.serve.engine import Engine, Finished, QueueFull, Request, Token, paged_lane

KINDS = ["moe", "window", "gpt-oss", "gemma", "latent", "dense", "sinks"]
WAIT_S = 300


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of a hundred tokens have several parts, and ends that are steps and such that are not."""
    monkeypatch.setattr(paged, "CHUNK", 64)
    monkeypatch.setattr(paged, "_FEW", 20)
    monkeypatch.setattr(paged, "_SMALL", 0)


def longer(name: str) -> LM:
    torch.manual_seed(0)
    return LM(dataclasses.replace(TINY, **VARIANTS[name], max_seq=400, init_std=0.2)).eval()


def few_pages(lm: LM) -> int:
    """Memory for one text of the longest and a half."""
    need_G = paged_lane._most(Pages.windows_of(lm), 448)
    return sum(3 * need * size // 2 for need, size in zip(need_G, Pages.page_bytes(lm), strict=True))


def some_request(chance: random.Random, beginnings: list[tuple[int, ...]]) -> Request:
    """Any prompt, any drawing."""
    prompt = chance.choice(beginnings) + tuple(chance.choices(range(TINY.vocab_size), k=chance.randint(1, 90)))
    drawing = Drawing(temperature=0.0)
    if chance.random() < 0.5:
        drawing = Drawing(0.8, chance.choice([None, 9]), chance.choice([None, 0.9]), None, chance.choice([1.0, 1.3]))
    how = {"seed": chance.randint(0, 99), "eos": (chance.randrange(TINY.vocab_size),) if chance.random() < 0.3 else ()}
    return Request(prompt, chance.randint(1, 50), drawing, logprobs=3, tenant=chance.choice("ab"), **how)


def made_alone(lm: LM, request: Request) -> tuple[list[int], list[float]]:
    drawing = dataclasses.asdict(request.drawing) | {"seed": request.seed}
    del drawing["where"]
    found = turnout.generate(
        lm, [list(request.prompt)], tokens=request.tokens, eos=list(request.eos), logprobs=True, **drawing
    )
    return found.rows[0], found.logprob_BN[0].tolist()


def heard(tokens: tuple[Token, ...]) -> tuple[list[int], list[float | None]]:
    return [token.id for token in tokens], [token.logprob for token in tokens]


@pytest.mark.usefixtures("compiled")
def test_of_small_models_steps_read_the_ends_of_prompts_whole() -> None:
    def few(width: int, dtype: torch.dtype = torch.float32) -> int:
        lm = LM(dataclasses.replace(TINY, width=width)).to(dtype).eval()
        return paged._few(lm, paged._is_small(lm))

    assert [few(8), few(512), few(512, torch.bfloat16)] == [255, 64, 32]


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("name", [*KINDS, "moe, small"])
def test_every_request_is_as_it_is_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrivals at any time, cancellations, shared beginnings, memory for a few of them: not a bit differs."""
    seed = 11 + len(name)
    print("seed", seed)
    if name.endswith("small"):  # steps read all but whole parts
        monkeypatch.setattr(paged, "_SMALL", 1 << 18)
    chance, lm = random.Random(seed), longer(name.removesuffix(", small"))
    beginnings = [(), tuple(chance.choices(range(TINY.vocab_size), k=130)), tuple(chance.choices(range(9), k=70))]
    requests = [some_request(chance, beginnings) for _ in range(24)]
    paged_here = why_not_compiled() is None  # else each has a cache of its own, which nothing bounds or shares
    with Engine(lm, slots=6, cache_bytes=few_pages(lm) if paged_here else None) as engine:
        tickets = []
        for number, request in enumerate(requests):
            tickets.append(engine.submit(request))
            if number % 7 == 3:
                chance.choice(tickets).cancel()
            time.sleep(chance.random() * 0.01)
        # However fast the machine is: six at once whose prompts fit, and who all outgrow the memory as they go on.
        crowd = [Request(tuple(chance.choices(range(TINY.vocab_size), k=120)), 50, logprobs=3) for _ in range(6)]
        requests += crowd
        tickets += [engine.submit(request) for request in crowd]
        for ticket in tickets:
            ticket.result(WAIT_S)
        assert engine.drain(WAIT_S)
        stats = engine.stats()
        if paged_here:
            lane = engine._loop.lanes["model"]
            lane.forget()
            assert [pool.free for pool in lane.pages.pools] == [pool.count for pool in lane.pages.pools]
    print(stats)
    assert stats.alive and stats.pages_used == 0 and stats.running == stats.waiting == 0
    assert sum(stats.finished.values()) == len(requests)
    assert bool(stats.preempted) == bool(stats.tokens_cached) == paged_here
    for request, ticket in zip(requests, tickets, strict=True):
        tokens, end = ticket.result()
        ids, logprobs = made_alone(lm, request)
        assert heard(tokens) == (ids[: len(tokens)], logprobs[: len(tokens)])
        assert end.reason == "cancelled" or len(tokens) == len(ids) == end.output_tokens
        assert all(token.top[0][1] >= token.logprob for token in tokens)


@pytest.mark.usefixtures("short_parts", "compiled")
def test_what_was_read_before_is_not_read_again() -> None:
    lm, prompt = longer("window"), tuple(range(60)) * 3
    with Engine(lm, slots=2) as engine:
        ends = [engine.submit(Request(prompt, 8, logprobs=0, tenant=who)).result(WAIT_S) for who in "aab"]
        other = engine.submit(Request((*prompt[:100], 1, 2, 3), 8, logprobs=0, tenant="a")).result(WAIT_S)
        assert engine.drain(WAIT_S)
        stats = engine.stats()
    assert [end.cached_tokens for _, end in ends] == [0, 128, 0] and other[1].cached_tokens == 64
    assert heard(ends[0][0]) == heard(ends[1][0]) == heard(ends[2][0]) == made_alone(lm, Request(prompt, 8))
    assert heard(other[0]) == made_alone(lm, Request((*prompt[:100], 1, 2, 3), 8))
    assert stats.tokens_cached == 192 and stats.tokens_in == 3 * 180 + 103 - 192 and stats.pages_kept > 0


def test_drawn_is_generate_and_a_seed_is_all_that_counts() -> None:
    lm = make("moe")
    further = {"frequency_penalty": 0.5, "presence_penalty": -0.2, "logit_bias": {5: 2.0, 9: -100}}
    drawing = Drawing(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2, **further)
    with Engine(lm) as engine:
        asked = [Request((3, 1, 4), tokens=30, drawing=drawing, seed=seed, logprobs=0) for seed in (5, 5, 6)]
        found = [heard(ticket.result(WAIT_S)[0]) for ticket in [engine.submit(one) for one in asked]]
    assert found[0] == found[1] != found[2] and found[0] == made_alone(lm, asked[0])


@pytest.mark.usefixtures("compiled")
def test_routes_are_told_where_they_are_asked_for() -> None:
    lm = make("moe in one layer")
    with Engine(lm) as engine:
        tokens, _ = engine.submit(Request((3, 1, 4), 6, routes=True)).result(WAIT_S)
        quiet, _ = engine.submit(Request((3, 1, 4), 6)).result(WAIT_S)
        load = engine.stats().expert_load
    assert [token.id for token in tokens] == [token.id for token in quiet] and quiet[0].routes is None
    text = torch.tensor([[3, 1, 4, *(token.id for token in tokens)]])
    routing = lm(text).routings[0]
    for place, token in enumerate(tokens, 2):
        want = set(routing.expert_R[routing.token_R == place].tolist())
        assert len(token.routes) == 1 and set(token.routes[0]) == want
    assert len(load) == 1 and len(load[0]) == 5 and sum(load[0]) == 2 * 2 * (3 + 5)


class Falls:
    """A mask that allows even tokens, and fails or is done after some."""

    whole = True

    def __init__(self, fails: bool) -> None:
        self.fails, self.left = fails, 3

    @property
    def done(self) -> bool:
        return self.left == 0

    def allowed(self) -> torch.Tensor:
        if self.fails and self.left == 1:
            raise ValueError("a grammar that fails")
        return torch.arange(TINY.vocab_size) % 2 == 0

    def took(self, token: int) -> None:
        assert token % 2 == 0
        self.left -= 1


def test_one_that_fails_takes_no_other_down() -> None:
    lm = make("gemma")

    def falls(event: object) -> None:
        raise RuntimeError("who listens has left")

    with Engine(lm, slots=4) as engine:
        failing = engine.submit(Request((3, 1), 20, mask=Falls(True)))
        masked = engine.submit(Request((3, 1), 20, mask=Falls(False)))
        deaf = engine.submit(Request((3, 1), 20))
        deaf._told = falls
        fine = engine.submit(Request((3, 1), 20, logprobs=0))
        ends = [one.result(WAIT_S)[1] for one in (failing, masked, deaf, fine)]
        assert engine.stats().alive
    assert [end.reason for end in ends] == ["error", "stop", "error", "length"]
    assert "a grammar that fails" in ends[0].message and ends[0].output_tokens == 2 and ends[1].output_tokens == 3
    assert heard(fine.result()[0]) == made_alone(lm, Request((3, 1), 20))


def test_an_engine_that_dies_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.excepthook", lambda *_: None)
    engine = Engine(make("moe"))
    monkeypatch.setattr(engine._loop, "turn", lambda: 1 // 0)
    tickets = [engine.submit(Request((1,), 5)) for _ in range(3)]
    with engine:
        ends = [ticket.result(WAIT_S)[1] for ticket in tickets]
        assert all(end.reason == "error" and "ZeroDivisionError" in end.message for end in ends)
        engine._thread.join()
        assert not engine.stats().alive and "ZeroDivisionError" in engine.stats().trouble
        with pytest.raises(UsageError, match="ZeroDivisionError"):
            engine.submit(Request((1,), 5))


def test_what_can_never_be_answered_is_refused_at_once() -> None:
    engine = Engine(make("moe"), slots=1, waiting=2)
    with pytest.raises(UsageError, match="be from 0 to 60"):
        engine.submit(Request((61,), 1))
    with pytest.raises(ShapeError, match="end within 48"):
        engine.submit(Request((1,) * 40, 9))
    with pytest.raises(UnknownNameError, match="unknown model 'modell'"):
        engine.submit(Request((1,), 1, adapter="modell"))
    with pytest.raises(UsageError, match="come with the tokenizer"):
        engine.submit(Request((1,), 1, stop=("a",)))
    with pytest.raises(UsageError, match="at least 1"):
        Engine(make("moe"), slots=0)
    for bad in (
        {"prompt": (), "tokens": 1},
        {"prompt": (1,), "tokens": 0},
        {"prompt": (1,), "tokens": 1, "logprobs": -1},
    ):
        with pytest.raises(UsageError):
            Request(**bad)
    tickets = [engine.submit(Request((1,), 1)) for _ in range(3)]
    with pytest.raises(QueueFull) as full:
        engine.submit(Request((1,), 1))
    assert full.value.retry_after_s >= 1
    with engine:
        assert all(ticket.result(WAIT_S)[1].reason == "length" for ticket in tickets)
        assert engine.drain(WAIT_S)
        with pytest.raises(UsageError, match="closing"):
            engine.submit(Request((1,), 1))


@pytest.mark.usefixtures("compiled")
def test_what_never_fits_into_memory_is_refused_at_once() -> None:
    small = Engine(longer("moe"), cache_bytes=2 * sum(Pages.page_bytes(longer("moe"))))
    with pytest.raises(ShapeError, match="fit into memory"):
        small.submit(Request((1,) * 100, 100))


def test_closing_tells_all() -> None:
    engine = Engine(longer("moe"), slots=1)
    tickets = [engine.submit(Request((1,), 300)) for _ in range(3)]
    events: list[object] = []
    tickets[0].listen(events.append)
    engine.start()
    assert not engine.drain(0.01)
    engine.close()
    assert all(ticket.result(WAIT_S)[1].reason == "cancelled" for ticket in tickets)
    assert isinstance(events[-1], Finished) and events == list(tickets[0])
    idle = Engine(make("moe"))
    ticket = idle.submit(Request((1,), 1))
    idle.close()
    assert ticket.result(WAIT_S)[1].reason == "cancelled"


def test_texts_and_stops_are_those_of_generate() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(97 + number) if number < 26 else f"<0x{number + 150:02X}>": number for number in range(61)}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], byte_fallback=True))
    words.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    lm, drawing = make("moe"), Drawing(temperature=1.5)
    with Engine(lm, tokenizer=words) as engine:
        for seed in range(12):
            for stop, keep in (((), False), (("a", "bc"), False), (("f",), True)):
                request = Request((3, 1, 4), 40, drawing, stop=stop, keep_stop=keep, seed=seed)
                tokens, end = engine.submit(request).result(WAIT_S)
                how = {"temperature": 1.5, "seed": seed, "stop": list(stop), "keep_stop": keep, "tokenizer": words}
                want = turnout.generate(lm, [[3, 1, 4]], tokens=40, eos=None, **how)
                assert [token.id for token in tokens] == want.rows[0]
                assert "".join(token.text for token in tokens) == want.text_B[0]
                assert end.reason == {"tokens": "length", "stop": "stop"}[want.why_B[0]]
        ended = engine.submit(Request((3, 1, 4), 40, drawing, seed=0, eos=tuple(range(26, 61)))).result(WAIT_S)[0]
        made = turnout.generate(lm, [[3, 1, 4]], tokens=40, temperature=1.5, seed=0, eos=None).rows[0]
        first = next(place for place, token in enumerate(made) if token > 25)
        assert [token.id for token in ended] == made[: first + 1]
        assert "".join(token.text for token in ended) == words.decode(made[:first])


@pytest.mark.usefixtures("short_parts")
def test_experts_in_files_make_no_difference(tmp_path) -> None:
    lm = longer("moe")
    checkpoint.save(tmp_path, lm)
    few = load_offloaded(tmp_path, expert_memory="40kB")
    some = [tuple(range(n)) for n in (3, 40, 20, 61)]
    asked = [Request(prompt * 2, 12, logprobs=0) for prompt in some]
    with Engine(few, slots=3) as engine:
        found = [heard(ticket.result(WAIT_S)[0]) for ticket in [engine.submit(one) for one in asked]]
        counts = engine.stats().counts
    few.experts.close()
    assert found == [made_alone(lm, one) for one in asked]
    assert counts["expert_slots"] < 10 and counts["expert_hits"] > 0 and counts["expert_misses"] > 0
