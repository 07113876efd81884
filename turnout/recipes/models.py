"""Look at a model in any folder, of a run, of transformers or of a conversion: open it, and measure it on a text."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from turnout.errors import DataError, UsageError, word
from turnout.hub import located
from turnout.measure import entropy, hardware, max_vio
from turnout.models import LM
from turnout.models.checkpoint.own import ORIGIN, read_json
from turnout.models.placed import placed
from turnout.recipes.calibration import LONGEST_ROW, whole_text
from turnout.recipes.certify import model_folder, open_model
from turnout.recipes.expert_room import ExpertRoom
from turnout.recipes.held_out import measured
from turnout.types import Report
from turnout.types.device import shown

__all__ = ["Opened", "evaluate_model", "opened", "trained_here"]


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A model, its name and folder, and whether turnout made it up: then a prompt begins as its documents did."""

    lm: LM
    name: str
    folder: Path
    own: bool
    notes: tuple[str, ...] = ()


def opened(
    path: str | Path,
    where: str,
    device: str | torch.device,
    *,
    packed: bool = True,
    experts: ExpertRoom | None = None,
) -> Opened:
    """The model in a folder, on a device.

    Args:
        path: the folder.
        where: the command that asks.
        device: where it is to run.
        packed: as ``open_model`` has it.
        experts: how much memory its experts may take, and whose.
    """
    found = located(path, where=where)
    folder = model_folder(found.folder, where=where)
    lm, notes = None, ()
    if experts is not None:
        lm, notes = experts.load(folder, where, device)
    if lm is None:
        lm = placed(open_model(folder, packed=packed)[0].eval(), device)
    return Opened(lm, found.name, folder, trained_here(folder), notes)


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
    model = opened(path, where, device)
    config, values, tokens, size, nats, skipped = model.lm.config, {}, 0, 0, 0.0, 0
    loads: list[tuple[int, list[list[float]]]] = []
    for name, sources in domains.items():
        text = whole_text(list(sources), model.folder, config=config, limit=limit)
        found = measured(model.lm, text)
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
        of_layers = zip(*(load for _, load in loads), strict=True)  # each the domains' loads of one layer
        part_N = torch.tensor([weight / tokens for weight, _ in loads], dtype=torch.float64)
        share_LE = [part_N @ torch.tensor(load, dtype=torch.float64) for load in of_layers]
        values["max_vio"] = sum(map(max_vio, share_LE)) / len(share_LE)
        values["entropy"] = sum(map(entropy, share_LE)) / len(share_LE)
    notes = (f"in rows of up to {min(LONGEST_ROW, config.max_seq)} tokens, documents one after the other",)
    notes += (f"left out {skipped} files or rows that cannot be read as text",) if skipped else ()
    context = {"run": model.name, "device": shown(model.lm.embedding.device), "hardware": hardware()}
    return Report(f"the model in {model.name}", values, notes, context)


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


def _refusal(what: str, got: object, allowed: str, fix: str, where: str) -> UsageError:
    return UsageError(word(what, got=got, allowed=allowed, where=where, fix=fix))
