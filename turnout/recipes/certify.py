"""Certify the models in two folders, and check an older certificate of them."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from turnout.errors import CheckpointError, DataError, UsageError, word
from turnout.hub import located
from turnout.measure import Certificate, certify
from turnout.measure.certificate import Side
from turnout.measure.certify import describe, measured
from turnout.models import LM, checkpoint
from turnout.models.checkpoint import own
from turnout.models.families.meaning import meaning
from turnout.models.placed import roomy, weight_bytes
from turnout.reading import check_fields, parse_json, read_json, read_text
from turnout.recipes.run import NO_GGUF, Run
from turnout.storage import digest, read_error
from turnout.train.data.tokenizer import open_tokenizer
from turnout.types.device import shown

__all__ = ["certify_folders", "check_certificate", "model_folder", "open_model", "read_map"]

_WHERE = "turnout certify"
# Without prompts: so many rows of so many random tokens. Small models route them to every expert.
_ROWS, _LENGTH = 8, 64
# Where windows differ: one row more, that reaches beyond them, if that is no longer than this.
_FAR = 8192
# Fields of a configuration that may show in no short input, whatever else the two are.
_DISTANT = ("window", "rope_theta", "rope_scaling", "rope_share", "norm_eps", "attention_scale", "max_seq")


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Two models, the inputs for both, and how those read."""

    a: LM
    b: LM
    sides: tuple[Side, Side]
    items: tuple[Tensor, ...]
    source: str
    notes: tuple[str, ...]
    tokenizer: Path | None

    def worst(self, certificate: Certificate) -> str | None:
        """The prompt that is furthest apart, as text, its worst token marked; None without a tokenizer."""
        if self.tokenizer is None or certificate.verdict == "bit-equal" or self.source.startswith("random"):
            return None
        rows = [row for item in self.items for row in item]
        row, at = rows[certificate.logits.prompt].tolist(), certificate.logits.position
        tokenizer = open_tokenizer(self.tokenizer)
        before = tokenizer.decode(row[max(0, at - 24) : at], skip_special_tokens=False)
        return f"{before}[{tokenizer.decode([row[at]], skip_special_tokens=False)}]"


def certify_folders(
    a: str | Path,
    b: str | Path,
    *,
    prompts: str | Path | None = None,
    names: Mapping[str, str | None] | None = None,
    bound: float | None = None,
    device: str | torch.device = "auto",
) -> tuple[Certificate, str | None]:
    """Whether the model in one folder computes what that in another does, and the worst prompt as text.

    Args:
        a: a run folder, a folder that ``checkpoint.save`` wrote, one of transformers, or a model of the hub.
        b: the other.
        prompts: a text file with a prompt a line, or a ``.jsonl`` (texts, lists of ids, or objects with ``prompt``,
            ``text`` or ``ids``); None for random tokens, always the same for a vocabulary.
        names: modules of A and their counterparts in B, see ``certify``.
        bound: what counts as equal; None for one that fits the dtypes.
        device: where both run, in the precision of their weights.

    Raises:
        TurnoutError: a folder, file or vocabulary that does not fit; nothing is written.

    Source: none; ``measure.certify``, with the file reading around it.
    """
    return _certify(_open(a, b, prompts, device), names, bound)


def check_certificate(
    path: str | Path,
    a: str | Path,
    b: str | Path,
    *,
    prompts: str | Path | None = None,
    device: str | torch.device = "auto",
) -> tuple[tuple[str, ...], Certificate | None]:
    """What a certificate says that is no longer so; empty when it holds. The models run only when nothing changed.

    Args:
        path: the certificate.
        a: the first model's folder.
        b: the second's.
        prompts: the prompts it was made with; needed unless they were random.
        device: where both run.

    Returns:
        Sentences, and the comparison made now; None when weights, configurations or inputs are others.

    Raises:
        TurnoutError: a folder or file that cannot be read, or prompts that are missing.

    Source: none; plain bookkeeping.
    """
    old = read_certificate(path)
    if prompts is None and not old.inputs.source.startswith("random"):
        fix = "add --prompts FILE, the file it was made with"
        got = f"a certificate over {old.inputs.source}, and no --prompts"
        raise UsageError(word("--check", got=got, allowed="be given the same prompts", where=_WHERE, fix=fix))
    pair = _open(a, b, prompts, device)
    broken = old.broken(*pair.sides, measured(pair.items, pair.source))
    if broken:
        return broken, None
    new, _ = _certify(pair, old.names, old.bound)
    order = ("bit-equal", "within bound", "different")
    if order.index(new.verdict) <= order.index(old.verdict):
        return (), new
    before = {"device": "cpu", **old.context}
    changed = [
        name for name in ("device", "cpu", "torch", "turnout", "threads") if before.get(name) != new.context[name]
    ]
    why = f"; here {', '.join(changed)} differ" if changed else ""
    return (f"it says {old.verdict!r}, and now they are {new.verdict!r}{why}",), new


