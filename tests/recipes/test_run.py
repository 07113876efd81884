"""Run: overrides, run.json there and back, and what a user gets wrong."""

import json
import re

import pytest

from turnout import recipes
from turnout.errors import CheckpointError, TurnoutError, UnknownNameError, UsageError
from turnout.recipes import tiny
from turnout.recipes.convert import repeat
from turnout.recipes.execute import unexportable
from turnout.recipes.run import Run, named_domains
from turnout.recipes.size import check_size, least_bytes


@pytest.fixture
def run() -> Run:
    return recipes.tiny()


def test_a_bare_field_is_found_in_its_section(run):
    changed = run.override(["width=64", "steps=90", "top_k=1", "held_out=0.2", "lr=1e-3"])
    assert (changed.model.width, changed.train.steps, changed.model.moe.top_k) == (64, 90, 1)
    assert (changed.data.held_out, changed.train.lr) == (0.2, 1e-3)
    assert run.model.width == 96, "the run itself is frozen"


def test_fields_that_fit_only_together(run):
    changed = run.override(["width=16", "heads=2", "kv_heads=1", "steps=5", "warmup=1"])
    assert (changed.model.width, changed.model.heads, changed.train.steps) == (16, 2, 5)


def test_dotted_fields_and_structured_values(run):
    changed = run.override(
        [
            'model.moe.router_options={"renormalize": false}',
            "model.moe.layers=[1, 3]",
            "train.clip=null",
            "betas=[0.8, 0.9]",
        ]
    )
    assert changed.model.moe.router_options == {"renormalize": False}
    assert changed.model.moe.layers == (1, 3)
    assert changed.train.clip is None
    assert changed.train.betas == (0.8, 0.9)
    assert run.override(["moe.hidden=8"]).model.moe.hidden == 8, "as much of the name as only one field has"


@pytest.mark.parametrize("name", recipes.__all__)
def test_run_json_there_and_back(name, tmp_path):
    run = recipes.find(name).override(["seed=3"])
    run.save(tmp_path / "run.json", hardware={"cpu": "any"}, command="turnout train")
    assert Run.open(tmp_path) == run
    assert Run.open(tmp_path / "run.json") == run
    assert json.loads((tmp_path / "run.json").read_text())["command"] == "turnout train"


@pytest.mark.parametrize(
    ("override", "kind", "words"),
    [
        ("widht=96", UnknownNameError, "Did you mean 'width'?"),
        ("width", UsageError, "read field=value"),
        ("width=wide", UsageError, "be a whole number"),
        ("steps=1.5", UsageError, "be a whole number"),
        ("top_k=9", UsageError, "num_experts=8"),
        ("heads=5", UsageError, "heads"),
        ("schedule=cosinus", UsageError, "cosine"),
        ("router=topk", UnknownNameError, "Did you mean 'TopK'?"),
        ("model.moe.widht=3", UnknownNameError, "model.moe"),
        ('mla={"kv_rank": 8}', UsageError, "add rope_dim, nope_dim, v_dim"),
        ("lr=Infinity", UsageError, "finite"),
        ("warmup=900", UsageError, "pass warmup=800"),
        ("seq=512", UsageError, "pass seq=256, or max_seq=512"),
        ("held_out=1", UsageError, "held_out=0.05"),
        ("held_out=0", UsageError, "held_out=0.05"),
    ],
)
def test_mistakes_are_worded(run, override, kind, words):
    with pytest.raises(kind) as caught:
        run.override([override])
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", '{"format": "turnout.run/9"}', '{"format": "turnout.run/1", "recipe": 3}'])
def test_a_damaged_run_json_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TurnoutError):
        Run.open(tmp_path)


def test_a_missing_run_json_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"name a folder that turnout train wrote"):
        Run.open(tmp_path)


def test_domains_are_named_by_their_paths(tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert named_domains([str(odd)]) == {"a=b": (str(odd),)}
    assert named_domains(["hf:owner/name"]) == {"name": ("hf:owner/name",)}
    assert named_domains(["x=one", "x=two", "three"]) == {"x": ("one", "two"), "three": ("three",)}


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'tiny'"):
        recipes.find("tyni")


def test_the_twins_have_equal_active_flops():
    from turnout.models import LM

    sparse, dense = (LM(recipes.find(name).model).cost(seq=256) for name in ("tiny", "tiny_dense"))
    assert sparse.flops <= dense.flops <= 1.001 * sparse.flops
    assert sparse.params > 2 * dense.params


def test_a_short_name_of_several_fields_means_the_models_own() -> None:
    changed = tiny().override(["layers=2", "hidden=64"])
    assert (changed.model.layers, changed.model.hidden) == (2, 64)
    assert changed.model.moe == tiny().model.moe
    assert tiny().override(["moe.hidden=64"]).model.moe.hidden == 64


@pytest.mark.parametrize(
    ("assignments", "warmup"),
    [
        (["steps=60"], 6),
        (["train.steps=8000"], 800),
        (["steps=3"], 1),
        (["steps=60", "warmup=20"], 20),
        (["width=8"], 80),
    ],
)
def test_warm_up_keeps_its_share_unless_it_is_set(assignments, warmup) -> None:
    assert tiny().scaled([*assignments, "heads=4", "kv_heads=2"]).train.warmup == warmup


def test_a_run_that_cannot_fit_is_refused_before_anything_is_built() -> None:
    run = tiny()
    check_size(run)
    for change in ("layers=1000000", "vocab_size=2000000000", "batch=100000000", "num_experts=100000000"):
        with pytest.raises(UsageError, match=r"the memory must hold the .* that this run takes at the very least"):
            check_size(run.override([change]), free=8 * 10**9)
    least = least_bytes(run.override(["batch=4096"]))
    with pytest.raises(UsageError, match=r"pass batch=(\d+), with accumulate=") as caught:
        check_size(run.override(["batch=4096"]), free=least // 2)
    fits = int(re.search(r"batch=(\d+)", str(caught.value))[1])
    check_size(run.override([f"batch={fits}"]), free=least // 2)
    assert 0 < fits < 4096


def test_what_cannot_be_exported_is_said_before_it_is_trained() -> None:
    assert unexportable(tiny()) == ""
    said = unexportable(tiny().override(["router=ExpertChoice"]))
    assert "stays in turnout's own format" in said and "architecture of transformers" in said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("source",), 3), (("source",), None), (("steps",), {}), (("steps", 0), "x"), (("steps", 0), None),
        (("calibration",), 5), (("calibration",), {"source": 5}), (("seed",), "nan"), (("seed",), None),
        (("seed",), 10**30), (("text_tokens",), []), (("text_tokens",), 0), (("dtype",), "x"), (("dtype",), 1.5),
        (("as_format",), "y"),
    ],
)  # fmt: skip
def test_an_altered_run_json_of_a_conversion_is_refused(field, value, tmp_path) -> None:
    body = {"source": "nowhere", "steps": [{"step": "densify"}], "as_format": None, "dtype": None, "seed": 0}
    place = body | {"calibration": None, "text_tokens": 64}
    if len(field) == 1:
        place[field[0]] = value
    else:
        place[field[0]][field[1]] = value
    (tmp_path / "run.json").write_text(json.dumps({"format": "turnout.conversion/1", "conversion": place}))
    with pytest.raises(CheckpointError, match=r"run\.json must be of a conversion"):
        repeat(tmp_path, tmp_path / "out")
