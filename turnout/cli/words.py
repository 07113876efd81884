"""Errors in the words of the command line: what a function calls ``top_k``, the user wrote as ``--top-k``.

A function names its parameters, as it must. At the border of the command line, by the function that complains, each
parameter becomes the flag that it came from, ``pass keep=2`` becomes ``pass --merge-experts 2``. ``turnout train`` and
``turnout run`` take ``field=value``, so there names stay, and values are written as a shell and JSON take them.
"""

import re
from collections.abc import Mapping

__all__ = ["in_flags"]

# The function that complains -> its parameters, and the flags that they came from.
_FLAGS: Mapping[str, Mapping[str, str]] = {
    "turnout.reshape.upcycle": {"num_experts": "--experts", "top_k": "--top-k", "granularity": "--granularity"},
    "turnout.reshape.split": {"num_experts": "--split", "top_k": "--top-k", "by": "--by"},
    "turnout.reshape.merge_experts": {"keep": "--merge-experts"},
    "turnout.reshape.compress_experts": {"rank": "--compress-experts", "rows": "--rows", "by": "--by"},
    "turnout.reshape.latent_experts": {"rank": "--latent", "share": "--share"},
    "turnout.reshape.quantize": {"bits": "--bits", "group": "--group", "codes": "--codes", "method": "--method"},
    "turnout.reshape.drop_experts": {"share": "--drop-experts"},
    "turnout.recipes.steps.Drop": {"count": "--drop-experts", "by": "--by"},
    "turnout.measure.certify": {"bound": "--bound", "names": "--map"},
    "turnout.train.data.windows": {"limit": "--limit"},
    "turnout.train": {"resume": "--resume", "resume from": "--resume"},
    "LM.generate": {"tokens": "--tokens", "temperature": "--temperature", "top_k": "--top-k"},
    "TrainConfig": {"steps": "--steps"},
    "turnout.device": {"device": "--device"},
    "turnout.models.gguf.to_gguf": {"kind": "--gguf"},
    "turnout.decide.device.layouts": {"devices": "--devices"},
    "turnout.serve.Engine": {
        "slots": "--max-running",
        "waiting": "--max-waiting",
        "cache_bytes": "--kv-memory",
        "adapters": "--lora",
    },
    "turnout.decide.device.expert_slots": {"expert_memory": "--expert-memory"},
    "turnout.decide.device.cache.Learnt": dict.fromkeys(
        ("what policies learnt", "what was learnt"), "--expert-profile"
    ),
    "turnout.models.Contrast": {"rank": "--contrast-rank"},
    "turnout.measure.audit": {name: f"--{name}" for name in ("batches", "length", "bound", "width")},
}
# Commands whose own words are ``field=value``; of what they raise only flags are put in words.
_FIELDS = {"train", "run"}
_TEXTS = (
    (re.compile(r" ?\(resume=True\)"), ""),
    (re.compile(r"resume from (\S+?)([.;,]?)$"), r"pass --resume \1\2"),
    (re.compile(r"share=[\d.]+ or more \((--drop-experts [\d.]+%)\)"), r"\1 or more"),
    (re.compile(r"[,;] turnout\.[a-z][\w.]+\)"), ")"),
)
# Of turnout convert alone: what a configuration says of few bits, elsewhere its own fields, was a flag here.
_CONVERT = (
    (re.compile(r", or batches=None"), ", or leave it out"),
    (re.compile(r"batches=\[[^\]]*\]"), "--calibration FILE"),
    (re.compile(r"\bbatches\b(?= must)"), "--calibration"),
    (re.compile(r"\bpass (?=(?:q8_0|q4_0|mxfp4)\b)"), "pass --gguf "),
    (re.compile(r"\(turnout convert --densify --gguf\)"), "(--densify)"),
    (
        re.compile(r"quantized\.group must (.+) in LMConfig; (.+) pass group=(\d+), or None for one scale a row"),
        r"--group must \1 in turnout convert; \2 pass --group \3, or --group row",
    ),
    (
        re.compile(r"quantized\.bits must (.+) in LMConfig; (.+) pass bits=8"),
        r"--bits must \1 in turnout convert; \2 pass --bits 8",
    ),
    (
        re.compile(r"parts must be of [\w, ]+ in turnout\.reshape\.quantize; got 'head', of (.+)\. Nearest fix: .+"),
        r"--head must go with an output layer of its own in turnout convert; got \1. Nearest fix: leave --head out.",
    ),
)
_TRIPLES = re.compile(r"\bone of ((?:\(\d+, \d+, \d+\)(?:, )?)+)")


def in_flags(message: str, command: str) -> str:
    """The message with parameters as the flags that they came from.

    >>> in_flags("keep must be 1 to 8 in turnout.reshape.merge_experts; got 9. Nearest fix: pass keep=8.", "convert")
    '--merge-experts must be 1 to 8 in turnout convert; got 9. Nearest fix: pass --merge-experts 8.'
    >>> in_flags("betas must be in [0, 1) in TrainConfig; got 2. Nearest fix: pass betas=(0.9, 0.95).", "train")
    'betas must be in [0, 1) in TrainConfig; got 2. Nearest fix: pass betas=[0.9,0.95].'

    Source: none; plain text.
    """
    for pattern, text in _TEXTS:
        message = pattern.sub(text, message)
    if command in _FIELDS:
        message = re.sub(r"=\((\d[\d.]*), (\d[\d.]*)\)", r"=[\1,\2]", message)
        return re.sub(r"\bor None\b", "or null", re.sub(r"=None\b", "=null", message))
    for pattern, text in _CONVERT if command == "convert" else ():
        message = pattern.sub(text, message)
    message = _TRIPLES.sub(_triples, message)
    where = next((name for name in _FLAGS if re.search(rf" in {re.escape(name)}[;:,.]? ", message)), None)
    if where is None:
        return message
    return _rename(message, _FLAGS[where]).replace(f" in {where};", f" in turnout {command};")


def _triples(found: re.Match[str]) -> str:
    triples = re.findall(r"\((\d+), (\d+), (\d+)\)", found[1])
    return " or ".join(f"--experts {e} --top-k {k} --granularity {g}" for e, k, g in triples)


def _rename(message: str, flags: Mapping[str, str]) -> str:
    for name, flag in sorted(flags.items(), key=lambda pair: -len(pair[0])):
        # A value goes behind its flag; None is to leave the flag out.
        message = re.sub(rf"(?:pass )?(?<![\w.\-]){name}=None\b|\bNone for {name}\b", f"leave {flag} out", message)
        message = re.sub(rf"(?<![\w.\-]){name}=(?=[\w.\-'])", f"{flag} ", message)
        message = re.sub(rf"(?<![\w.\-]){name}(?![\w\-=])", flag, message)
    return message.replace(", or None for one that fits the dtype", ", or leave it out")
