"""A run.json of a stranger: what is asked for has its types, or is refused by name before anything is done."""

import functools
import json

import pytest

from turnout.errors import TurnoutError
from turnout.recipes.adapters import adapt_again
from turnout.recipes.convert import repeat


@pytest.mark.parametrize("which", ["convert", "adapt"])
def test_a_run_json_of_another_shape_is_refused_before_anything_is_done(tmp_path, which):
    conversion = {"source": "a", "steps": [{"step": "merge_experts", "keep": 2}], "text_tokens": 9, "seed": 0}
    settings = {"source": "a", "adapters": ["b"], "router": "arrow", "text_tokens": 9, "any_base": False, "dtype": None}
    key, body = ("conversion", conversion) if which == "convert" else ("settings", settings)
    again = repeat if which == "convert" else functools.partial(adapt_again, say=print, part=print)
    wrong = [None, 3, "x", [], {}, {"a": 1}, [1], True, 1.5, -(10**30)]
    for name in body:
        for value in wrong:
            if name == "seed" and value is None:
                continue
            (tmp_path / "run.json").write_text(json.dumps({key: body | {name: value}}))
            with pytest.raises(TurnoutError):
                again(tmp_path, tmp_path / "out")
    for text in ("[]", "{}", json.dumps({key: 3}), json.dumps({key: {}}), json.dumps({key: body | {"strange": 1}})):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(TurnoutError):
            again(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
