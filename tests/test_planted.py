"""The rules of scripts/house.py can fail: each catches a planted violation, and lets the nearest lawful thing pass."""

import pytest

from house import RULES, Module

DOC = '"""A file."""\n'


def caught(rule: str, files: dict[str, str]) -> list[str]:
    """What the rule of this name says about a house of these files."""
    check = next(check for check in RULES if check.__name__ == rule)
    return list(check([Module(f"turnout/{path}", DOC + text) for path, text in files.items()]))


PLANTED = {
    "imports_go_down": [
        ({"decide/token/topk.py": "import turnout.serve.http"}, "decide imports up, from serve"),
        ({"decide/token/topk.py": "from turnout.run.sort import sort"}, "decide imports sideways, from run"),
        ({"recipes/tiny.py": "from turnout import claims"}, "recipes imports sideways, from claims"),
        ({"solve/knapsack.py": "def f():\n    from turnout.models.lm import LM"}, "solve imports up, from models"),
        ({"run/sort.py": "import importlib\nimportlib.import_module('turnout.layers')"}, "run imports up, from layers"),
        ({"run/sort.py": "import importlib\nimportlib.import_module(f'turnout.{x}')"}, "name the room"),
        ({"run/sort.py": "from importlib import import_module\nimport_module(x)"}, "name the room"),
        ({"run/sort.py": "from . import grouped"}, "name the room"),
        ({"run/sort.py": "from turnout import Routing"}, "name the room"),
        ({"types/cost.py": "from turnout.solve import knapsack"}, "types imports up, from solve"),
        ({"attic/old.py": ""}, "'attic' is not a room"),
        ({"__init__.py": "from turnout.types import Cost"}, "loads no room"),
        (
            {"__init__.py": "if TYPE_CHECKING:\n    x = 1\nelse:\n    from turnout.types import Cost"},
            "imports 'turnout.types.Cost': `import turnout` loads no room",
        ),
        (
            {"run/a.py": "if TYPE_CHECKING:\n    from turnout.layers import MoE"},
            "run imports up, from layers",
        ),
    ],
    "imports_have_no_cycle": [
        (
            {"run/a.py": "from turnout.run import b", "run/b.py": "def f():\n    from turnout.run.a import g"},
            "turnout.run.a -> turnout.run.b -> turnout.run.a",
        ),
        (
            {"run/__init__.py": "from turnout.run.a import f", "run/a.py": "from turnout.run import f"},
            "turnout.run -> turnout.run.a -> turnout.run",
        ),
    ],
    "imports_are_declared": [
        ({"run/sort.py": "import pandas.io"}, "imports pandas, which pyproject.toml does not declare"),
        ({"run/sort.py": "import pytest"}, "imports pytest, which"),
        ({"models/lm.py": "try:\n    import transformers\nexcept ImportError:\n    pass"}, "transformers at the top"),
        ({"run/sort.py": "import triton"}, "loads triton"),
        ({"run/a.py": "if not TYPE_CHECKING:\n    import transformers"}, "transformers at the top"),
        (
            {"run/sort.py": "from turnout.run.kernels.a import f", "run/kernels/a.py": "import triton.language"},
            "triton",
        ),
    ],
    "names_say_something": [
        ({"run/utils.py": ""}, "'utils' says nothing"),
        ({"run/route_helpers.py": ""}, "'route_helpers' says nothing"),
        ({"common/__init__.py": ""}, "'common' says nothing"),
        ({"run/sort.py": "class BaseExecutor: ..."}, "'BaseExecutor' says nothing"),
    ],
    "sizes_stay_small": [
        ({"run/sort.py": "x = 1\n" * 399}, "400 lines; a module is under 400"),
        ({"run/sort.py": "def f():\n" + "    x = 1\n" * 59}, "f has 60 lines; a function is under 60"),
        ({"run/sort.py": "class A:\n    async def f():\n" + "        x = 1\n" * 59}, "f has 60 lines"),
    ],
    "rooms_list_their_names": [
        ({"run/__init__.py": ""}, "has no literal __all__"),
        ({"run/__init__.py": "__all__ = sorted(globals())"}, "has no literal __all__"),
        ({"run/__init__.py": "__all__ = ['sort']"}, "'sort', which does not exist"),
        ({"run/__init__.py": "__all__ = ['a', 'a']\na = 1"}, "names something twice"),
        (
            {"run/__init__.py": "from turnout.run.a import gone\n__all__ = ['gone']", "run/a.py": ""},
            "'gone', which is not found where it is imported from",
        ),
        ({"run/__init__.py": "__all__ = []", "run/a.py": "__all__ = ['gone']"}, "'gone', which does not exist"),
        ({"train/data/text.py": "x = 1"}, "its folder has no __init__.py"),
    ],
    "nothing_dangerous": [
        ({"run/a.py": "import pickle"}, "imports pickle"),
        ({"run/a.py": "def f():\n    from dill import loads"}, "imports dill"),
        ({"run/a.py": "from torch import load"}, "imports torch.load"),
        ({"run/a.py": "import torch\ntorch.load('x', weights_only=True)"}, "calls torch.load"),
        ({"run/a.py": "np.load('x', allow_pickle=True)"}, "passes allow_pickle=True"),
        ({"run/a.py": "subprocess.run('x', shell=True)"}, "passes shell=True"),
        ({"run/a.py": "from_pretrained('x', trust_remote_code=True)"}, "passes trust_remote_code=True"),
        ({"run/a.py": "eval('1')"}, "calls eval"),
        ({"run/a.py": "try:\n    f()\nexcept:\n    raise"}, "bare except"),
        ({"run/a.py": "try:\n    f()\nexcept Exception:\n    pass"}, "swallows every error"),
        ({"run/a.py": "def f():\n    raise NotImplementedError"}, "a stub"),
        ({"run/a.py": "def f(x):\n    raise ValueError(x)"}, "raises ValueError"),
        ({"run/a.py": "def f(x):\n    assert x > 0"}, "f asserts on its argument x"),
        (
            {"run/a.py": "class A:\n    def __init__(self, *, k):\n        assert k"},
            "__init__ asserts on its argument k",
        ),
    ],
    "public_names_are_documented": [
        ({"run/__init__.py": "__all__ = ['f']\ndef f(): ..."}, "f lacks a docstring"),
        ({"run/__init__.py": "__all__ = ['f']\ndef f():\n    '''A thing.\n\n    >>> 1'''"}, "f lacks Source:"),
        (
            {
                "run/__init__.py": "from turnout.run.a import A\n__all__ = ['A']",
                "run/a.py": "class A:\n    '''A thing.\n\n    Source: none.'''",
            },
            "run/a.py:2: A lacks >>>",
        ),
        (
            {
                "run/__init__.py": "from turnout.run.sort import sort\n__all__ = ['sort']",
                "run/sort.py": "def sort(): ...",
            },
            "run/sort.py:2: sort lacks a docstring",
        ),
        ({"errors.py": "__all__ = ['Oops']\nclass Oops(Exception): ..."}, "Oops lacks a docstring"),
    ],
}

