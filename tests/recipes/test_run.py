"""Run: overrides, run.json there and back, and what a user gets wrong."""

import json

import pytest

from turnout import recipes
from turnout.errors import CheckpointError, TurnoutError, UnknownNameError, UsageError
from turnout.recipes.run import Run, named_domains


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
        ("width=wide", UsageError, "be int"),
        ("steps=1.5", UsageError, "be int"),
        ("hidden=64", UsageError, "model.hidden, model.moe.hidden share that name"),
        ("top_k=9", UsageError, "num_experts=8"),
        ("heads=5", UsageError, "heads"),
        ("schedule=cosinus", UsageError, "cosine"),
        ("router=TopJ", UnknownNameError, "Did you mean 'TopK'?"),
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
