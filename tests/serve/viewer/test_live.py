"""The page of a server that answers: whose routes reach whom, and what a browser makes of a text that is streamed."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator

import pytest
import torch

fastapi = pytest.importorskip("fastapi", reason="turnout[serve] is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="turnout[serve] is not installed")

from turnout.models.lm import LM, LMConfig, MoEConfig  # noqa: E402
from turnout.serve import Engine  # noqa: E402
from turnout.serve.http import Door, Texts, build_app, listen  # noqa: E402
from turnout.train.data import train_tokenizer  # noqa: E402

L, E, K = 3, 8, 2
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 20], vocab_size=280)
    torch.manual_seed(7)
    moe = MoEConfig(num_experts=E, top_k=K, hidden=16)
    lm = LM(LMConfig(vocab_size=280, width=16, layers=L, heads=2, moe=moe, init_std=0.4, max_seq=256)).eval()
    with Engine(lm, tokenizer=tokenizer, name="small") as engine:
        yield engine


@pytest.fixture
def served(engine) -> Iterator:
    """Serves with these settings; gives the address."""
    running = []

    def serve(**settings) -> str:
        texts = Texts(engine.tokenizer, vocab_size=280, eos=(), own=True)
        app = build_app(engine, texts, **settings)
        sock = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        thread.start()
        running.append((server, thread, sock))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{sock.getsockname()[1]}"

    yield serve
    for server, thread, sock in running:
        server.should_exit = True
        thread.join()
        sock.close()


def events(url: str, **more) -> list[dict]:
    import httpx

    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True, **more}
    text = httpx.post(f"{url}/v1/completions", json=body, timeout=300).text
    return [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:") and "[DONE]" not in line]


@pytest.mark.usefixtures("compiled")
def test_routes_are_those_of_the_tokens(served, engine) -> None:
    url = served()
    prompt = engine.tokenizer.encode(PROMPT).ids
    choices = [event["choices"][0] for event in events(url, routes=True, prompt=prompt)]
    pieces = [choice for choice in choices if choice["finish_reason"] is None]
    routes = [piece["routes"] for piece in pieces]
    assert len(routes) == 12, "one event a token, also where it shows no text"
    from turnout.models.generation import generate

    whole = [*prompt, *generate(engine.lm, [prompt], tokens=12, temperature=0.0, eos=None).rows[0]]
    with torch.no_grad():
        routings = engine.lm(torch.tensor([whole])).routings
    for layer, routing in enumerate(routings):
        weight_TE = routing.dense()
        for number in range(12):
            taken = weight_TE[len(prompt) - 1 + number].topk(K).indices.tolist()
            assert routes[number] is not None and sorted(routes[number][layer]) == sorted(taken), (layer, number)


def test_whoever_does_not_ask_hears_of_no_routes(served) -> None:
    assert "routes" not in json.dumps(events(served(viewer="shared")))


def test_the_page_and_its_state(served, engine) -> None:
    import httpx

    url = served(viewer="shared", door=Door.at("127.0.0.1", keys=["secret"]))
    page = httpx.get(url)
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200 and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and page.headers["cache-control"] == "no-store"
    assert httpx.get(f"{url}/viewer/state").status_code == 401, "the page is for all, what it shows is not"
    state = httpx.get(f"{url}/viewer/state", headers={"Authorization": "Bearer secret"}).json()
    assert state["live"] is False and state["alive"] and sum(map(sum, state["load"])) == 0
    assert httpx.get(served()).status_code == 404, "there is none where nobody wants it"


def test_a_wrong_address_is_told_the_right_ones_also_beside_the_page(served) -> None:
    import httpx

    url = served(viewer="live")
    for method, path, status in (("GET", "/v1/nope", 404), ("POST", "/v1/models", 405), ("POST", "/", 405)):
        found = httpx.request(method, f"{url}{path}")
        assert found.status_code == status, found.text
        assert "Nearest fix: use /v1/chat/completions, /v1/completions" in found.json()["error"]["message"]


@pytest.mark.usefixtures("compiled")
def test_a_browser_streams(served, engine, browse) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    url = served(viewer="live")
    for width, dark in ((1200, False), (400, True)):
        driver = browse(width=width, dark=dark)
        driver.get(url)
        driver.find_element("id", "prompt").send_keys(PROMPT)
        driver.find_element("id", "prompt").send_keys(Keys.CONTROL + Keys.ENTER)
        said = WebDriverWait(driver, 60).until(
            lambda d: "ended by" in (text := d.find_element("id", "count").text) and text
        )
        assert said.startswith("64 tokens") and "ended by length" in said
        spans = driver.find_elements("css selector", "#text .t")
        assert len(spans) == 64 and all("experts" in span.get_attribute("aria-label") for span in spans)
        driver.find_element("css selector", "#text").send_keys(Keys.END)
        assert "Token 64. layer 0: experts" in driver.find_element("css selector", "#path svg").get_attribute(
            "aria-label"
        )
        assert "busiest: expert" in driver.find_element("css selector", "#load svg").get_attribute("aria-label")
        driver.find_element("id", "all").click()
        WebDriverWait(driver, 10).until(lambda d: "since the server began" in d.find_element("id", "load-about").text)
        assert not driver.get_log("browser"), "no error, nothing that the policy stopped"
        assert driver.execute_script("return document.documentElement.scrollWidth") == width
        asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = {one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"}
        assert all(one.startswith((url, "data:")) for one in urls), urls


def test_a_browser_without_the_key_is_asked_for_it(served, browse) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    driver = browse()
    driver.get(served(viewer="live", door=Door.at("127.0.0.1", keys=["secret"])))
    key = WebDriverWait(driver, 10).until(lambda d: (one := d.find_element("id", "key")).is_displayed() and one)
    assert "API key" in driver.find_element("id", "status").text
    key.send_keys("secret")
    WebDriverWait(driver, 20).until(lambda d: "requests running" in d.find_element("id", "status").text)