LAWFUL = {
    "imports_go_down": {
        "decide/token/topk.py": "import torch\nfrom turnout.types import Routing\nfrom turnout.solve import knapsack",
        "types/cost.py": "from turnout.errors import word\nfrom turnout import __version__",
        "cli/main.py": "import importlib\nfrom turnout import recipes\nimportlib.import_module(f'turnout.{x}')",
        "__init__.py": "import importlib\nimportlib.import_module(x)",
        "__main__.py": "from turnout.cli import main",
    },
    "imports_have_no_cycle": {
        "run/__init__.py": "from turnout.run.a import f",
        "run/a.py": "from turnout.run.b import g\nfrom turnout.run.c import h",
        "run/b.py": "from turnout.run.c import h",
        "run/c.py": "",
    },
    "imports_are_declared": {
        "run/a.py": "import ast, torch.nn\ndef f():\n    import transformers\n    from turnout.run.kernels.a import g",
        "run/kernels/a.py": "import triton",
        "run/kernels/b.py": "from turnout.run.kernels import a",
    },
    "names_say_something": {"run/corpus.py": "class Database: ...", "run/scores.py": ""},
    "sizes_stay_small": {"run/a.py": "x = 1\n" * 398, "run/b.py": "def f():\n" + "    x = 1\n" * 58},
    "rooms_list_their_names": {
        "run/__init__.py": "from turnout.run.a import f\n__all__ = ['a', 'f']",
        "run/a.py": "def f(): ...",
        "run/b.py": "x = 1",
    },
    "nothing_dangerous": {
        "run/a.py": "try:\n    raise ValueError(1)\nexcept ValueError as error:\n    raise UsageError from error",
        "run/b.py": "def f(x):\n    y = x + 1\n    assert y\n    model.eval()",
        "run/c.py": "def _f(x):\n    assert x\nnp.load('x')",
    },
    "public_names_are_documented": {
        "run/__init__.py": "__all__ = ['X', 'f']\nX = 1\ndef f():\n    '''>>> 1\n    1\n    Source: none.'''",
        "errors.py": "__all__ = ['Oops']\nclass Oops(Exception):\n    '''It went wrong.'''",
        "run/a.py": "__all__ = ['g']\ndef g(): ...",
    },
}


def test_every_rule_is_tried() -> None:
    """A new rule needs a planted violation and a lawful example."""
    assert [rule.__name__ for rule in RULES] == list(PLANTED) == list(LAWFUL)


@pytest.mark.parametrize(
    ("rule", "files", "says"), [(rule, *case) for rule, cases in PLANTED.items() for case in cases]
)
def test_violation_is_caught(rule: str, files: dict[str, str], says: str) -> None:
    """One line, which names the file and says what is wrong."""
    found = caught(rule, files)
    assert [says in line for line in found] == [True], found
    assert any(line.startswith(f"turnout/{path}:") for path in files for line in found)


@pytest.mark.parametrize("rule", LAWFUL)
def test_lawful_code_passes(rule: str) -> None:
    """What a rule must not forbid."""
    assert not caught(rule, LAWFUL[rule])
