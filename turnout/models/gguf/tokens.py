"""The tokenizer of a GGUF file, out of tokenizer.json: byte-level BPE, and BPE of SentencePiece's kind."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turnout.errors import UsageError, word
from turnout.models.checkpoint.own import read_json
from turnout.reading import TOKENIZER_BYTES, parse_json, read_text

__all__ = ["add_no_tokenizer", "add_tokenizer"]

_WHERE = "GGUF"
_FIX = "leave it out (--no-tokenizer): the file then takes and gives token ids alone"
# How llama.cpp numbers the kinds of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE = range(1, 7)
_BYTES = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut into words: what tokenizer.json says, whether whole words are looked up first -> llama.cpp's name.
CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((_SHORT + r"\p{N}" + _TAIL, "bytes"), False): "qwen2",
    ((_SHORT + r"\p{N}{1,3}" + _TAIL, "bytes"), False): "dbrx",
    ((_SHORT + r"\p{N}{1,3}" + _TAIL, "bytes"), True): "llama-bpe",
    ((_CASED, "bytes"), False): "gpt-4o",
}


@dataclasses.dataclass(frozen=True)
class _Tokens:
    texts: list[str]
    kinds: list[int]


def add_no_tokenizer(writer: Any) -> list[str]:
    """Says that the file has none; nothing else is to be known of it."""
    writer.add_tokenizer_model("no_vocab")
    return []


def add_tokenizer(writer: Any, folder: Path | None, vocab_size: int) -> list[str]:
    """Adds the tokenizer of a folder.

    Args:
        writer: ``gguf.GGUFWriter``.
        folder: that holds its tokenizer.json.
        vocab_size: of the model; tokens that the tokenizer lacks are written as unused ones.

    Returns:
        What is to be known of it.

    Raises:
        UsageError: there is none, or one that llama.cpp reads in another way; says which part.
    """
    if folder is None or not (folder / "tokenizer.json").is_file():
        got = "a model without one" if folder is None else f"none in {folder}"
        raise _refusal(got, "stand beside the model as tokenizer.json")

    def refuse(problem: str) -> UsageError:
        return _refusal(problem, "be a sound tokenizer.json")

    body = parse_json(read_text(folder / "tokenizer.json", refuse=refuse, limit=TOKENIZER_BYTES), refuse)
    model = body.get("model") or {}
    if model.get("type") != "BPE" or model.get("dropout"):
        raise _refusal(
            f"of the kind {model.get('type')!r}" + (" with dropout" if model.get("dropout") else ""), "be BPE"
        )
    spaced = bool(model.get("byte_fallback"))
    tokens = _tokens(body, vocab_size, spaced)
    said = _spaced(writer, body, tokens) if spaced else _byte_level(writer, body)
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.kinds)
    _add_special(writer, body, folder, tokens)
    return said


def _refusal(got: str, allowed: str) -> UsageError:
    return UsageError(word("the tokenizer", got=got, allowed=allowed, where=_WHERE, fix=_FIX))


def _tokens(body: Mapping[str, Any], vocab_size: int, spaced: bool) -> _Tokens:
    model, added = body["model"], body.get("added_tokens") or []
    by_id = {number: text for text, number in model["vocab"].items()}
    kinds = dict.fromkeys(by_id, _NORMAL)
    if spaced:
        kinds |= {number: _BYTE for number, text in by_id.items() if _BYTES.fullmatch(text)}
    for token in added:
        number, text = token["id"], token["content"]
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise _refusal(f"with the token {text!r}, which takes the spaces beside it", "take no text around a token")
        by_id[number], kinds[number] = text, _CONTROL if token.get("special") else _OWN
    if model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = _UNKNOWN
    last = max(by_id, default=-1)
    if last >= vocab_size:
        raise _refusal(f"with {last + 1} tokens", f"have no more than the model's {vocab_size}")
    texts = [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    return _Tokens(texts, [kinds.get(number, _UNUSED) for number in range(vocab_size)])


def _parts(node: Any, inside: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, of one or of a sequence."""
    if not node:
        return []
    return list(node[inside]) if node.get("type") == "Sequence" else [node]


def _byte_level(writer: Any, body: Mapping[str, Any]) -> list[str]:
    """How llama.cpp is to cut and merge a text whose bytes are written as GPT-2 does."""
    forms = [part["type"] for part in _parts(body.get("normalizer"), "normalizers")]
    if set(forms) - {"NFC"}:
        raise _refusal(f"with the normalizer {', '.join(forms)}", "change no text, or by NFC alone")
    cuts = tuple(_cut(part) for part in _parts(body.get("pre_tokenizer"), "pretokenizers"))
    name = CUTS.get((cuts, bool(body["model"].get("ignore_merges"))))
    if name is None:
        raise _refusal(f"that cuts texts by {', '.join(map(repr, cuts)) or 'nothing'}", "cut them in a way known here")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in body["model"]["merges"]]
    writer.add_token_merges(merges)
    return ["llama.cpp does not bring texts into the form NFC, which the tokenizer does"] if forms else []


