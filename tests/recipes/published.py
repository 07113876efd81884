"""Tokenizers in the styles of published families, as their tokenizer.json says it, with small vocabularies."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 420
TEXTS = [f"line {n}: the cat, it's {n * 7} déjà vu  and\n\tmore of the same: Hello\n" for n in range(40)]
_MARK = "▁"
_TO_SPACE = {"type": "Replace", "pattern": {"String": _MARK}, "content": " "}
_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
_BYTES = [{"type": "ByteFallback"}, {"type": "Fuse"}]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_LEGACY = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _MARK}, _TO_MARK]},
    "pre_tokenizer": None,
    "decoder": {"type": "Sequence", "decoders": [_TO_SPACE, *_BYTES, _STRIP]},
}
_METASPACE = {
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": _MARK, "prepend_scheme": "first", "split": False},
    "decoder": {"type": "Sequence", "decoders": [_TO_SPACE, *_BYTES, _STRIP]},
}
_GEMMA = {
    "normalizer": _TO_MARK,
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
    "decoder": {"type": "Sequence", "decoders": [_TO_SPACE, *_BYTES]},
}
# Each family: how it reads and writes, its special tokens, and which of them it puts before a text.
STYLES: dict[str, tuple[dict[str, Any], tuple[str, ...], str | None]] = {
    "llama2": (_LEGACY, ("<unk>", "<s>", "</s>"), "<s>"),
    "mistral": (_METASPACE, ("<unk>", "<s>", "</s>"), "<s>"),
    "phi3": (_LEGACY, ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>"), None),
    "gemma": (_GEMMA, ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"), "<bos>"),
    "llama3": ({}, ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), "<|begin_of_text|>"),
}
SPACED = tuple(style for style in STYLES if style != "llama3")


def published(style: str) -> dict[str, Any]:
    """The tokenizer.json of a style."""
    parts, special, first = STYLES[style]
    body = _bytes_bpe(special) if style == "llama3" else _spaced_bpe(special, style)
    body |= parts
    if first is not None:
        number = body["model"]["vocab"].get(first, next(t["id"] for t in body["added_tokens"] if t["content"] == first))
        pieces = [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {"type": "TemplateProcessing", "single": pieces, "pair": [*pieces, *pieces[1:]]}
        template["special_tokens"] = {first: {"id": first, "ids": [number], "tokens": [first]}}
        body["post_processor"] = template
        if style == "llama3":
            byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
            body["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
    return body


def write(folder: Path, style: str) -> Tokenizer:
    """Puts it into a folder, with what transformers needs beside it."""
    _, special, first = STYLES[style]
    (folder / "tokenizer.json").write_text(json.dumps(published(style)))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"bos_token": first} if first else {}
    config["eos_token"] = special[2] if "</s>" in special else special[1]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _added(special: tuple[str, ...]) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": number, "content": token, **plain} for number, token in enumerate(special)]


def _spaced_bpe(special: tuple[str, ...], style: str) -> dict[str, Any]:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=110, show_progress=False, min_frequency=2))
    learnt = json.loads(trained.to_str())["model"]
    lost = {"é", "\n", "\t"}  # to be written in bytes
    merges = [pair for pair in learnt["merges"] if not lost & set("".join(pair))]
    marks = [_MARK * 2, _MARK * 3]
    merges += [[_MARK, _MARK], [_MARK * 2, _MARK]]
    kept = [t for t in learnt["vocab"] if t not in lost and (len(t) == 1 or any("".join(m) == t for m in merges))]
    tokens = [*special, *(f"<0x{n:02X}>" for n in range(256)), *kept, *(t for t in marks if t not in kept)]
    added = _added(special)
    if style == "gemma":  # it lists newlines, and runs of ▁, among its added tokens
        tokens += ["\n\n"]
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        added += [{"id": tokens.index(token), "content": token, **plain} for token in ("\n\n", _MARK * 2)]
        added.sort(key=lambda token: token["id"])
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    model |= {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}
    base = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    return base | {"added_tokens": added, "model": model}


def _bytes_bpe(special: tuple[str, ...]) -> dict[str, Any]:
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return json.loads(made.to_str())
