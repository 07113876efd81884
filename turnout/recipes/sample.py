"""Let a model in any folder, of a run, of transformers or of a conversion, go on from prompts."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from turnout.errors import DataError, UsageError, word
from turnout.models import LM, Contrast, Generated, Piece, generate
from turnout.models.ends import own_ends
from turnout.reading import read_text
from turnout.recipes.calibration import find_tokenizer
from turnout.recipes.expert_room import ExpertRoom
from turnout.recipes.models import opened
from turnout.recipes.progress import Progress, Silent
from turnout.storage import read_error
from turnout.train.data import load_tokenizer
from turnout.train.data.prompt import prompt_ids
from turnout.train.data.spaced import spaced
from turnout.train.data.tokenizer import opening_ids

__all__ = ["Sampling", "prompts_in", "sample_model", "text_ends"]

_WHERE = "turnout sample"
# How many prompts go on side by side.
_ROWS = 32
# What each setting must be: the least, the most, and one that is.
_RANGES: dict[str, tuple[float, float, str]] = {
    "tokens": (1, math.inf, "1"),
    "temperature": (0, math.inf, "1"),
    "top_k": (1, math.inf, "1"),
    "top_p": (0, 1, "0.95"),
    "min_p": (0, 1, "0.05"),
    "repetition_penalty": (1e-9, math.inf, "1.1"),
    "contrast": (0, math.inf, "0.5"),
    "contrast_alpha": (1e-9, 1, "0.1"),
    "contrast_rank": (1, math.inf, "2"),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How ``turnout sample`` goes on from a prompt.

    Args:
        tokens: how many to add; None for 100, or as many as fit into the model's longest sequence.
        eos: whether to end where the model's text ends; None for yes, where it is known how that is said.
        contrast: beta of ``turnout.models.Contrast``; None or 0 draws from the model's own scores.
        contrast_alpha: its alpha.
        contrast_rank: its rank.

    The others are those of ``turnout.generate``, and their flags.

    Raises:
        UsageError: a setting out of its range, by its flag.

    Source: none; ``turnout.generate``.
    """

    tokens: int | None = None
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    keep_stop: bool = False
    eos: bool | None = None
    seed: int = 0
    contrast: float | None = None
    contrast_alpha: float | None = None
    contrast_rank: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most, fix) in _RANGES.items():
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if value is None or (least <= value <= most and value != math.inf):
                continue
            low = "above 0" if name == "repetition_penalty" else f"of at least {least}"
            kind = "finite number" if value == math.inf else "number"
            allowed = f"be a {kind} {low}" if most == math.inf else f"be a number from {least} to {most}"
            raise _refusal(flag, value, allowed, f"pass {flag} {fix}")
        idle = next((name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None), None)
        if self.temperature == 0 and idle is not None:
            flag, got = f"--{idle.replace('_', '-')}", "--temperature 0, which takes the likeliest token"
            raise _refusal(flag, got, "go with a temperature above 0", f"leave {flag} out, or pass --temperature 0.8")
        of_none = next((n for n in ("contrast_alpha", "contrast_rank") if getattr(self, n) is not None), None)
        if not self.contrast and of_none is not None:
            flag = f"--{of_none.replace('_', '-')}"
            fix = f"add --contrast 0.5, or leave {flag} out"
            raise _refusal(flag, "no --contrast", "go with a contrast above 0", fix)
        if not all(self.stop):
            raise _refusal("--stop", "an empty text", "be a text to stop at", "leave it out")
        if self.keep_stop and not self.stop:
            fix = "add --stop TEXT, or leave --keep-stop out"
            raise _refusal("--keep-stop", "no --stop", "go with a text to stop at", fix)

    def contrasted(self) -> Contrast | None:
        """How scores are contrasted; None where they are not."""
        if not self.contrast:
            return None
        asked: dict[str, Any] = {"alpha": self.contrast_alpha, "rank": self.contrast_rank}
        return Contrast(self.contrast, **{name: value for name, value in asked.items() if value is not None})


def sample_model(
    path: str | Path,
    prompts: Sequence[str],
    asked: Sampling,
    *,
    device: str | torch.device = "auto",
    stream: Callable[[str], object] | None = None,
    progress: Progress | None = None,
    experts: ExpertRoom | None = None,
    note: Callable[[str], object] = print,
) -> tuple[str, ...]:
    """Each prompt with the model's continuation, which is the same whatever other prompts there are.

    Args:
        path: a folder of a run, of transformers, or that a conversion wrote, or a model of the hub; its own tokenizer
            is used.
        prompts: the texts to continue; an empty one starts a new document.
        asked: how.
        device: where the model runs, in the precision of its weights; the draw is the same everywhere.
        stream: is given the text of one prompt piece by piece.
        progress: is told how far it is.
        experts: how much memory the experts may take, and whose; None for as much as they need.
        note: is told what was understood of that, and at the end what came of it.

    Raises:
        TurnoutError: no model or tokenizer there, a setting out of range, a prompt that is too long, or several to
            stream.

    Source: none; ``turnout.generate``.
    """
    if stream is not None and len(prompts) != 1:
        raise _refusal("--stream", f"{len(prompts)} prompts", "be of one prompt", "leave --stream out")
    found = opened(path, _WHERE, device, experts=experts)
    for said in found.notes:
        note(said)
    tokenizer = load_tokenizer(find_tokenizer(found.folder, where=_WHERE))
    # A prompt for a model from elsewhere is opened as its tokenizer does; others have seen what opens a document.
    table = spaced(tokenizer)
    texts = [prompt_ids(prompt, tokenizer, own=found.own, table=table) for prompt in prompts]
    asked = dataclasses.replace(asked, tokens=_fitting(found.lm, texts, asked.tokens))
    ends = () if asked.eos is False else text_ends(found.lm, tokenizer, own=found.own)
    if asked.eos and not ends:
        fix = "leave --eos out, or say yourself where to end: --stop TEXT"
        raise _refusal("--eos", "one that does not say so", "be asked of a model that says how its texts end", fix)
    progress, done = progress or Silent(), [""] * len(texts)
    try:
        for rows in _together(texts):
            told = _Told(tokenizer.decode(texts[rows[0]]), stream, progress, asked.tokens or 0, len(texts) > len(rows))
            made = _made(found.lm, [texts[row] for row in rows], tokenizer, asked, ends, told)
            for place, row in enumerate(rows):
                done[row] = _said(tokenizer, texts[row], made, place)
    finally:
        progress.stop()
        if found.lm.experts is not None:
            note(f"experts: {found.lm.experts.stats()}")
            found.lm.experts.close()
    return tuple(done)


