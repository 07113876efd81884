"""The API fuzzed from its own schema, by schemathesis: no crash, no answer that the schema does not have."""

import importlib.util
import json
import os
import random
from urllib.parse import quote

import httpx
import pytest
from serving import serving, wait_for

from turnout.serve.http import service

EXAMPLES = int(os.environ.get("TURNOUT_FUZZ_EXAMPLES", "40"))  # good ones and bad ones, of each endpoint
SEED = int(os.environ.get("TURNOUT_FUZZ_SEED", "0"))
POSTS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
LOOKS = ("/v1/models", "/v1/models/{name}", "/health", "/metrics", "/", "/viewer/state")


def check(found: httpx.Response, body: object) -> None:
    """An answer, or an error in OpenAI's format; never a mistake of the server."""
    assert found.status_code < 500, (found.status_code, found.text, body)
    if found.status_code >= 400:
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}, found.text
    elif found.headers["content-type"].startswith("text/event-stream"):
        events = found.text.strip().split("\n\n")
        assert "[DONE]" in events[-1] or "response." in events[-1], (found.text, body)
    else:
        assert isinstance(found.json(), dict)


@pytest.fixture(scope="module")
def target(tokenizer):
    with serving(tokenizer, waiting=2000, viewer="shared") as found:
        yield found


def test_every_route_is_fuzzed(target):
    paths = httpx.get(f"{target.url}/openapi.json", trust_env=False).json()["paths"]
    found = {(method, path) for path, methods in paths.items() for method in methods}
    viewers = {("get", "/"), ("get", "/viewer/state")}  # of the page alone: no part of the API
    assert found | viewers == {*(("post", path) for path in POSTS), *(("get", path) for path in LOOKS)}


def test_names_of_models_that_nobody_has(target):
    """What is looked at takes no body and one name: any letters, a slash and an empty one among them."""
    chance = random.Random(SEED)
    with httpx.Client(base_url=target.url, timeout=60, trust_env=False) as client:
        for path in LOOKS:
            for _ in range(20):
                name = "".join(chance.choices("am/%.?#é\\ \x01", k=chance.randint(0, 6)))
                found = client.request(
                    chance.choice(["GET", "POST", "PUT", "HEAD"]),
                    path.replace("{name}", quote(name, safe=chance.choice(["", "/"]))),
                    params={"x": name} if chance.random() < 0.5 else None,
                )
                assert found.status_code < 500, (path, name, found.text)
                if found.status_code >= 400 and found.request.method != "HEAD":
                    assert set(found.json()["error"]) == {"message", "type", "param", "code"}, found.text


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (500, {"error": dict.fromkeys(("message", "type", "param", "code"))}),  # a mistake of the server
        (400, {"detail": "no"}),  # another format
        (400, {"error": {"message": "no"}}),
        (200, [1]),
    ],
)
def test_it_sees_a_wrong_answer(status, content):
    with pytest.raises((AssertionError, KeyError)):
        check(httpx.Response(status, json=content), {})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
@pytest.mark.filterwarnings("ignore")
def test_it_finds_a_fault_that_is_planted(target, monkeypatch):
    """Wherever a field stands that need not: what is fuzzed reaches into the bodies."""
    right = service.requests

    def spoilt(body, *given, **more):
        if body.keys() - {"model", "prompt"}:
            raise RuntimeError("planted")
        return right(body, *given, **more)

    monkeypatch.setattr(service, "requests", spoilt)
    with pytest.raises(AssertionError):
        test_what_schemathesis_makes(target, POSTS[0])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", POSTS)
def test_what_schemathesis_makes(target, path):
    import schemathesis

    schema = schemathesis.openapi.from_dict(httpx.get(f"{target.url}/openapi.json", trust_env=False).json())
    operation, modes = schema[path]["POST"], schemathesis.GenerationMode
    with httpx.Client(base_url=target.url, timeout=60, trust_env=False) as client:
        good = ask_all(operation.as_strategy(generation_mode=modes.POSITIVE), client, path, good=True)
        bad = ask_all(operation.as_strategy(generation_mode=modes.NEGATIVE), client, path, good=False)
    assert min(good, bad) > 5, f"{good} and {bad} were asked, seed {SEED}"
    wait_for(lambda: target.engine.stats().running + target.engine.stats().waiting == 0)
    assert target.engine.stats().alive


def ask_all(strategy, client: httpx.Client, path: str, *, good: bool) -> int:
    """Asks what is drawn; how often."""
    import hypothesis

    asked = list[int]()

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=strategy)
    def ask(case):
        body = small(case.body) if good and isinstance(case.body, dict) else case.body
        try:
            content = json.dumps(body).encode()
        except (TypeError, ValueError):
            content = str(body).encode()
        found = client.post(path, content=content, headers={"Content-Type": "application/json"})
        check(found, body)
        asked.append(found.status_code)

    ask()
    if good:  # what the schema allows is taken, or told apart by what no schema says
        assert set(asked) <= {200, 400, 404}
    return len(asked)


def small(body: dict) -> dict:
    """The same, asking for little: what is fuzzed is what is taken, not how long it takes."""
    few = {name: min(body[name], 3) for name in ("n", "max_tokens", "max_completion_tokens") if body.get(name)}
    limit = "max_output_tokens" if "input" in body else "max_tokens"
    return {**body, limit: min(body.get(limit) or 3, 3), **few}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_bodies_with_one_place_spoilt(target, seed):
    chance = random.Random(seed)
    good = [
        (POSTS[0], {"prompt": "the cat", "max_tokens": 2, "logprobs": 1, "stop": ["x"], "n": 2, "seed": 1}),
        (POSTS[1], {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stream": True}),
        (POSTS[2], {"input": "a", "max_output_tokens": 2, "text": {"format": {"type": "text"}}}),
    ]
    with httpx.Client(base_url=target.url, timeout=60, trust_env=False) as client:
        for _ in range(300):
            path, body = chance.choice(good)
            raw = bytearray(json.dumps(body).encode())
            for _ in range(chance.randint(1, 3)):
                place = chance.randrange(len(raw))
                raw[place : place + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 2))
            found = client.post(path, content=bytes(raw), headers={"Content-Type": "application/json"})
            check(found, (seed, bytes(raw)))


@pytest.mark.slow
def test_requests_that_are_no_http(target):
    import socket
    from urllib.parse import urlsplit

    place, chance = urlsplit(target.url), random.Random(SEED)
    for _ in range(50):
        with socket.create_connection((place.hostname, place.port)) as sock:
            sock.sendall(chance.randbytes(chance.randint(1, 300)))
    assert httpx.get(f"{target.url}/health", trust_env=False).status_code == 200