def _cut(part: Mapping[str, Any]) -> str:
    """One step of cutting, in a word; a pattern by itself."""
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "gpt2" if part.get("use_regex", True) else "bytes"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return part["pattern"].get("Regex") or repr(part["pattern"])
    return repr(dict(part))


def _spaced(writer: Any, body: Mapping[str, Any], tokens: _Tokens) -> list[str]:
    """How llama.cpp is to merge a text whose spaces are written as ▁: by the score of what comes out."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    prefix = _prefix(body)
    writer.add_add_space_prefix(prefix)
    vocabulary, score = body["model"]["vocab"], [-1e6] * len(tokens.texts)
    ranks: dict[str, list[int]] = {}
    for rank, pair in enumerate(body["model"]["merges"]):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        ranks.setdefault(left + right, []).append(rank)
    for text, found in ranks.items():
        if found[-1] - found[0] >= len(found):
            got = f"with merges into {text!r} that lie apart"
            raise _refusal(got, "merge in the order of what comes out, as SentencePiece does")
        score[vocabulary[text]] = -float(found[0])
    writer.add_token_scores(score)
    swallows = any(part["type"] == "Metaspace" for part in _parts(body.get("pre_tokenizer"), "pretokenizers"))
    return ["of a text that begins with a space llama.cpp makes one token ▁ more"] if swallows and prefix else []


def _prefix(body: Mapping[str, Any]) -> bool:
    """Whether a ▁ is put before a text; refuses other changes to it."""
    normal = [dict(part) for part in _parts(body.get("normalizer"), "normalizers")]
    cuts = [dict(part) for part in _parts(body.get("pre_tokenizer"), "pretokenizers")]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if normal == [{"type": "Prepend", "prepend": "▁"}, replace] and not cuts:
        return True
    if normal == [replace] and cuts in ([], [split]):
        return False
    if not normal and len(cuts) == 1 and cuts[0]["type"] == "Metaspace" and not cuts[0].get("split", True):
        if cuts[0].get("prepend_scheme") in ("first", "never") and cuts[0].get("replacement") == "▁":
            return cuts[0]["prepend_scheme"] == "first"
    kinds = ", ".join(part["type"] for part in (*normal, *cuts)) or "nothing"
    raise _refusal(f"that writes spaces by {kinds}", "write them as ▁, in a way known here")


def _add_special(writer: Any, body: Mapping[str, Any], folder: Path, tokens: _Tokens) -> None:
    """The tokens that begin and end a text, what is put around it, and the template of chats."""
    number_of = {text: number for number, text in enumerate(tokens.texts)}
    settings = read_json(folder / "tokenizer_config.json", _WHERE) if _there(folder, "tokenizer_config.json") else {}
    keys = read_json(folder / "config.json", _WHERE) if _there(folder, "config.json") else {}
    before, after = _around(body)
    found: dict[str, int | None] = {}
    for name in ("bos", "eos", "unk", "pad"):
        said = settings.get(f"{name}_token")
        text = said.get("content") if isinstance(said, dict) else said
        number = number_of.get(text) if isinstance(text, str) else None
        if number is None and isinstance(keys.get(f"{name}_token_id"), int):
            number = keys[f"{name}_token_id"]
        found[name] = number
    found |= {name: number for name, number in (("bos", before), ("eos", after)) if number is not None}
    ends = [text for text in ("<|endoftext|>",) if text in number_of and tokens.kinds[number_of[text]] == _CONTROL]
    if found["eos"] is None and ends:
        found["eos"] = number_of[ends[0]]
    for name, number in found.items():
        if number is not None and 0 <= number < len(tokens.texts):
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(before is not None)
    writer.add_add_eos_token(after is not None)
    template = settings.get("chat_template")
    if _there(folder, "chat_template.jinja"):
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _there(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _around(body: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The special tokens that the tokenizer puts before and behind a text."""
    for part in _parts(body.get("post_processor"), "processors"):
        if part["type"] == "ByteLevel":
            continue
        if part["type"] != "TemplateProcessing":
            raise _refusal(f"with the post-processor {part['type']}", "put one token before or behind a text, or none")
        kinds = [next(iter(item)) for item in part["single"]]
        at = kinds.index("Sequence")
        if at > 1 or len(kinds) - at > 2:
            raise _refusal(f"that puts {len(kinds) - 1} tokens around a text", "put one on a side, or none")
        ids = [
            part["special_tokens"][item["SpecialToken"]["id"]]["ids"][0] if "SpecialToken" in item else None
            for item in part["single"]
        ]
        return (ids[0] if at else None), (ids[-1] if len(kinds) - at > 1 else None)
    return None, None
