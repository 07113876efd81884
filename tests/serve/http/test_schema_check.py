"""What is checked is what is published: our reading of a schema against jsonschema's, and every refusal in words."""

import json
import random
import re

import pytest

from turnout.serve.http import schema_check, schemas
from turnout.serve.http.errors import ApiError
from turnout.serve.http.schema_check import checked

WHERE = "/v1/here"
LONG = "abcdefghij" * 100_000
GOOD = {
    "prompt": ["a", ["a", "b"], [1, 2], [[1], [2, 3]]],
    "messages": [[{"role": "user", "content": "a"}]],
    "input": ["a", [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]],
}
VALUES = [None, True, 0, 1, -1, 1.0, 0.5, 3, 21, "", "a", "none", [], ["a"], [1], {}, {"a": 1}, {"type": "text"}]
VALUES += [{"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}, {"format": {"type": "text"}}, [["a"]]]


@pytest.mark.parametrize("name", ["COMPLETIONS", "CHAT", "RESPONSES"])
def test_it_reads_schemas_as_jsonschema_does(name):
    jsonschema = pytest.importorskip("jsonschema")
    schema = getattr(schemas, name)
    judge, chance = jsonschema.Draft202012Validator(schema), random.Random(0)
    jsonschema.Draft202012Validator.check_schema(schema)
    (needed,) = schema["required"]
    fields, seen = list(schema["properties"]), [0, 0]
    bodies = [{needed: good} for good in GOOD[needed]] + [{}, [], 3]
    for field in fields:
        bodies += [{needed: GOOD[needed][0], field: value} for value in VALUES]
    for _ in range(500):
        some = chance.sample(fields, 3)
        bodies.append({needed: GOOD[needed][0], **{field: chance.choice(VALUES) for field in some}})
    for body in bodies:
        try:
            checked(body, schema, "", WHERE)
            taken = True
        except ApiError as error:
            taken = False
            assert error.status == 400 and "Nearest fix: " in error.message and WHERE in error.message
        assert taken == judge.is_valid(body), body
        seen[taken] += 1
    assert min(seen) > 100


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": "a", "n": 0}, "n", "n must be from 1 to 128 in /v1/here; got 0. Nearest fix: pass n=1."),
        ({"prompt": "a", "n": 1.5}, "n", "a whole number or null"),
        ({"prompt": "a", "n": True}, "n", "got True"),
        ({"prompt": "a", "tempratur": 1}, "tempratur", "write temperature"),
        ({}, "prompt", "prompt must be passed"),
        ({"prompt": ["a", 3]}, "prompt[1]", "be a text"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop", "at most 4 items"),
        ({"prompt": "a", "stop": [""]}, "stop[0]", "at least 1 characters"),
        ({"prompt": "a", "logit_bias": {"1": "a"}}, "logit_bias.1", "be a number"),
        ({"prompt": "a", "best_of": 2}, "best_of", "be left out, all of n are given,"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "be left out, text is only gone on with,"),
        ({"prompt": "a", "response_format": {"type": "jsn"}}, "response_format.type", '"json_object", "json_schema"'),
        (
            {"prompt": "a", "stream_options": {"includ_usage": True}},
            "stream_options.includ_usage",
            "write stream_options.include_usage",
        ),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ],
)
def test_refusals_name_the_field_what_is_allowed_and_the_fix(body, param, says):
    with pytest.raises(ApiError) as found:
        checked(body, schemas.COMPLETIONS, "", WHERE)
    assert found.value.param == param
    assert says in found.value.message


@pytest.mark.parametrize(
    ("schema", "body", "param", "says"),
    [
        (
            schemas.CHAT,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}
                ]
            },
            "messages[0].content[0].type",
            "these models read text alone, in /v1/here; got image_url",
        ),
        (
            schemas.RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b.png"}]}]},
            "input[0].content[0].type",
            "these models read text alone, in /v1/here; got input_image",
        ),
        (
            schemas.RESPONSES,
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]},
            "input[0].type",
            "messages are all that is read, in /v1/here; got function_call_output",
        ),
        (
            schemas.CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "messages[0].tool_calls",
            "no tools are called here, in /v1/here",
        ),
    ],
)
def test_what_is_not_read_here_is_told_before_what_it_lacks(schema, body, param, says):
    with pytest.raises(ApiError) as found:
        checked(body, schema, "", WHERE)
    assert found.value.param == param
    assert says in found.value.message


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": LONG, "content": "a"}]},
        {"messages": LONG},
        {"messages": [{"role": "user", "content": "a"}], "logit_bias": {LONG: 1000}},
        {"messages": [{"role": "user", "content": "a"}], LONG: 1},
        {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": LONG}},
    ],
)
def test_a_refusal_is_short_however_long_what_it_refuses(body):
    with pytest.raises(ApiError) as found:
        checked(body, schemas.CHAT, "", WHERE)
    assert len(json.dumps(found.value.body)) < 2000
    assert LONG[:20] in found.value.message


def test_a_list_of_many_tokens_is_checked_in_few_calls(monkeypatch):
    calls, real = [0], schema_check.checked

    def counted(*arguments):
        calls[0] += 1
        return real(*arguments)

    monkeypatch.setattr(schema_check, "checked", counted)
    many = list(range(10_000))
    assert schema_check.checked({"prompt": many}, schemas.COMPLETIONS, "", WHERE) == {"prompt": many}
    assert calls[0] < 20
    for wrong, says in ((True, "prompt[10000] must be a whole number"), (-1, "prompt[10000] must be from 0 to")):
        with pytest.raises(ApiError, match=re.escape(says)):
            schema_check.checked({"prompt": [*many, wrong]}, schemas.COMPLETIONS, "", WHERE)


def test_whole_numbers_written_as_fractions_are_whole():
    found = checked({"prompt": [1.0, 2], "n": 2.0, "seed": 3.0}, schemas.COMPLETIONS, "", WHERE)
    assert json.dumps(found) == '{"prompt": [1, 2], "n": 2, "seed": 3}'