def read_certificate(path: str | Path) -> Certificate:
    """The certificate in a file.

    Raises:
        TurnoutError: there is none, or it was altered.
    """
    try:
        return Certificate.from_json(read_text(path, any_link=True))
    except OSError as error:
        raise read_error(error, path, _WHERE) from error


def read_map(path: str | Path) -> dict[str, str | None]:
    """The map of module names in a JSON file: ``{"blocks.1": "blocks.2", "blocks.3": null}``.

    Raises:
        TurnoutError: there is no such file, or it holds something else.
    """

    def refuse(problem: str) -> DataError:
        fix = 'write {"blocks.1": "blocks.2"}, the names of modules in A and in B'
        got, allowed = f"{path}: {problem}", "be a JSON object of names"
        return DataError(word("the map", got=got, allowed=allowed, where=_WHERE, fix=fix))

    try:
        body = read_json(path, refuse=refuse, any_link=True)
    except OSError as error:
        raise read_error(error, path, _WHERE) from error
    check_fields(body, dict.fromkeys(body, str | None), refuse)
    return body


def model_folder(path: str | Path, *, where: str = _WHERE) -> Path:
    """Where the model is: the folder itself, a snapshot in the hub's cache, or ``model`` in a run folder.

    Raises:
        CheckpointError: the folder holds no model; a run may not be finished.
    """
    path = located(path, where=where).folder
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    got = str(path) if path.exists() else f"{path}, which does not exist"
    fix = "name a run or a model's folder"
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        got += ", a file of llama.cpp" if path.is_file() else ", with files of llama.cpp alone"
        fix = f"name the folder that it was made from, or run the file with llama.cpp: {NO_GGUF}"
    if (path / "run.json").is_file():
        Run.open(path)  # says what else it is
        fix = f"finish the run: turnout train --resume --out {quote(str(path))}"
    raise CheckpointError(word("the folder", got=got, allowed="hold a model", where=where, fix=fix))


def open_model(path: str | Path, *, packed: bool = True, where: str = _WHERE) -> tuple[LM, str]:
    """The model in a folder, ours or of transformers, and the SHA-256 of its configuration.

    Weights that a folder of transformers has in few bits are held as they lie, where that can be; where not, it is
    said. Without ``packed``, to be trained, they are the numbers that they stand for.
    """
    folder = model_folder(path, where=where)
    body = own.read_json(folder / "config.json", where)
    foreign = "model_type" in body or "architectures" in body
    if not foreign:
        lm = checkpoint.load(folder)
    elif packed and "quantization_config" in body:
        lm = _held(folder)
    else:
        lm = checkpoint.from_hf(folder)
    text = json.dumps(lm.config.to_json_dict(), sort_keys=True)
    return lm, hashlib.sha256(text.encode()).hexdigest()


def _held(folder: Path) -> LM:
    try:
        return checkpoint.from_hf(folder, packed=True)
    except CheckpointError as error:
        lm = checkpoint.from_hf(folder)  # what is wrong with the folder itself is raised here
        why = str(error).partition(" Nearest fix")[0]
        warnings.warn(f"its weights in few bits are held whole: {why}", UserWarning, stacklevel=2)
        return lm


def _open(a: str | Path, b: str | Path, prompts: str | Path | None, device: str | torch.device) -> Pair:
    found = [located(one, where=_WHERE) for one in (a, b)]
    folders = [model_folder(one.folder) for one in found]
    models = [open_model(folder) for folder in folders]
    one, other = models[0][0], models[1][0]
    if one.config.vocab_size != other.config.vocab_size:
        got = f"{one.config.vocab_size} and {other.config.vocab_size} tokens"
        fix = "certify models of one vocabulary"
        raise UsageError(word("the models", got=got, allowed="have one vocabulary", where=_WHERE, fix=fix))
    sides = tuple(
        describe(lm, place.name, config_sha256=config) for (lm, config), place in zip(models, found, strict=True)
    )
    on = roomy(device, weight_bytes(one) + weight_bytes(other))
    one, other = one.to(on), other.to(on)
    files = [found for folder in folders if (found := _tokenizer(folder)) is not None]
    notes = []
    if prompts is not None and len(files) == 2 and digest(files[0]) != digest(files[1]):
        notes.append("the two have other tokenizers; prompts were read with that of A")
    longest = min(lm.config.max_seq for lm in (one, other))
    if prompts is None:
        items, source = _random(one.config.vocab_size, longest, _windows(one, other))
    else:
        items, cut = _prompts(Path(prompts), files[0] if files else None, longest, one.config.vocab_size)
        source = f"prompts of {Path(prompts).name}"
        notes += [f"{cut} prompts were cut to the {longest} tokens that both take"] if cut else []
    return Pair(one, other, (sides[0], sides[1]), items, source, tuple(notes), files[0] if files else None)


