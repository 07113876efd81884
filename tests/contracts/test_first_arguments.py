"""Whatever public function is given a wrong first argument says what it was given, what it takes, and what to do."""

import inspect
import types
from pathlib import Path

import pytest
from torch import nn

import turnout
from turnout import measure, reshape, train
from turnout.decide.token import TopK
from turnout.errors import UsageError
from turnout.layers import MoE, Turnout
from turnout.models import LM, checkpoint


class LlamaForCausalLM(nn.Module):
    """What a model of transformers looks like from outside."""

    config = types.SimpleNamespace(model_type="llama")


FUNCTIONS = {
    f"{room.__name__}.{name}": getattr(room, name)
    for room in (reshape, measure, train, checkpoint)
    for name in room.__all__
    if inspect.isfunction(getattr(room, name)) and inspect.signature(getattr(room, name)).parameters
}
WRONG = {
    "none": None,
    "number": 3,
    "text": "name",
    "path": Path("nowhere"),
    "module": nn.Linear(2, 2),
    "foreign": LlamaForCausalLM(),
    "list": [1, "x"],
    "object": object(),
}
# Of the first parameter's annotation, which of those are no mistake.
RIGHT = {
    "Path": {"text", "path"},
    "Module": {"module", "foreign"},
    "Callable": {"module", "foreign"},
    "int": {"number"},
    "float": {"number"},
}


def allowed(first: inspect.Parameter) -> set[str]:
    shown = str(first.annotation).replace("~Model", "Module")  # a type variable: whatever module goes in comes out
    if "Sequence" in shown or "Mapping" in shown:
        return set()
    return {name for word, names in RIGHT.items() if word in shown for name in names}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_first_argument_is_named(name: str) -> None:
    function = FUNCTIONS[name]
    first, *rest = inspect.signature(function).parameters.values()
    others = {one.name: None for one in rest if one.default is one.empty}
    for kind, value in WRONG.items():
        if kind in allowed(first):
            continue
        with pytest.raises(UsageError) as caught:
            function(value, **others)
        said = str(caught.value)
        assert said.startswith(f"{first.name} must be ") and "Nearest fix: " in said, kind
        assert f"in {'.'.join(name.split('.')[:2])}" in said and name.rpartition(".")[2] in said, kind
        if kind == "text":
            assert "'name'" in said
        if kind == "foreign":
            assert "a LlamaForCausalLM of transformers" in said


def test_a_model_of_transformers_and_a_name_are_told_how_to_become_what_is_wanted() -> None:
    with pytest.raises(UsageError, match=r"save_pretrained\(FOLDER\), and pass turnout\.models\.checkpoint\.from_hf"):
        reshape.upcycle(LlamaForCausalLM(), num_experts=2, top_k=1)
    with pytest.raises(UsageError, match=r"checkpoint\.from_hf\('mixtral'\), or checkpoint\.load"):
        reshape.drop_experts("mixtral", keep=1)
    with pytest.raises(UsageError, match=r"AutoModelForCausalLM\.from_pretrained\('mixtral'\)"):
        turnout.adopt("mixtral")
    with pytest.raises(UsageError, match=r"the order is save\(path, lm\)"):
        checkpoint.save(nn.Linear(2, 2), "folder")
    with pytest.raises(UsageError, match=r"pass several, as a list"):
        reshape.average(nn.Linear(2, 2))


def test_a_wrapped_model_is_unwrapped_by_the_caller() -> None:
    from turnout.models import LMConfig

    lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, hidden=12))
    wrapper = nn.Module()
    wrapper.module = lm
    with pytest.raises(UsageError, match=r"pass what it wraps: Module\.module"):
        reshape.upcycle(wrapper, num_experts=2, top_k=1)


@pytest.mark.parametrize("router", ["TopK", TopK])
def test_a_router_by_name_or_class_is_told_to_be_built(router) -> None:
    for build in (lambda: MoE(8, 8, 2, router=router), lambda: Turnout(nn.Linear(2, 2), router)):
        with pytest.raises(UsageError, match=r"build it: turnout\.decide\.token\.TopK\(width, num_experts"):
            build()


def test_a_model_is_built_from_its_configuration() -> None:
    with pytest.raises(UsageError, match=r"config must be an LMConfig in turnout\.models\.LM; got the text 'llama'"):
        LM("llama")
