"""The text of a row as it comes: whole characters, no stop, and in all what the tokenizer says of its tokens."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from turnout.models.pieces import Pieces

TEXTS = [
    "the cat, the dogs and 42",
    " é 例え🙂🙂 x\n\n y",
    "<|end|>ab<|end|>",
    "",
    " ",
    "\ufffda\ufffd",  # what a decoder writes for broken bytes, written on purpose
]


def byte_level() -> Tokenizer:
    """As GPT-2's: every byte a token, some pairs; one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "c"), ("a", "t"), ("Ġc", "at"), ("Ġ", "d"), ("Ã", "©")]
    names = [*alphabet, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2's: ▁ for a space, and one before a text; <0xE4> for bytes."""
    letters = sorted({*"▁the catdogsn42x,y\né"} - {" "})
    names = [*letters, "▁c", "at", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, [("▁", "c"), ("a", "t")], byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT's: ## goes on within a word."""
    names = ["[UNK]", "the", "cat", "##s", "dog", ",", "and", "4", "##2", "a", "##b", "x", "y"]
    tokenizer = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


KINDS = {"bytes": byte_level, "sentence piece": sentence_piece, "word piece": word_piece}


def said(tokenizer: Tokenizer, prompt: list[int], ids: list[int], **settings) -> tuple[list[str], bool]:
    pieces = Pieces(tokenizer, prompt, **settings)
    found = []
    for token in ids:
        found.append(pieces.add(token))
        if pieces.stopped:
            break
    found.append(pieces.end())
    assert pieces.text == "".join(found)
    return found, pieces.stopped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    prompt, ids = tokenizer.encode("the cat").ids, tokenizer.encode(" the cat" + text).ids[2:]
    found, _ = said(tokenizer, prompt, ids)
    assert tokenizer.decode(prompt) + "".join(found) == tokenizer.decode([*prompt, *ids])
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_at_all(kind: str) -> None:
    """Bytes that are no characters too: nothing is lost, nothing is said twice.

    Of broken bytes the decoder of sentence piece breaks the whole ones before them, too, which were said by then.
    """
    tokenizer, chance = KINDS[kind](), random.Random(0)
    for _ in range(40):
        prompt = tokenizer.encode("the cat").ids
        ids = [chance.randrange(tokenizer.get_vocab_size()) for _ in range(chance.randrange(12))]
        found, _ = said(tokenizer, prompt, ids)
        whole = tokenizer.decode([*prompt, *ids])
        if kind != "sentence piece" or "\ufffd" not in whole:
            assert tokenizer.decode(prompt) + "".join(found) == whole, (prompt, ids)


def test_a_prompt_may_end_within_a_character() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("例え").ids
    assert "".join(said(tokenizer, ids[:1], ids[1:])[0]) == "例え"


@pytest.mark.parametrize("kind", ["bytes", "sentence piece"])
def test_what_is_broken_in_a_prompt_is_no_part_of_its_answer(kind: str) -> None:
    tokenizer = KINDS[kind]()
    name = "\u0142" if kind == "bytes" else "<0xE4>"  # a byte that begins a character, here none
    broken, more = tokenizer.token_to_id(name), tokenizer.encode("cat").ids
    for prompt in ([broken], [*more, broken, broken], tokenizer.encode("x\ufffd\ufffd").ids):
        for ids in (more, [broken, *more]):
            found = "".join(said(tokenizer, prompt, ids)[0])
            assert tokenizer.decode(prompt) + found == tokenizer.decode([*prompt, *ids])


@pytest.mark.parametrize("keep", [False, True])
def test_a_plain_token_that_ends_a_text_is_none_of_it(keep: bool) -> None:
    tokenizer = byte_level()
    *ids, last = tokenizer.encode("the cat").ids
    pieces = Pieces(tokenizer, tokenizer.encode("x").ids, stop=["zz"], keep_stop=keep)
    found = [*map(pieces.add, ids), pieces.add_end(last)]
    assert "".join(found) == tokenizer.decode([*ids, last] if keep else ids) == pieces.text
    broken = tokenizer.encode("é🙂").ids[:-1]
    pieces = Pieces(tokenizer, [], stop=["zz"])
    assert "".join([*map(pieces.add, broken), pieces.add_end(last)]) == "é\ufffd"


def stopped(text: str, stop: list[str], keep: bool = False) -> str | None:
    """What is said of the text, the same in one token after another as in whole."""
    tokenizer = byte_level()
    prompt, ids = tokenizer.encode("x").ids, tokenizer.encode(text).ids
    found, whether = said(tokenizer, prompt, ids, stop=stop, keep_stop=keep)
    assert not any(one in "".join(found) for one in stop) or keep
    return "".join(found) if whether else None


def test_stops_are_found_across_tokens() -> None:
    assert stopped("the cat, the dogs", [" cat"]) == "the"  # a token
    assert stopped("the cat, the dogs", ["e ca"]) == "th"  # from within one to within the next
    assert stopped("the cat, the dogs", ["hat", "dogz", ", t"]) == "the cat"
    assert stopped("the cat, the dogs", ["e ca"], keep=True) == "the ca"
    assert stopped("the cat, the dogs", ["dogz"]) is None
    assert stopped("aab", ["ab"]) == "a"  # a beginning that comes to nothing, and begins again within itself
    assert stopped("aaaab", ["aab"]) == "aa"
    assert stopped("é🙂x", ["🙂"]) == "é"
    assert stopped("abc", ["abc", "b"]) == "a"  # the first to be complete
    assert stopped("abc", ["c", "bc"]) == "a"  # of those the longest
    assert stopped("x\n\ny", ["\n\n"]) == "x"


def test_what_may_become_a_stop_is_held_back() -> None:
    tokenizer = byte_level()
    pieces = Pieces(tokenizer, tokenizer.encode("x").ids, stop=["##END"])
    given = [pieces.add(token) for token in tokenizer.encode("a##EN##").ids]
    assert given == ["a", "", "", "", "", "##EN", ""]
    assert pieces.end() == "##" and not pieces.stopped


def test_the_prompt_is_no_part_of_a_stop() -> None:
    tokenizer = byte_level()
    assert said(tokenizer, tokenizer.encode("EN").ids, tokenizer.encode("D END").ids, stop=["END"]) == (
        ["D", " ", "", "", "", ""],
        True,
    )


@pytest.mark.parametrize("keep", [False, True])
def test_special_tokens_stop_by_name(keep: bool) -> None:
    """Their text is otherwise left out."""
    tokenizer = byte_level()
    ids = [*tokenizer.encode("the cat").ids, tokenizer.token_to_id("<|end|>"), *tokenizer.encode("x").ids]
    found, whether = said(tokenizer, ids[:1], ids[1:], stop=["<|end|>"], keep_stop=keep)
    assert whether and "".join(found) == " cat" + ("<|end|>" if keep else "")
    assert "".join(said(tokenizer, ids[:1], ids[1:])[0]) == " catx"
    # A text that stood half complete before it is no stop.
    found, whether = said(tokenizer, ids[:1], ids[1:], stop=["<|end|>", "catx"], keep_stop=keep)
    assert whether and "".join(found) == " cat" + ("<|end|>" if keep else "")