def prompts_in(path: str | Path) -> tuple[str, ...]:
    """The prompts in a file, one a line; empty lines are left out.

    Raises:
        DataError: there is none, or the file cannot be read as text.

    Source: none; plain bookkeeping.
    """

    def refuse(problem: str) -> DataError:
        fix = "write one prompt a line, in UTF-8"
        return DataError(word("--prompts", got=f"{path}: {problem}", allowed="hold text", where=_WHERE, fix=fix))

    try:
        prompts = tuple(line for line in read_text(path, refuse=refuse).splitlines() if line.strip())
    except OSError as error:
        raise read_error(error, path, _WHERE) from error
    if not prompts:
        raise refuse("no line with anything on it")
    return prompts


class _Told:
    """What is told while it goes on: the text of one prompt, or how far all are."""

    def __init__(
        self, start: str, stream: Callable[[str], object] | None, progress: Progress, tokens: int, some: bool
    ) -> None:
        self._stream, self._progress, self._tokens = stream, progress, tokens
        self._what = "tokens of some prompts" if some else "tokens"
        if stream is not None:
            stream(start)

    def __call__(self, piece: Piece) -> None:
        if self._stream is not None:
            self._stream(piece.text_B[0])
        self._progress.part(self._what, piece.step + 1, self._tokens)


def _made(
    lm: LM, texts: Sequence[Sequence[int]], tokenizer: Tokenizer, asked: Sampling, ends: Sequence[int], told: _Told
) -> Generated:
    """What follows each prompt."""
    return generate(
        lm,
        texts,
        tokens=asked.tokens or 0,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        eos=ends,
        stop=asked.stop,
        keep_stop=asked.keep_stop,
        tokenizer=tokenizer,
        seed=asked.seed,
        stream=told,
        contrast=asked.contrasted(),
    )


def _said(tokenizer: Tokenizer, text: Sequence[int], made: Generated, row: int) -> str:
    """A prompt and what follows it, read as one: bytes that make no character spoil those beside them."""
    if made.why_B[row] == "stop" and made.text_B is not None:
        return tokenizer.decode(text) + made.text_B[row]
    return tokenizer.decode([*text, *made.rows[row]])


def _together(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Which prompts go on side by side: of like lengths, and all copies of one, which are told apart by their order."""
    rows: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: (len(texts[row]), texts[row])):
        if len(rows) >= _ROWS and texts[row] != texts[rows[-1]]:
            yield rows
            rows = []
        rows.append(row)
    yield rows


def _fitting(lm: LM, texts: Sequence[Sequence[int]], tokens: int | None) -> int:
    """How many tokens to add."""
    most, config = max(max(ids) for ids in texts), lm.config
    if most >= config.vocab_size:
        got = f"the token {most} of a vocabulary of {config.vocab_size}"
        raise _refusal("the tokenizer", got, "be the model's own", "put the model's tokenizer.json beside it")
    longest = max(map(len, texts))
    room = config.max_seq - longest
    one = "the prompt" if len(texts) == 1 else "the longest prompt"
    if room < 1:
        got, allowed = f"{longest} tokens in it", f"leave room: the model takes {config.max_seq} tokens in all"
        what = one if len(texts) == 1 else f"{one}, number {[*map(len, texts)].index(longest) + 1} of {len(texts)},"
        raise _refusal(what, got, allowed, f"shorten it to at most {config.max_seq - (tokens or 1)} tokens")
    if tokens is not None and tokens > room:
        allowed = f"be at most {room}: the model takes {config.max_seq}, and {one} has {longest}"
        raise _refusal("--tokens", tokens, allowed, f"pass --tokens {room}")
    return tokens or min(100, room)


def text_ends(lm: LM, tokenizer: Tokenizer, *, own: bool) -> tuple[int, ...]:
    """The tokens that end a text; in what turnout trained on, that is what opens the next."""
    opens = opening_ids(tokenizer, needed=False)[:1] if own else ()
    return tuple(dict.fromkeys((*opens, *(end for end in own_ends(lm) if end < lm.config.vocab_size))))


def _refusal(what: str, got: object, allowed: str, fix: str) -> UsageError:
    return UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))
