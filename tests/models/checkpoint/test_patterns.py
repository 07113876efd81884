"""Patterns from a file: as ``re`` matches them, and never for long."""

import random
import re

import pytest

from turnout.models.checkpoint.patterns import Hard, Patterns

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.k_proj",
    "model.layers.1.mlp.down_proj",
    "model.visual.layers.1.attn.qkv",
    "lm_head",
    "q_proj",
    "xq_proj",
    "layers-1",
    "a.b\n",
    "",
]
PATTERNS = [
    "q_proj",
    "layers.1.mlp.down_proj",
    r"layers\.1\.mlp\.down_proj",
    "^model.layers.0.self_attn.q_proj",
    "^q_proj$",
    "proj",
    "self_attn.*",
    r".*\.(q|k|v)_proj",
    r"model\.layers\.(0|1)\..*",
    r"layers\.\d+\.self_attn\.[qk]_proj",
    r"layers\.(?:[0-9]|1[0-9])\.mlp\.\w+",
    r"(?:.*?(?:language|text|layers).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
    "[^.]*_proj",
    "x?q_proj",
    r"(a*)*q_proj",
    r"a.b$",
    r"\Aq_proj\Z",
    r"\bq_proj\b",
    r"q_\Bproj",
    "",
    "a)|(q_proj",
    "lm.head",
    r"(x|q_proj){1,2}?",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_as_re_matches_them(pattern):
    patterns = Patterns()
    for name in NAMES:
        assert patterns.ends(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name)), name
        try:
            wanted = bool(re.fullmatch(pattern, name))
        except re.error:
            with pytest.raises(Hard, match="no regular expression"):
                patterns.whole(pattern, name)
            continue
        assert patterns.whole(pattern, name) == wanted, name


def test_random_patterns_as_re_matches_them():
    for seed in range(300):
        chance = random.Random(seed)

        def grow(depth: int, chance: random.Random = chance) -> str:
            kind = chance.randrange(9 if depth else 4)
            if kind < 4:
                return chance.choice(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\b", "^", "$"])
            inner = "".join(grow(depth - 1) for _ in range(chance.randint(1, 3)))
            if kind < 6:
                return f"({inner}|{grow(depth - 1)})"
            return f"(?:{inner})" + chance.choice(["*", "+", "?", "{2}", "{1,2}", "*?", "{2,}?"])

        pattern = "".join(grow(2) for _ in range(3))
        patterns = Patterns()
        for _ in range(20):
            name = "".join(chance.choice("ab.") for _ in range(chance.randint(0, 7)))
            assert patterns.ends(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name)), (seed, pattern, name)
            assert patterns.whole(pattern, name) == bool(re.fullmatch(pattern, name)), (seed, pattern, name)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", "[", "*", "(?P<x", r"(a)\1", "(?=a)a", "(?<!a)b", "(?i)a", "(?i:a)", "(?>a)", "a*+"),
        *("a{99999}", "(a{500}){500}", "a{4294967295}"),
        *("(" * 3000 + ")" * 3000, "a" * 30_000, "[" + "ab" * 15_000 + "]"),
    ],
    ids=lambda pattern: pattern[:12],
)
def test_what_is_not_known_to_end_is_refused(pattern):
    with pytest.raises(Hard):
        Patterns().whole(pattern, "a")


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*a){12}b", "(a*)*b", "((){9999}){9999}", "(a?){200}b"])
def test_repeats_of_repeats_end(pattern):
    patterns = Patterns()
    assert not patterns.ends(pattern, "a" * 60) and not patterns.whole(pattern, "a" * 60)
    assert patterns.steps > 0


def test_the_work_is_bounded():
    patterns = Patterns(steps=10_000)
    with pytest.raises(Hard, match="too long"):
        for _ in range(1000):
            patterns.ends("(a|b|c|.)*d", "abcabcabc")
