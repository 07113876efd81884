"""Look at a model in any folder, of a run, of transformers or of a conversion: continue a prompt, measure on a text."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from turnout.errors import DataError, UsageError, word
from turnout.hub import located
from turnout.measure import entropy, hardware, max_vio
from turnout.models import LM
from turnout.models.checkpoint.own import ORIGIN, read_json
from turnout.models.placed import placed
from turnout.recipes.calibration import find_tokenizer, whole_text
from turnout.recipes.certify import model_folder, open_model
from turnout.recipes.held_out import measured
from turnout.train.data import load_tokenizer
from turnout.train.data.spaced import spaced
from turnout.train.data.tokenizer import opening_ids, own_opening
from turnout.types import Report
from turnout.types.device import shown

__all__ = ["evaluate_model", "sample_model", "trained_here"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Opened:
    """A model, its name and folder, and whether turnout made it up: then a prompt begins as its documents did."""

    lm: LM
    name: str
    folder: Path
    own: bool


def _open(path: str | Path, where: str, device: str | torch.device) -> _Opened:
    found = located(path, where=where)
    folder = model_folder(found.folder, where=where)
    lm, _ = open_model(folder)
    return _Opened(placed(lm.eval(), device), found.name, folder, trained_here(folder))


def sample_model(
    path: str | Path,
    *,
    prompt: str,
    tokens: int | None,
    temperature: float,
    top_k: int | None,
    seed: int,
    device: str | torch.device = "auto",
) -> str:
    """The prompt and the model's continuation.

    Args:
        path: a run folder, one of transformers, or one that a conversion wrote, or a model of the hub; its own
            tokenizer is used.
        prompt: the text to continue; empty starts a new document.
        tokens: how many tokens to add; None for 100, or as many as fit into the model's longest sequence.
        temperature: 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens; None among all.
        seed: of the draw.
        device: where the model runs, in the precision of its weights; the draw is the same everywhere.

    Raises:
        TurnoutError: no model or tokenizer there, a setting out of range, or a prompt that is too long.

    Source: none; ``LM.generate``.
    """
    for name, value, least in (("--tokens", tokens, 1), ("--temperature", temperature, 0), ("--top-k", top_k, 1)):
        if value is not None and not least <= value < math.inf:
            raise _refusal(name, value, f"be a number of at least {least}", f"pass {name} {max(least, 1)}")
    opened = _open(path, "turnout sample", device)
    tokenizer = load_tokenizer(find_tokenizer(opened.folder, where="turnout sample"))
    # A prompt for a model from elsewhere is opened as its tokenizer does; others have seen what opens a document.
    ids = _prompt(prompt, tokenizer, own=opened.own)
    config = opened.lm.config
    if max(ids) >= config.vocab_size:
        got = f"the token {max(ids)} of a vocabulary of {config.vocab_size}"
        raise _refusal("the tokenizer", got, "be the model's own", "put the model's tokenizer.json beside it")
    room = config.max_seq - len(ids)
    if room < 1:
        got, allowed = f"{len(ids)} tokens", f"leave room: the model takes {config.max_seq}"
        raise _refusal("--prompt", got, allowed, "give a shorter one")
    if tokens is not None and tokens > room:
        allowed = f"be at most {room}: the model takes {config.max_seq}, and the prompt has {len(ids)}"
        raise _refusal("--tokens", tokens, allowed, f"pass --tokens {room}")
    generator = torch.Generator().manual_seed(seed)
    made = opened.lm.generate(
        torch.tensor([ids]).to(opened.lm.embedding.device),
        tokens=tokens or min(100, room),
        temperature=temperature,
        top_k=top_k,
        generator=generator,
    )
    return tokenizer.decode(made[0].tolist(), skip_special_tokens=True)


def evaluate_model(
    path: str | Path,
    *,
    domains: Mapping[str, Sequence[str]],
    limit: int | None = None,
    trace: str | Path | None = None,
    device: str | torch.device = "auto",
) -> Report:
    """Bits per byte, and the load of experts, of a model in any folder on a text; its own tokenizer reads it.

    Documents, each opened by the tokenizer's own BOS or its separator, follow each other in rows of up to 1024 tokens;
    all tokens of the text are predicted but the first of a row. A tokenizer must tell where each token lies.

    Args:
        path: a folder of transformers, one that a conversion wrote, or one of turnout's own models; or its name on
            the hub.
        domains: the text, by domain.
        limit: about how many tokens to read of each domain; None takes all.
        trace: must be None: routings are recorded of runs only.
        device: where the model runs, in the precision of its weights.

    Raises:
        TurnoutError: no model or tokenizer there, or no text.

    Source: Gao et al., 2020, "The Pile", for bits per byte.
    """
    where = "turnout eval"
    if not domains:
        fix = "add --data PATH with text to measure on"
        raise _refusal("--data", "nothing", "name a text where the folder is no run with its own,", fix, where)
    if trace is not None:
        raise _refusal("--trace", trace, "be asked of a run of turnout train", "leave it out", where)
    if limit is not None and limit < 2:
        raise _refusal("--limit", limit, "be at least 2 tokens", "pass --limit 10000, or leave it out", where)
    opened = _open(path, where, device)
    config, values, tokens, size, nats = opened.lm.config, {}, 0, 0, 0.0
    loads: list[tuple[int, list[list[float]]]] = []
    skipped = 0
    for name, sources in domains.items():
        text = whole_text(list(sources), opened.folder, config=config, limit=limit)
        found = measured(opened.lm, text)
        if found is None:
            got = f"{name}, of which no token can be predicted"
            raise DataError(word("the text", got=got, allowed="hold text", where=where, fix="name more of it"))
        predicted = sum(int(text_BS.sum()) for text_BS in text.predicted)
        values[f"bits_per_byte/{name}"] = found["bits_per_byte"]
        tokens, size, skipped = tokens + predicted, size + text.held_out_bytes, skipped + text.skipped
        nats += found["bits_per_byte"] * text.held_out_bytes
        loads.append((predicted, found["load"]))
    values = {"bits_per_byte": nats / size, **values, "tokens": tokens, "bytes": size}
    if loads[0][1]:
        share_LE = sum(weight / tokens * torch.tensor(load, dtype=torch.float64) for weight, load in loads)
        assert isinstance(share_LE, torch.Tensor)
        values["max_vio"] = sum(map(max_vio, share_LE)) / len(share_LE)
        values["entropy"] = sum(map(entropy, share_LE)) / len(share_LE)
    notes = ("in rows of up to 1024 tokens, documents one after the other",)
    notes += (f"left out {skipped} files or rows that cannot be read as text",) if skipped else ()
    context = {"run": opened.name, "device": shown(opened.lm.embedding.device), "hardware": hardware()}
    return Report(f"the model in {opened.name}", values, notes, context)


def trained_here(folder: Path) -> bool:
    """Whether turnout trained the model in this folder: then every document that it saw began with the separator.

    It did not where the folder is of transformers, or a conversion wrote it from one. A run that began with such a
    model keeps that model's files too, but in a run folder the model is what was trained.
    """
    body = read_json(folder / "config.json", "turnout")
    if "model_type" in body or "architectures" in body:
        return False
    if folder.name == "model" and (folder.parent / "run.json").is_file():
        return True
    before = folder / ORIGIN / "config.json"
    return not before.is_file() or "model_type" not in read_json(before, "turnout")


def _prompt(prompt: str, tokenizer: Tokenizer, *, own: bool) -> list[int]:
    table = spaced(tokenizer)
    ids = (
        tokenizer.encode(prompt, add_special_tokens=False).ids if table is None else table.encode([prompt], [False])[0]
    )
    return [*(opening_ids(tokenizer) if own or not ids else own_opening(tokenizer)), *ids]


def _refusal(what: str, got: object, allowed: str, fix: str, where: str = "turnout sample") -> UsageError:
    return UsageError(word(what, got=got, allowed=allowed, where=where, fix=fix))
