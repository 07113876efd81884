"""The page is whole, asks no network for anything, says what is missing, and lets no text out of its place."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import re

import pytest

from turnout.measure import Passage, ReportData, RunData
from turnout.show import report_html
from turnout.types import Cost

VOID = {"meta", "br", "hr", "img", "input", "link", "source", "wbr", "area", "base", "col", "embed", "param", "track"}
HOSTILE = """</script><img src=x onerror=alert(1)><script>alert(2)</script>"'&<svg/onload=alert(3)>--><!--"""


class Page(html.parser.HTMLParser):
    """Checks the nesting of tags, and keeps what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])

    def count(self, tag: str) -> int:
        return sum(1 for name, _ in self.tags if name == tag)


def check(data: ReportData) -> Page:
    """The page of these runs, after everything that must be true of every page."""
    text = report_html(data)
    page = Page(text)
    assert page.wrong == []
    assert page.open == []
    assert len(text.encode()) < 2_000_000
    assert page.data["charts"] is not None
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "image", "use", "a"}, tag
        assert not {"src", "href", "xlink:href", "srcset", "action", "data"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert page.count("script") == 2
    charts = [int(attributes["data-chart"]) for _, attributes in page.tags if "data-chart" in attributes]
    assert charts == list(range(len(page.data["charts"])))
    return page


def test_the_sample_has_everything(sample) -> None:
    page = check(sample)
    kinds = [chart["kind"] for chart in page.data["charts"]]
    assert (kinds.count("lines"), kinds.count("load"), kinds.count("domains")) == (4, 4, 4)
    assert page.count("svg") == 1 + 12
    dense, moe = sample.runs
    share = 100 * (1 - moe.bits_per_byte / dense.bits_per_byte)
    said = f"moe needs {moe.bits_per_byte:.3f} bits per byte on held-out text, {share:.1f} % less than dense"
    assert f"{said} with 1.02 times the FLOPs (one seed each), and took 1.40 times as long." in page.text
    assert "After 3:20, when the shorter training ended, moe needed" in page.text
    assert "moe was then in the middle of its learning-rate schedule." in page.text
    for piece in ("MaxVio", "5.41 M", "Example 9000", "turnout demo --out runs/demo", "model.moe.num_experts"):
        assert piece in page.text
    assert "".join(moe.passages[0].tokens) in page.text
    assert [one["tokens"] for one in page.data["passages"]] == [list(one.tokens) for one in moe.passages]
    assert [len(one["routes"]) for one in page.data["passages"]] == [4, 4, 4]


def test_nothing_in_it_names_an_address(sample) -> None:
    text = report_html(sample)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", text)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_the_policy_allows_exactly_its_own_script(sample) -> None:
    page = check(sample)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_hostile_text_is_inert_wherever_it_stands(sample, passage_of) -> None:
    routes = passage_of(2, 4).routes
    tokens = tuple(HOSTILE if n % 2 else "ok" for n in range(len(routes[0])))
    run = dataclasses.replace(
        sample.runs[1],
        name=HOSTILE,
        config={HOSTILE: {HOSTILE: HOSTILE, "list": [HOSTILE]}},
        load_by_domain={HOSTILE: sample.runs[1].load, "b" + HOSTILE: sample.runs[1].load},
        metrics=tuple(
            {**line, "by_domain": {HOSTILE: 1.5}} if line["kind"] == "eval" else line for line in sample.runs[1].metrics
        ),
        passages=(Passage(tokens, routes, (HOSTILE, HOSTILE), 4, HOSTILE, HOSTILE),) * 2,
        hardware={HOSTILE: HOSTILE},
        command=HOSTILE,
        error=HOSTILE,
        notes=(HOSTILE,),
    )
    page = check(ReportData(HOSTILE, (run, sample.runs[0]), command=HOSTILE, notes=(HOSTILE,)))
    assert "".join(tokens) in page.text
    assert page.data["passages"][1]["tokens"][1] == HOSTILE
    text = report_html(ReportData(HOSTILE, (run,)))
    assert "<img" not in text
    assert "<svg/" not in text
    assert text.count("</script>") == 2


def test_dense_runs_alone_say_why_there_are_no_experts(run_of) -> None:
    page = check(ReportData("dense", (run_of("a"), run_of("b", seed=4))))
    assert page.data["passages"] == []
    assert "they are dense" in page.text
    assert "a dense model sends every token the same way" in page.text
    assert [chart["kind"] for chart in page.data["charts"]] == ["lines"] * 4


@pytest.mark.parametrize(("layers", "experts", "evals"), [(1, 1, 1), (1, 2, 1), (1, 8, 4), (20, 4, 2), (2, 64, 1)])
def test_odd_shapes(run_of, layers: int, experts: int, evals: int) -> None:
    page = check(ReportData("odd", (run_of("moe", layers=layers, experts=experts, evals=evals),)))
    kinds = [chart["kind"] for chart in page.data["charts"]]
    assert kinds.count("load") == layers
    assert kinds.count("domains") == layers


def test_the_largest_models_fit_and_say_what_is_left_out(run_of) -> None:
    page = check(ReportData("huge", (run_of("moe", layers=48, experts=128, evals=50),)))
    assert re.search(r"\d+ of 48 layers are shown", page.text)
    assert max(max(chart["experts"]) for chart in page.data["charts"] if chart["kind"] == "domains") == 127


@pytest.mark.parametrize("evals", [0, 1])
def test_a_run_that_has_just_begun(run_of, evals: int) -> None:
    run = run_of("moe", experts=4, evals=1)
    lines = [line for line in run.metrics if line["kind"] == "train"][:1] + (run.lines("eval")[:1] if evals else [])
    page = check(ReportData("new", (RunData("moe", metrics=tuple(lines)),)))
    if evals:
        assert "bits per byte on held-out text" in page.text
    else:
        assert "moe has come to step 5" in page.text
        assert "No held-out text was logged." in page.text


@pytest.mark.parametrize("runs", [(), (RunData("empty"),)])
def test_with_nothing_at_all_it_says_so(runs) -> None:
    page = check(ReportData("nothing", runs))
    assert "Nothing has been measured yet" in page.text
    assert page.text.count("Not recorded.") == 2


def test_values_that_are_no_numbers_do_no_harm() -> None:
    nan = float("nan")
    lines = (
        {"kind": "train", "step": 1, "tokens": 10, "loss": nan},
        {"kind": "train", "step": 2, "tokens": 20, "loss": 2.0},
        {"kind": "eval", "step": 2, "tokens": 20, "bits_per_byte": nan, "by_domain": {"a": nan}, "load": [[nan, 1.0]]},
        {"kind": "eval", "step": 3},
    )
    page = check(ReportData("title", (RunData("x", metrics=lines, cost=Cost(params=3), tokens_per_s=nan),)))
    assert "nan" not in page.text.lower()
    assert "x has come to step 3, at a loss of 2.000" in page.text


def test_an_error_is_shown(sample) -> None:
    page = check(ReportData("t", (dataclasses.replace(sample.runs[0], error="loss is not finite at step 7"),)))
    assert "dense stopped with an error." in page.text
    assert "loss is not finite at step 7" in page.text


def test_it_is_the_same_every_time(sample) -> None:
    assert report_html(sample) == report_html(sample)


def test_one_domain_is_not_compared_with_itself(sample):
    run = dataclasses.replace(sample.runs[1], load_by_domain={"all": sample.runs[1].load})
    page = report_html(dataclasses.replace(sample, runs=(run,)))
    assert "their text is of one domain" in page
