"""The page of a conversion is whole, says what changed, and lets no text out of its place."""

import dataclasses
import json
import re

import pytest
import torch

from turnout.errors import CheckpointError
from turnout.measure import ReportData, RunData, certify
from turnout.models import LM, LMConfig, MoEConfig
from turnout.show import AdaptationData, ConversionData, adaptation_html, conversion_html, report_html

HOSTILE = """</script><img src=x onerror=alert(1)>"'&<svg/onload=alert(3)>-->"""


def row(name: str, config: LMConfig, scale: float = 1.0) -> dict:
    cost = LM(config).cost()
    sizes = {"params": int(cost.params * scale), "params_active": cost.params_active, "flops": cost.flops}
    return {"name": name, "config": config.to_json_dict(), "memory_bytes": 4 * cost.params, **sizes}


def config(experts: int) -> LMConfig:
    return LMConfig(vocab_size=16, width=8, layers=2, heads=2, moe=MoEConfig(experts, 2, 8))


def data(**changes: object) -> ConversionData:
    """Two steps: one expert of four is dropped from each of two layers, then one of three."""
    before, after = LM(config(4), seed=1).eval(), LM(config(2), seed=2).eval()
    steps = [
        {"step": "drop_experts", "count": 1, "report": {"notes": ["a note"], "values": {
            "by": "reap", "kept": {"0": [0, 2, 3], "1": [1, 2, 3]}, "params_before": 1000, "params_after": 900,
            "scores": {"0": [3.0, 1.0, 2.0, 2.5], "1": [0.5, 1.0, 1.0, 1.0]}, "relative_difference": 0.25}}},
        {"step": "drop_experts", "count": 1, "report": {"notes": [], "values": {
            "by": "reap", "kept": {"0": [0, 2], "1": [0, 1]}, "scores": {"0": [3.0, 1.0, 2.0], "1": [2.0, 1.0, 0.5]}}}},
    ]  # fmt: skip
    record = {
        "source": "/models/big",
        "steps": steps,
        "plan": [row("input", config(4)), row("1 drop_experts", config(3)), row("2 drop_experts", config(2))],
        "held_out": {
            "bytes": 1234,
            "before": {"bits_per_byte": 2.5, "layers": [0, 1], "load": [[0.4, 0.3, 0.2, 0.1]] * 2},
            "after": {"bits_per_byte": 2.625, "layers": [0, 1], "load": [[0.75, 0.25]] * 2},
        },
        "command": "turnout convert big",
        "hardware": {"cpu": "some"},
    }
    certificate = certify(before, after, torch.arange(16).view(2, 8))
    return dataclasses.replace(ConversionData("small", record, certificate), **changes)


def test_it_says_what_changed():
    page = conversion_html(data())
    assert re.search(
        r"<h1>small has \d+ % fewer parameters, and needs 2\.625 bits per byte where big needs 2\.500", page
    )
    for text in (
        "<td>held-out bits per byte</td><td>2.5000</td><td>–</td><td>2.6250</td>",
        "<td>experts a layer</td><td>4</td><td>3</td><td>2</td>",
        "1.00 k → 900",
        "over 1,234 bytes",
        "a note",
        "layer 0, expert 1: dropped, score 1",
        "layer 1, expert 0: dropped, score 0.5",
        '<p class="verdict other">different</p>',
        "turnout convert big",
    ):
        assert text in page, text


STOCK = {"version": "5.1.0", "dtypes": {"float32": {"max_abs": 2e-6, "relative": 3e-7}}, "skipped": ["bfloat16, so"]}


def with_stock(stock: dict | None) -> str:
    whole = data()
    return conversion_html(dataclasses.replace(whole, record={**whole.record, "stock": stock}))


def test_what_transformers_said_is_in_the_headline_and_in_full_below() -> None:
    page = with_stock(STOCK)
    assert re.search(r"<h1>small has .*2\.500; transformers 5\.1\.0 loads it and computes the same\.</h1>", page)
    assert "<td>float32</td><td>2e-06</td><td>3e-07</td>" in page and "Not checked: bfloat16, so." in page
    unasked = with_stock(None)
    assert "loads it" not in unasked and "It was not asked" in unasked
    absent = with_stock({"version": None, "dtypes": {}, "skipped": ["it is not installed"]})
    assert "loads it" not in absent and "Not checked: it is not installed." in absent


@pytest.mark.parametrize("change", [{"version": 3}, {"dtypes": {"float32": {"max_abs": "x", "relative": 0.0}}}])
def test_a_broken_word_of_transformers_is_refused(tmp_path, change: dict) -> None:
    record = {**data().record, "stock": {**STOCK, **change}}
    (tmp_path / "run.json").write_text(json.dumps({"conversion": record}))
    with pytest.raises(CheckpointError, match=r"version|max_abs"):
        ConversionData.open(tmp_path)


