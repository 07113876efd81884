"""What a grammar allows, token by token, and what it refuses."""

import json
import random

import pytest
from serving import VOCAB, make_lm, make_tokenizer
from tokenizers import Tokenizer

from turnout.errors import UsageError
from turnout.models import Drawing
from turnout.serve.engine import Engine, Request
from turnout.serve.http.errors import ApiError
from turnout.serve.http.grammar import Grammar, Grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"enum": ["é", "x"]},
        "c": {"type": "array", "items": {"type": "null"}},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, vocab_size=VOCAB + 12, eos=(0,))


def of(grammars: Grammars, schema: dict) -> Grammar:
    return grammars.of(schema, param="response_format", where="here")


def test_what_fits_is_allowed_and_ends(tokenizer, grammars):
    for text in ('{"a": 12, "b": "é", "c": [null, null]}', '{"a":-3,"b":"x","c":[]}'):
        mask = of(grammars, SCHEMA)
        for token in tokenizer.encode(text).ids:
            assert not mask.done
            assert mask.allowed().shape == (VOCAB + 12,)
            assert mask.allowed()[token], text
            mask.took(token)
        assert mask.done


def test_what_does_not_fit_is_not(tokenizer, grammars):
    mask = of(grammars, SCHEMA)
    wrong = tokenizer.encode("x").ids[0]
    assert not mask.allowed()[wrong]
    assert not mask.allowed()[0]  # nor the end
    assert not mask.allowed()[VOCAB:].any()  # nor tokens without text
    with pytest.raises(UsageError, match="response_format"):
        mask.took(wrong)


def test_whatever_is_drawn_is_of_the_form(tokenizer, grammars):
    for seed in range(30):
        chance, mask, ids = random.Random(seed), of(grammars, SCHEMA), list[int]()
        while not mask.done and len(ids) < 400:
            ids.append(chance.choice(mask.allowed().nonzero()[:, 0].tolist()))
            mask.took(ids[-1])
        made = json.loads(tokenizer.decode(ids)) if mask.done else {"a": 0, "b": "x", "c": []}
        assert set(made) == {"a", "b", "c"}, f"seed {seed}"


def test_a_tokenizer_that_begins_texts_with_a_space_writes_forms_too(tokenizer):
    """As those of RoBERTa and its kin; llguidance took it for a part of the text and fell over."""
    body = json.loads(tokenizer.to_str())
    level = next(one for one in (body["pre_tokenizer"], *body["pre_tokenizer"].get("pretokenizers", ()))
                 if one["type"] == "ByteLevel")  # fmt: skip
    level["add_prefix_space"] = True
    spaced = Tokenizer.from_str(json.dumps(body))
    assert spaced.decode(spaced.encode("x").ids) == " x"
    mask = of(Grammars(spaced, vocab_size=VOCAB, eos=(0,)), SCHEMA)
    for token in tokenizer.encode('{"a": 12, "b": "é", "c": [null]}').ids:
        assert mask.allowed()[token]
        mask.took(token)
    assert mask.done


def test_a_model_that_never_ends_its_text_is_not_told_to(tokenizer):
    mask = of(Grammars(tokenizer, vocab_size=VOCAB, eos=()), {"type": "integer"})
    digit = tokenizer.encode("7").ids[0]
    mask.took(digit)
    assert not mask.done
    assert not mask.allowed()[0]


def test_a_plain_token_that_ends_texts_ends_them_where_the_form_is_whole(tokenizer):
    seven, comma = (tokenizer.encode(one).ids[0] for one in "7,")
    grammars = Grammars(tokenizer, vocab_size=VOCAB, eos=(0, seven))
    mask = of(grammars, {"type": "array", "items": {"type": "integer"}})
    for token in tokenizer.encode("[8").ids:
        mask.took(token)
    assert mask.allowed()[comma] and mask.allowed()[seven] and not mask.whole
    for token in (seven, *tokenizer.encode("]").ids):  # within the form it is a digit like others
        mask.took(token)
    assert mask.done
    mask = of(grammars, {"type": "integer"})
    mask.took(tokenizer.encode("8").ids[0])
    assert mask.allowed()[seven] and mask.allowed()[0] and mask.whole
    mask.took(seven)
    assert mask.done


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ends_that_a_form_needs_cut_no_form(tokenizer, temperature):
    """A model may end its texts with a quote, which JSON cannot do without: what stops is whole all the same."""
    ends = (0, *(tokenizer.encode(one).ids[0] for one in '"}1'))
    grammars, found = Grammars(tokenizer, vocab_size=VOCAB, eos=ends), []
    with Engine(make_lm(), tokenizer=tokenizer) as engine:
        for schema in ({"enum": ["a", "b"]}, SCHEMA, {"type": "object", "maxProperties": 1}, {"enum": [11, 31]}):
            drawing, mask = Drawing(temperature=temperature), of(grammars, schema)
            asked = Request((5, 9), 200, drawing, eos=ends, seed=1, mask=mask, logprobs=0)
            found.append(engine.submit(asked).result(300))
    for tokens, end in found:
        text = "".join(token.text for token in tokens)
        assert end.reason == "length" or json.loads(text) is not None, text
        assert not any(token.ends for token in tokens[:-1])
    assert [end.reason for _, end in found].count("stop") >= 2
    assert "".join(token.text for token in found[0][0]) in ('"a"', '"b"')


def test_copies_go_their_own_ways(tokenizer, grammars):
    first = of(grammars, {"enum": ["a", "b"]})
    second = first.copy()
    for token in tokenizer.encode('"a"').ids:
        first.took(token)
    assert first.done
    assert not second.done
    assert second.allowed()[tokenizer.encode('"').ids[0]]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "foo"},
        {"$ref": "http://127.0.0.1/schema.json"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "format": "weird"},
        {"enum": [str(n) * 500 for n in range(2000)]},
        {"not": {"type": "string"}},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_what_cannot_be_kept_to_is_refused(grammars, schema):
    with pytest.raises(ApiError) as found:
        of(grammars, schema)
    assert (found.value.status, found.value.param) == (400, "response_format")
