"""Who may ask, what a request may take, and what becomes of those who leave, read slowly or come too many."""

import dataclasses
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from serving import serving, wait_for

from turnout.errors import UsageError
from turnout.serve.engine import EngineStats
from turnout.serve.http import Door, Limits, listen
from turnout.serve.http.limits import host_name, is_local
from turnout.serve.http.metrics import Meters

LONG = {"prompt": "a", "max_tokens": 250, "ignore_eos": True}


def post(url: str, body: object, *, headers: dict[str, str] | None = None, path: str = "/v1/completions"):
    told = {"Content-Type": "application/json", **(headers or {})}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}{path}", content=content, headers=told, timeout=60, trust_env=False)


def error_of(response: httpx.Response) -> dict:
    """An error in OpenAI's format, or the test fails."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error


def raw(url: str, body: object, *, receive: int | None = None, path: str = "/v1/completions") -> socket.socket:
    """A socket that has sent a request."""
    place = urlsplit(url)
    sock = socket.socket()
    if receive is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    sock.connect((place.hostname, place.port))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return sock


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nothing", None, 404),
        ("GET", "/v1/models/x/y", None, 404),
        ("POST", "/v1/embeddings", b"{}", 404),
        ("GET", "/v1/completions", None, 405),
        ("DELETE", "/v1/models", None, 405),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b"\xff\xfe", 400),
        ("POST", "/v1/completions", b"[" * 5000, 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "prompt": "b"}', 400),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "temperature": 1e999}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "n": 128, "stream": 1}', 400),
        ("POST", "/v1/completions", b'{"prompt": ["a", "b"], "n": 128}', 400),
        ("POST", "/v1/completions", b'{"prompt": []}', 400),
        ("POST", "/v1/completions", b'{"prompt": [[]]}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "echo": true, "logprobs": 1}', 400),
        ("POST", "/v1/chat/completions", b'{"messages": []}', 400),
        ("POST", "/v1/responses", b'{"input": "a", "previous_response_id": "x"}', 400),
        ("POST", "/v1/responses", b'{"input": [{"type": "function_call", "role": "user", "content": "a"}]}', 400),
    ],
)
def test_every_refusal_is_in_the_format(served, method, path, body, status):
    told = {"Content-Type": "application/json"}
    found = httpx.request(method, f"{served.url}{path}", content=body, headers=told, trust_env=False)
    assert found.status_code == status, found.text
    error_of(found)


def test_other_media_types_are_refused(served):
    """A page elsewhere can send these without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        found = post(served.url, b'{"prompt": "a"}', headers={"Content-Type": kind})
        assert (found.status_code, error_of(found)["code"]) == (415, "unsupported_media_type")
        assert "access-control-allow-origin" not in found.headers


def test_a_name_that_is_led_here_is_refused(served):
    for host, status in (("evil.example", 403), ("localhost:1", 200), ("[::1]:80", 200), ("127.0.0.1.evil", 403)):
        found = httpx.get(f"{served.url}/v1/models", headers={"Host": host}, trust_env=False)
        assert found.status_code == status
        assert status == 200 or error_of(found)["code"] == "host_not_allowed"