def _certify(pair: Pair, names: Mapping[str, str | None] | None, bound: float | None) -> tuple[Certificate, str | None]:
    found = certify(pair.a, pair.b, pair.items, bound=bound, names=names, source=pair.source)
    notes = (*pair.notes, *found.notes, *(_distant(pair) if found.equal else ()))
    context = {**found.context, "device": shown(pair.a.embedding.device)}
    found = dataclasses.replace(found, a=pair.sides[0], b=pair.sides[1], notes=notes, context=context)
    return found, pair.worst(found)


def _windows(one: LM, other: LM) -> int:
    """The longest window that a layer of one model has and that of the other has not; 0 where there is none."""
    pairs = zip(meaning(one.config)["window"], meaning(other.config)["window"], strict=False)
    return max((window or 0 for pair in pairs if pair[0] != pair[1] for window in pair), default=0)


def _distant(pair: Pair) -> tuple[str, ...]:
    """What the configurations say otherwise, though the models agree on these inputs."""
    a, b = (meaning(lm.config) for lm in (pair.a, pair.b))
    most = max(item.shape[1] for item in pair.items)
    return tuple(
        f"{name} is {a.get(name)} in A and {b.get(name)} in B, which inputs of up to {most} tokens do not show"
        for name in _DISTANT
        if a.get(name) != b.get(name)
    )


def _tokenizer(folder: Path) -> Path | None:
    places = (folder / "tokenizer.json", folder / "origin" / "tokenizer.json", folder.parent / "tokenizer.json")
    return next((place for place in places if place.is_file()), None)


def _random(vocab: int, longest: int, window: int) -> tuple[tuple[Tensor, ...], str]:
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(vocab, (_ROWS, min(_LENGTH, longest)), generator=generator).split(1)
    far = min(longest, window + _LENGTH)
    if window and _LENGTH < far <= _FAR:
        items = (*items, torch.randint(vocab, (1, far), generator=generator))
    return items, "random tokens, seed 0"


def _prompts(path: Path, tokenizer: Path | None, longest: int, vocab: int) -> tuple[tuple[Tensor, ...], int]:
    """A row of ids for each prompt, cut to ``longest``, and how many were cut."""
    try:
        text = read_text(path, refuse=lambda problem: _bad_prompts(f"{path} ({problem})"), any_link=True)
    except OSError as error:
        raise read_error(error, path, _WHERE) from error
    lines = [line for line in text.splitlines() if line.strip()]
    found = [_ids(_prompt(line, path, number), tokenizer, path) for number, line in enumerate(lines, start=1)]
    found = [ids for ids in found if ids]
    if not found:
        raise _bad_prompts(f"{path}, which holds none")
    wrong = [token for ids in found for token in ids if not 0 <= token < vocab]
    if wrong:
        raise _bad_prompts(f"{path} with the token {wrong[0]} of a vocabulary of {vocab}")
    return tuple(torch.tensor([ids[:longest]]) for ids in found), sum(len(ids) > longest for ids in found)


def _prompt(line: str, path: Path, number: int) -> str | list[int]:
    if path.suffix != ".jsonl":
        return line
    item = parse_json(line, lambda problem: _bad_prompts(f"{path}, line {number} ({problem})"), top=object)
    if isinstance(item, dict):
        item = next((item[key] for key in ("ids", "prompt", "text") if key in item), None)
    whole = isinstance(item, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in item)
    if isinstance(item, str) or whole:
        return item
    raise _bad_prompts(f"{path}, line {number}: {line[:40]}")


def _ids(prompt: str | list[int], tokenizer: Path | None, path: Path) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    if tokenizer is None:
        fix = "use a .jsonl of lists of ids, or put tokenizer.json beside the model"
        raise DataError(
            word("the prompts", got=f"text in {path}, and no tokenizer.json", allowed="be ids", where=_WHERE, fix=fix)
        )
    return open_tokenizer(tokenizer).encode(prompt).ids


def _bad_prompts(got: str) -> DataError:
    allowed = "hold prompts: a text a line, or in .jsonl texts, lists of ids, or objects with prompt, text or ids"
    return DataError(word("the prompts", got=got, allowed=allowed, where=_WHERE, fix="see turnout certify --help"))
