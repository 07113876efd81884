"""The page of a recorded trace: what is in it is what was recorded, and a browser shows it, light, dark and narrow."""

import json
import re

import numpy as np
import pytest
import torch

from turnout.errors import UsageError
from turnout.serve.viewer import Shared, trace_html
from turnout.serve.viewer.page import policy
from turnout.types import Routing, Trace, TraceWriter

E, L, K = 8, 3, 2
TEXTS = [" <b>a</b>", "\n", "", "é", " </script>"]


@pytest.fixture
def trace(tmp_path) -> Trace:
    generator = torch.Generator().manual_seed(3)
    routings = [
        Routing.from_topk(*reversed(torch.rand(30, E, generator=generator).topk(K)), num_experts=E) for _ in range(L)
    ]
    with TraceWriter(tmp_path / "trace", num_experts_L=[E] * L, domains=["prose", "code"], token_ids=True) as writer:
        ids = torch.arange(30) % len(TEXTS)
        writer.add(routings, document_tokens=[20, 10], document_domains=[0, 1], token_id_T=ids)
    return Trace.open(tmp_path / "trace")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_holds_what_was_recorded(trace) -> None:
    data = data_of(trace_html(trace, text_of=TEXTS.__getitem__))
    first, second = data["trace"]["documents"]
    assert (first["length"], second["title"]) == (20, "2: code, 10 tokens")
    assert second["tokens"] == [TEXTS[at % len(TEXTS)] for at in range(20, 30)]
    for layer in range(L):
        routing = trace.routing(layer)
        assert data["load"][layer] == routing.load_E.tolist()
        weight_TE = routing.dense().numpy()
        for token in range(20):
            chosen = first["routes"][layer][token]
            assert chosen == sorted(np.flatnonzero(weight_TE[token]).tolist(), key=lambda e: -weight_TE[token, e])


def test_a_trace_without_ids_shows_places(trace) -> None:
    assert data_of(trace_html(trace))["trace"]["documents"][0]["tokens"][:3] == ["0 ", "1 ", "2 "]
    with pytest.raises(UsageError, match="Trace"):
        trace_html("trace")


def test_a_command_writes_it(trace, tmp_path, capsys) -> None:
    from turnout.cli.main import main

    assert main(["report", str(trace.path)]) == 0 and str(tmp_path / "trace.html") in capsys.readouterr().out
    assert data_of((tmp_path / "trace.html").read_text()) == data_of(trace_html(trace))
    assert main(["report", str(trace.path), str(tmp_path)]) == 2 and "one trace" in capsys.readouterr().err


def test_a_tokenizer_that_the_trace_was_not_recorded_with_is_refused(trace, tmp_path, capsys) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from turnout.cli.main import main

    for size, code in ((len(TEXTS), 0), (len(TEXTS) - 1, 2)):
        file = tmp_path / f"{size}.json"
        Tokenizer(WordLevel({str(n): n for n in range(size)}, unk_token="0")).save(str(file))
        assert main(["report", str(trace.path), "--tokenizer", str(file)]) == code
    assert "has a token 4" in capsys.readouterr().err


def test_nothing_is_asked_of_a_network(trace) -> None:
    page = trace_html(trace, name="<img src=x>", text_of=TEXTS.__getitem__)
    assert "unsafe" not in policy() and "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(http|//)""", page) and "<img src=x>" not in page
    assert " style=" not in re.sub(r"<script.*", "", page, flags=re.S), "the policy would drop it"


def test_a_browser_shows_it(trace, browse, rgb, tmp_path) -> None:
    path = tmp_path / "page.html"
    path.write_text(trace_html(trace, text_of=TEXTS.__getitem__), encoding="utf-8")
    backgrounds = []
    for width, dark in ((1200, False), (400, True)):
        driver = browse(width=width, dark=dark)
        driver.get(path.as_uri())
        assert not driver.get_log("browser"), "no error, nothing that the policy stopped"
        spans = driver.find_elements("css selector", "#text .t")
        assert [span.get_attribute("textContent") for span in spans[:4]] == [" <b>a</b>", "⏎\n", "·", "é"]
        assert driver.execute_script("return document.documentElement.scrollWidth") == width, "nothing sticks out"
        backgrounds.append(rgb(driver.execute_script("return getComputedStyle(document.body).backgroundColor")))
        chosen = trace.routing(0).dense()[0].argmax()
        assert f"layer 0, experts {chosen} and" in spans[0].get_attribute("aria-label")
    assert min(backgrounds[0]) > 200 and max(backgrounds[1]) < 60


def test_the_keyboard_goes_everywhere(trace, browse, tmp_path) -> None:
    from selenium.webdriver.common.keys import Keys

    path = tmp_path / "page.html"
    path.write_text(trace_html(trace, text_of=TEXTS.__getitem__), encoding="utf-8")
    driver = browse()
    driver.get(path.as_uri())
    box = driver.find_element("id", "text")
    box.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert box.get_attribute("aria-activedescendant") == "t1"
    assert driver.find_element("id", "layer").get_property("value") == "1"
    said = driver.find_element("css selector", "#path svg").get_attribute("aria-label")
    weight_LE = [trace.routing(layer).dense()[1] for layer in range(L)]
    for layer, weight_E in enumerate(weight_LE):
        first, second = weight_E.topk(2).indices.tolist()
        assert f"layer {layer}: experts {first} and {second}" in said
    box.send_keys(Keys.END)
    assert box.get_attribute("aria-activedescendant") == "t19"
    driver.find_element("css selector", '#legend [data-expert="0"]').click()
    dim = driver.find_elements("css selector", "#text .t.dim")
    assert len(dim) == 20 - int((trace.routing(1).dense()[:20, 0] > 0).sum())
    # All that can be reached has a name for those who do not see it.
    unnamed = driver.execute_script(
        "return [...document.querySelectorAll('button,select,input,textarea,svg[role=img],[tabindex]')].filter(e => "
        "!(e.getAttribute('aria-label') || (e.labels && e.labels.length) || e.textContent.trim())).length"
    )
    assert unnamed == 0


def test_counts_of_strangers_go_on_in_large_steps() -> None:
    """Whoever reads the state before and after each token of another learns nothing of its experts."""
    from turnout.serve.engine import EngineStats

    shared, seen, load = Shared(live=False), [], [0] * E
    for made in range(3000):
        load[made * 7 % E] += K
        counts = {"waited": made}
        stats = EngineStats(alive=True, slots=4, tokens_out=made + 1, expert_load=(tuple(load),), counts=counts)
        told = shared.of(stats)
        seen.append((tuple(told["load"][0]), told["counts"].get("waited", 0)))
    steps = sorted({row for row, _ in seen})
    assert len(steps) == len({count for _, count in seen}) == 3, "none, after 1,024 and after 2,048"
    assert Shared(live=True).of(stats)["load"] == [load]
