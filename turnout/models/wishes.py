"""What a model's generation configuration asks for and a generation does not do: said, not passed over."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from turnout.models.draw import Drawing
from turnout.reading import read_json

__all__ = ["own_wishes", "say_unmet"]

# Settings of transformers that change what is likeliest, or where a text ends, and the values that change nothing.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (1,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "num_beams": (1,),
    "stop_strings": ([],),
    "watermarking_config": (),
}
# Those that count where tokens are drawn, and only where drawing is asked for.
_DRAWN: dict[str, tuple[Any, ...]] = {
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
# Those that are arguments of ``turnout.generate`` too, and what leaves them out.
_OURS: dict[str, tuple[Any, ...]] = {"temperature": (1,), "top_k": (0,), "top_p": (1,), "min_p": (0,)}


def own_wishes(model: nn.Module) -> dict[str, Any]:
    """The settings of a model's generation configuration, those that are set; none where it has none.

    Args:
        model: one of transformers, or one of ours, of which the folder that it was read from says it.

    Raises:
        CheckpointError: the folder's generation_config.json is not JSON.

    >>> own_wishes(nn.Identity())
    {}

    Source: none; ``GenerationConfig`` of transformers.
    """
    kept, folder = getattr(model, "wishes", None), getattr(model, "origin", None)
    if kept:
        return kept
    found: dict[str, Any] = {}
    if isinstance(folder, Path):
        file = folder / "generation_config.json"
        found = read_json(file) if file.is_file() else {}
    elif (its := getattr(model, "generation_config", None)) is not None:
        found = vars(its)
    known = (*_FOREIGN, *_DRAWN, *_OURS, "repetition_penalty", "do_sample")
    return {name: found[name] for name in known if found.get(name) is not None}


def say_unmet(wishes: dict[str, Any], drawing: Drawing, where: str) -> None:
    """Warns of what a generation configuration asks for and is not done.

    That is what nothing here does, and what is an argument here and was left out: the repetition penalty, and, where
    the configuration says to draw and the call draws with none of its own, temperature, top-k, top-p and min-p.

    Args:
        wishes: of ``own_wishes``.
        drawing: what was asked for.
        where: the function that was asked, for the warning.

    >>> say_unmet({"no_repeat_ngram_size": 0}, Drawing(), "here")

    Source: none; plain bookkeeping.
    """
    draws = drawing.temperature > 0
    plain = drawing == Drawing(where=drawing.where)
    foreign = _FOREIGN | (_DRAWN if draws and wishes.get("do_sample") else {})
    ours: dict[str, tuple[Any, ...]] = {"repetition_penalty": (1,)} if drawing.repetition_penalty == 1 else {}
    ours |= _OURS if draws and plain and wishes.get("do_sample") else {}
    undone, left = (
        [f"{name}={wishes[name]!r:.60}" for name, idle in some.items() if name in wishes and wishes[name] not in idle]
        for some in (foreign, ours)
    )
    if not undone and not left:
        return
    fix = f"pass {', '.join(left)}" if left else "call the model's own generate where that matters"
    text = f"{where} does not do {' and '.join([*undone, *left])}, which the model's generation configuration asks for"
    warnings.warn(f"{text}. Nearest fix: {fix}.", UserWarning, stacklevel=4)