def test_experts_keep_their_colours_through_both_steps():
    """Of four, layer 0 keeps 0 and 3, and layer 1 keeps 1 and 2."""
    found = re.findall(r"layer (\d), expert (\d): (75|25)\.0 %", conversion_html(data()))
    assert found == [("0", "0", "75"), ("0", "3", "25"), ("1", "1", "75"), ("1", "2", "25")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"held_out": None}, "no text was given with --calibration"),
        ({"steps": [], "plan": [row("input", config(4))]}, "No step was taken"),
        ({"hardware": {}, "command": ""}, "Not recorded."),
    ],
)
def test_what_is_missing_is_said(change, words):
    whole = data()
    assert words in conversion_html(dataclasses.replace(whole, record={**whole.record, **change}))
    assert words not in conversion_html(whole)
    assert "There is no certificate.json." in conversion_html(data(certificate=None))


def test_an_equal_model_says_so():
    lm = LM(config(4)).eval()
    page = conversion_html(data(certificate=certify(lm, lm, torch.arange(16).view(2, 8))))
    assert "computes what big does, to the bit" in page and '<p class="verdict same">' in page


def test_no_text_gets_out_of_its_place():
    whole = data(name=HOSTILE)
    record = json.loads(json.dumps(whole.record).replace("a note", "NOTE").replace("turnout convert big", "COMMAND"))
    record["steps"][0]["report"]["notes"] = [HOSTILE]
    record["steps"][0]["report"]["values"]["by"] = HOSTILE
    record |= {"command": HOSTILE, "source": f"/x/{HOSTILE}".replace("/onload", "onload")}
    page = conversion_html(dataclasses.replace(whole, record=record))
    assert "<img" not in page and "onload=alert" not in re.sub(r"&lt;svg/?onload=alert", "", page)
    assert page.count("</script>") == 2 and "http" not in re.sub(r'http-equiv|"http://www.w3.org/2000/svg"', "", page)


def test_a_page_of_many_layers_stays_small():
    whole = data()
    many = {"by": "reap", "kept": {str(n): [0, 1] for n in range(300)}}
    many |= {"scores": {str(n): [1.0] * 64 for n in range(300)}, "expert_of_neuron": {"0": list(range(9999))}}
    record = {**whole.record, "steps": [{"step": "drop_experts", "report": {"values": many}}] * 2}
    assert len(conversion_html(dataclasses.replace(whole, record=record))) < 2_000_000


@pytest.mark.parametrize("text", [None, "{", "{}", '{"conversion": {"plan": [], "steps": []}}'])
def test_another_folder_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match="name a folder that turnout convert wrote"):
        ConversionData.open(tmp_path)


ADAPTED = {
    "settings": {"source": "/models/base"},
    "adapters": [{"name": HOSTILE, "ranks": [2], "params": 96, "maps": 1, "gates": False}],
    "loss": {},
    "share": {},
    "report": {"values": {"router": "arrow", "params_added": 96, "modules": ["0"]}},
}


def test_conversions_and_adapters_stand_beside_each_other_and_beside_runs() -> None:
    one, other = data(), dataclasses.replace(data(), name=HOSTILE)
    chosen = AdaptationData("routed", ADAPTED)
    both = report_html(ReportData("two", []), others=[one, other])
    assert "Conversions side by side" in both and both.count("Does it compute the same?") == 2
    assert re.search(r"<h1>small has \d+ % fewer parameters against big; ", both)
    assert "2.500 → 2.625" in both and "not ranked" in both, "neither says which text it was given"
    assert HOSTILE not in both and "Nothing has been measured yet" not in both
    run = RunData("x", result={"bits_per_byte": 2.0}, texts=("a",))
    mixed = report_html(ReportData("mixed", [run]), others=[one, chosen])
    assert "x needs 2.000 bits per byte on held-out text; beside it 2 models made of others" in mixed
    assert "big → small" in mixed and "base → routed" in mixed and HOSTILE not in mixed
    assert "–</td><td>–" not in mixed.split("Conversions side by side")[0].split("big → small")[0]


def test_conversions_of_one_model_on_one_text_may_be_compared() -> None:
    text = {"source": "/text", "tokens": 10}
    whole = data()
    one = dataclasses.replace(whole, record={**whole.record, "calibration": text, "seq": 64})
    page = report_html(ReportData("two", []), others=[one, dataclasses.replace(one, name="other")])
    assert "measured on the same text: lower bits per byte are better" in page and "not ranked" not in page
    assert "FLOPs a token, 64 of context" in page
    for change in ({"source": "/other"}, {"calibration": {"source": "/b", "tokens": 10}}, {"held_out": None}):
        other = dataclasses.replace(one, record={**one.record, **change})
        assert "not ranked" in report_html(ReportData("two", []), others=[one, other])


def test_a_loss_that_is_not_finite_is_no_win() -> None:
    loss = {"base": 3.0, "a": 2.5, "all, evenly": float("nan"), "routed": 2.0}
    record = ADAPTED | {"loss": loss, "text": {"tokens": 5}}
    page = adaptation_html(AdaptationData("routed", record))
    assert "the loss is not finite: all, evenly" in page and "better than" not in page