def test_a_large_body_is_refused_before_it_is_read(tokenizer):
    with serving(tokenizer, limits=Limits(body_bytes=2000)) as served:
        found = post(served.url, {"prompt": "a" * 3000})
        assert (found.status_code, error_of(found)["code"]) == (413, "body_too_large")

        def parts():
            for _ in range(10):
                yield b"a" * 500

        told = {"Content-Type": "application/json"}
        found = httpx.post(f"{served.url}/v1/completions", content=parts(), headers=told, trust_env=False)
        assert (found.status_code, error_of(found)["code"]) == (413, "body_too_large")
        assert post(served.url, {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_body_that_never_comes(tokenizer):
    with serving(tokenizer, limits=Limits(body_s=0.3)) as served:
        place = urlsplit(served.url)
        with socket.create_connection((place.hostname, place.port)) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
            sock.sendall(b"Content-Length: 50\r\n\r\n{")
            sock.settimeout(10)
            assert b" 408 " in sock.recv(1000)
        wait_for(lambda: served.service.door.active == 0)


def test_keys(tokenizer):
    door = Door.at("127.0.0.1", keys=["one", "two"])
    with serving(tokenizer, door=door) as served:
        for told in (
            {},
            {"Authorization": "Bearer thre"},
            {"Authorization": "Basic one"},
            {"Authorization": "Bearer"},
        ):
            found = post(served.url, {"prompt": "a"}, headers=told)
            assert (found.status_code, error_of(found)["code"]) == (401, "invalid_api_key")
            wrong = told.get("Authorization") == "Bearer thre"
            assert error_of(found)["message"].startswith("This server " + ("does not know" if wrong else "wants"))
            assert httpx.get(f"{served.url}/metrics", headers=told, trust_env=False).status_code == 401
        assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 200
        for key in ("one", "two"):
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as client:
                assert client.completions.create(model="moe", prompt="a", max_tokens=1).choices
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="no", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
    assert [door.tenant(f"Bearer {key}") for key in ("one", "two", "no")] == ["key 0", "key 1", ""]


def test_a_full_queue_says_when_to_come_again(tokenizer):
    with serving(tokenizer, slots=1, waiting=1) as served:
        socks = [raw(served.url, LONG | {"n": 1, "stream": True}) for _ in range(12)]
        heads = [sock.recv(400) for sock in socks]
        for sock in socks:
            sock.close()
        full = [head for head in heads if b" 429 " in head]
        assert full and all(b"retry-after: " in head.lower() for head in full)
        wait_for(lambda: served.engine.stats().running + served.engine.stats().waiting == 0)
        assert post(served.url, {"prompt": "a", "max_tokens": 1}).status_code == 200
        # Several texts of which not all have room: none is begun.
        found = post(served.url, LONG | {"n": 100})
        assert (found.status_code, error_of(found)["code"]) == (429, "queue_full")
        wait_for(lambda: served.engine.stats().running + served.engine.stats().waiting == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_slot(served, stream):
    before = served.engine.stats().finished.get("cancelled", 0)
    for _ in range(3):
        sock = raw(served.url, LONG | {"stream": stream, "n": 8})
        if stream:
            sock.recv(10)
        else:
            wait_for(lambda: served.engine.stats().running > 0)
        sock.close()
    wait_for(lambda: served.engine.stats().running + served.engine.stats().waiting == 0)
    wait_for(lambda: served.service.door.active == 0)
    assert served.engine.stats().finished.get("cancelled", 0) > before


def test_a_slow_reader_is_let_go_and_holds_nobody_up(tokenizer):
    with serving(tokenizer, limits=Limits(reader_s=0.5), waiting=300) as served:
        with raw(served.url, LONG | {"n": 128, "stream": True, "logprobs": 20}, receive=1024):
            time.sleep(0.2)  # nothing is read
            assert post(served.url, {"prompt": "a", "max_tokens": 2}).status_code == 200
            wait_for(lambda: served.service.door.active == 0)
            wait_for(lambda: served.engine.stats().running + served.engine.stats().waiting == 0)


def test_an_answer_that_takes_too_long(tokenizer):
    with serving(tokenizer, limits=Limits(request_s=0.05)) as served:
        found = post(served.url, LONG | {"n": 128})
        assert (found.status_code, error_of(found)["code"]) == (504, "timeout")
        found = post(served.url, LONG | {"n": 128, "stream": True})
        *_, last, done = found.text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert done == "data: [DONE]"
        wait_for(lambda: served.engine.stats().running + served.engine.stats().waiting == 0)


def test_a_dead_engine_is_said(tokenizer):
    with serving(tokenizer) as served:
        served.engine.close()
        found = httpx.get(f"{served.url}/health", trust_env=False)
        assert (found.status_code, found.json()["status"]) == (503, "dead")
        found = post(served.url, {"prompt": "a"})
        assert (found.status_code, error_of(found)["code"]) == (503, "engine_dead")


def test_why_an_engine_is_dead_is_for_those_with_a_key(tokenizer, monkeypatch):
    with serving(tokenizer, door=Door.at("127.0.0.1", keys=["one"])) as served:
        monkeypatch.setattr(served.engine, "_trouble", "ZeroDivisionError: of a path")
        told = [{}, {"Authorization": "Bearer no"}, {"Authorization": "Bearer one"}]
        found = [httpx.get(f"{served.url}/health", headers=one, trust_env=False) for one in told]
        assert [one.status_code for one in found] == [503] * 3 and {one.json()["status"] for one in found} == {"dead"}
        assert [one.json()["trouble"] for one in found] == ["the engine ended"] * 2 + ["ZeroDivisionError: of a path"]


def test_a_mistake_of_the_server_is_said(tokenizer, monkeypatch):
    with serving(tokenizer) as served:
        monkeypatch.setattr(served.service.texts, "prompt", lambda *_, **__: 1 / 0)
        found = post(served.url, {"prompt": "a"})
        assert (found.status_code, error_of(found)["type"]) == (500, "server_error")
        assert "ZeroDivisionError" in found.text


def test_draining_finishes_what_is_under_way(tokenizer):
    with serving(tokenizer) as served:
        texts: list[str] = []
        thread = threading.Thread(target=lambda: texts.append(post(served.url, LONG | {"n": 16}).text))
        thread.start()
        wait_for(lambda: served.engine.stats().running > 0)
        served.service.door.draining = True
        found = post(served.url, {"prompt": "a"})
        assert (found.status_code, error_of(found)["code"]) == (503, "draining")
        assert found.headers["retry-after"]
        assert httpx.get(f"{served.url}/health", trust_env=False).json()["status"] == "draining"
        thread.join()
        assert len(json.loads(texts[0])["choices"]) == 16


def test_metrics(served):
    post(served.url, {"prompt": "a", "max_tokens": 3, "ignore_eos": True})
    page = httpx.get(f"{served.url}/metrics", trust_env=False)
    assert page.headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    for name in ("time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "generation_tokens_total"):
        assert float(values[f'turnout_{name}{{model_name="moe"}}']) > 0
    assert float(values['turnout_num_requests_running{model_name="moe"}']) == 0
    assert float(values['turnout_http_requests_total{model_name="moe",path="/v1/completions",status="200"}']) > 0


def test_no_chat_template(tokenizer):
    with serving(tokenizer, template=None) as served:
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/responses", {"input": "a"}),
        ):
            found = post(served.url, body, path=path)
            assert (found.status_code, error_of(found)["code"]) == (400, "no_chat_template")
            assert "/v1/completions" in found.text


def test_hosts():
    assert [host_name(one) for one in ("a:1", "[::1]", "[::1]:2", "A")] == ["a", "::1", "::1", "a"]
    assert [is_local(one) for one in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.1")] == [True] * 3 + [
        False
    ] * 2
    assert Door.at("0.0.0.0", also=["my.name"]).is_called("my.name:80")
    assert not Door.at("0.0.0.0", also=["my.name"]).is_called("other")


def test_ports():
    with listen("127.0.0.1", 0) as sock:
        with pytest.raises(UsageError, match="another program listens"):
            listen("127.0.0.1", sock.getsockname()[1])
    with pytest.raises(UsageError, match="from 0 to 65535"):
        listen("127.0.0.1", 70000)
    with pytest.raises(UsageError, match="address of this machine"):
        listen("192.0.2.1", 0)


def test_counts_of_slots_stand_still_among_strangers():
    """What one token fetched says which experts it took: whoever reads the page before and after must not see it."""
    stats = EngineStats(alive=True, slots=4)
    page = Meters("m", lambda: stats), Meters("m", lambda: stats, live=True)

    def told(meters: Meters) -> list[bytes]:
        return [line for line in meters.page()[0].splitlines() if line.startswith(b"turnout_engine_count")]

    for tokens, misses, want in ((1, 3, None), (900, 40, None), (1024, 50, 50), (1025, 53, 50), (2047, 70, 50)):
        stats = dataclasses.replace(stats, tokens_out=tokens, counts={"expert_misses": misses})
        shared, live = map(told, page)
        assert live == [b'turnout_engine_count{model_name="m",name="expert_misses"} %d.0' % misses]
        line = b'turnout_engine_count{model_name="m",name="expert_misses"} 50.0'
        assert shared == ([] if want is None else [line])
