"""Look at finished or running runs: measure them, and write the page."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from turnout.errors import CheckpointError, UsageError, word
from turnout.measure import Evaluation, Passage, ReportData, RunData, bits_per_byte, hardware, read_run
from turnout.measure.memory import free_on
from turnout.models import LM, checkpoint
from turnout.models.placed import placed
from turnout.recipes.calibration import find_tokenizer
from turnout.recipes.certify import model_folder, open_model
from turnout.recipes.models import evaluate_model
from turnout.recipes.run import Run
from turnout.show import AdaptationData, ConversionData, adaptation_html, conversion_html, report_html
from turnout.storage import write_whole
from turnout.train.config import TrainResult
from turnout.train.data import TokenSet, load_tokenizer, prepare, windows
from turnout.train.data.spaced import token_texts
from turnout.train.folder import read_run_json
from turnout.types import Report, TraceWriter
from turnout.types.device import shown

_EVAL_BATCH = 16
# What keeps routes.json small whatever the text: domains with a passage, and the tokens of each.
_PASSAGES, _PASSAGE_TOKENS = 8, 512


def measure_model(
    model: LM,
    tokens: TokenSet,
    *,
    seq: int,
    limit: int | None = None,
    trace: str | Path | None = None,
    token_ids: bool = False,
) -> Evaluation:
    """The model's bits per byte on the held-out documents, and the load of its experts there.

    Args:
        model: the network.
        tokens: the text; its held-out side is read.
        seq: tokens of context per row.
        limit: about how many tokens to predict; None takes all.
        trace: a new folder to record every routing in; needs a routed layer.
        token_ids: put the token ids into the trace too, which gives the text away.

    Raises:
        UsageError: a trace of a model without routed layers.

    Source: Gao et al., 2020, "The Pile", for bits per byte.
    """
    model.eval()
    if trace is not None and not model.routers:
        raise UsageError(
            word(
                "--trace",
                got=str(trace),
                allowed="be asked of a model with routed layers",
                where="turnout eval",
                fix="leave it out: a dense model decides nothing",
            )
        )
    rows = _rows(seq * tokens.vocab_size, model.embedding.device)
    batches = windows(tokens.held_out, batch=rows, seq=seq, limit=limit)
    if trace is None:
        return bits_per_byte(model, batches, torch.from_numpy(tokens.byte_length_V), domains=tokens.domains)
    context = {"tokens_digest": tokens.digest}
    writer = TraceWriter(
        trace,
        num_experts_L=[count for layer in range(model.config.layers) if (count := model.config.experts_of(layer))],
        domains=tokens.domains,
        token_ids=token_ids,
        context=context,
    )
    with writer:
        return bits_per_byte(
            model, batches, torch.from_numpy(tokens.byte_length_V), domains=tokens.domains, trace=writer
        )


def _rows(logits: int, device: torch.device) -> int:
    """How many rows to measure at once: as many as there is memory for; the numbers do not depend on it."""
    free = free_on(device)
    return _EVAL_BATCH if free is None else max(1, min(_EVAL_BATCH, free // (2 * 4 * logits)))


def passages(model: LM, tokens: TokenSet, *, length: int) -> list[Passage]:
    """A held-out passage of each domain, of the largest ones where they are many, with the experts of each token.

    Each is the start of the first document that fills ``length`` tokens, or of the longest where none does.
    """
    split = tokens.held_out
    size_N = torch.from_numpy(split.document_N[1:] - split.document_N[:-1])
    domain_N = torch.from_numpy(split.domain_N.astype("int64"))
    total_D = torch.zeros(len(tokens.domains), dtype=torch.long).index_add_(0, domain_N, size_N.long())
    largest = [d for d in total_D.argsort(descending=True, stable=True).tolist() if total_D[d]][:_PASSAGES]
    found = []
    for domain in sorted(largest):
        wanted = int((size_N.clamp(max=length) * (domain_N == domain)).argmax())
        first = int(split.document_N[wanted])
        ids = torch.from_numpy(split.token_T[first : first + min(length, int(size_N[wanted]))].astype("int64"))
        with torch.no_grad():
            output = model.eval()(ids[None].to(model.embedding.device))
        texts = token_texts(tokens.tokenizer, ids.tolist())
        found.append(Passage.from_routings(texts, output.routings, domain=tokens.domains[domain]))
    return found


def load_run(folder: str | Path) -> tuple[Run, LM]:
    """The run in an output folder and its trained model.

    Raises:
        CheckpointError: the run is not finished, or a file is damaged.
    """
    folder = Path(folder)
    run = Run.open(folder)
    if not (folder / "model").is_dir():
        raise CheckpointError(
            word(
                "the run",
                got=f"{folder}, which has no model folder",
                allowed="be finished",
                where="turnout",
                fix=f"finish it with: turnout train --resume --out {quote(str(folder))}",
            )
        )
    return run, checkpoint.load(folder / "model")


def evaluate_run(
    folder: str | Path,
    *,
    domains: Mapping[str, tuple[str, ...]],
    limit: int | None = None,
    trace: str | Path | None = None,
    token_ids: bool = False,
    like: str | Path | None = None,
    device: str | torch.device = "auto",
) -> Report:
    """Bits per byte and load balance of a finished run, on its own held-out text or on all of another text.

    Args:
        folder: the output folder; or a model's by itself, see ``evaluate_model``.
        domains: other text, by domain; empty for the run's own held-out documents.
        limit: about how many tokens to predict; None takes all.
        trace: a new folder to record every routing in.
        token_ids: put the token ids into the trace too, which gives the text away.
        like: a run to be compared with: its held-out documents, in rows of its length, in fp32.
        device: where the model runs, in the precision of its weights.

    Source: none; ``measure_model``, with the file reading around it.
    """
    if like is not None:
        if domains:
            fix, allowed = "leave one of them out", "be by itself: it says which text"
            raise UsageError(word("--like", got="--data beside it", allowed=allowed, where="turnout eval", fix=fix))
        return _evaluate_like(folder, Path(like), limit=limit, trace=trace, token_ids=token_ids, device=device)
    # A model by itself, no run; what is on the hub is one.
    if not Path(folder).exists() or (Path(folder) / "config.json").is_file():
        return evaluate_model(folder, domains=domains, limit=limit, trace=trace, device=device)
    folder = Path(folder)
    run, model = load_run(folder)
    model = placed(model, device)
    if domains:
        with tempfile.TemporaryDirectory(prefix="turnout-eval-") as place:
            tokens = prepare(domains, place, tokenizer=folder / "model" / "tokenizer.json", held_out=1.0, quiet=True)
            found = measure_model(model, tokens, seq=run.train.seq, limit=limit, trace=trace, token_ids=token_ids)
    else:
        tokens = _own_tokens(folder)
        found = measure_model(model, tokens, seq=run.train.seq, limit=limit, trace=trace, token_ids=token_ids)
    return _evaluation(f"{run.recipe} in {folder}", folder, model, found)


def _evaluate_like(
    folder: str | Path, like: Path, *, limit: int | None, trace: Any, token_ids: bool, device: str | torch.device
) -> Report:
    """A model measured as a run is, so that the numbers can be told apart by the models alone."""
    run, tokens = Run.open(like), _own_tokens(like)
    place = find_tokenizer(model_folder(folder, where="turnout eval"), where="turnout eval --like")
    model, _ = open_model(folder)
    fix = "measure both on a text with --data: bits per byte do not depend on the tokenizer"
    allowed, where = f"be as those of {like}", "turnout eval --like"
    if load_tokenizer(place).to_str() != tokens.tokenizer.to_str():
        raise UsageError(word("the tokenizer", got=f"another, {place}", allowed=allowed, where=where, fix=fix))
    if model.config.max_seq < run.train.seq:
        got = f"rows of up to {model.config.max_seq} tokens, which is all that {folder} takes"
        raise UsageError(word("the rows", got=got, allowed=f"{allowed}, of {run.train.seq}", where=where, fix=fix))
    model = placed(model.float(), device)
    found = measure_model(model, tokens, seq=run.train.seq, limit=limit, trace=trace, token_ids=token_ids)
    return _evaluation(f"the model in {folder}, as {like} is measured", folder, model, found)


def _evaluation(title: str, folder: str | Path, model: LM, found: Evaluation) -> Report:
    values: dict = {"bits_per_byte": found.bits_per_byte}
    values |= {f"bits_per_byte/{name}": value for name, value in found.by_domain.items()}
    values |= {"tokens": found.tokens, "bytes": found.bytes}
    if found.load_LE:
        values |= {"max_vio": found.max_vio, "entropy": found.entropy, "dropped": found.dropped}
    context = {"run": str(folder), "device": shown(model.embedding.device), "hardware": hardware()}
    return Report(title, values, (), context)


def run_tokens(folder: Path, body: Mapping[str, Any]) -> TokenSet | None:
    """The tokens that the run with this run.json is trained on, where they still are; runs may share them."""
    for place in (Path(body.get("tokens_folder") or folder / "tokens"), folder / "tokens"):
        with contextlib.suppress(CheckpointError):
            tokens = TokenSet.open(place)
            if tokens.digest == body.get("tokens_digest"):
                return tokens
    return None


def _own_tokens(folder: Path) -> TokenSet:
    body = read_run_json(folder)
    tokens = run_tokens(folder, body)
    if tokens is None:
        place = body.get("tokens_folder") or folder / "tokens"
        raise CheckpointError(
            word(
                "the run's tokens",
                got=f"{place}, which is gone, damaged, or was prepared again from other text",
                allowed="be those that the run was trained on",
                where="turnout eval",
                fix="name the text to measure on with --data",
            )
        )
    return tokens


def write_report(folders: Sequence[str | Path], out: str | Path | None = None, *, title: str | None = None) -> Path:
    """Writes the self-contained page of one or more runs, finished or still going, and says where.

    Args:
        folders: output folders of training, of conversions and of choices of adapters, in any mixture.
        out: the page; default report.html in the first folder.
        title: the heading; default the names of the runs.

    Raises:
        TurnoutError: a folder that holds none of these.

    Source: none; ``show.report_html``, ``show.conversion_html`` and ``show.adaptation_html``.
    """
    path = Path(out) if out else Path(folders[0]) / "report.html"
    runs: list[RunData] = []
    others: list[ConversionData | AdaptationData] = []
    for folder in map(Path, folders):
        body = read_run_json(folder)
        if "conversion" in body:
            others.append(ConversionData.open(folder))
        elif str(body.get("format")).startswith("turnout.adaptation/"):
            others.append(AdaptationData.open(folder))
        else:
            runs.append(read_run(folder))
    if not runs and len(others) == 1:
        one = others[0]
        write_whole(path, conversion_html(one) if isinstance(one, ConversionData) else adaptation_html(one))
        return path
    names = " against ".join([*(run.name for run in runs), *(one.name for one in others)])
    write_whole(path, report_html(ReportData(title or names, runs), others=others))
    return path


def write_result(out: Path, model: LM, tokens: TokenSet, found: Evaluation, trained: TrainResult, *, seq: int) -> None:
    """Writes result.json, the numbers that people read, and beside it the arrays behind the drawings, routes.json.

    Args:
        out: the run's folder.
        model: as it was trained.
        tokens: the text.
        found: the model on all held-out text.
        trained: what training took.
        seq: tokens of context.
    """
    numbers = found.to_json_dict(domains=True)
    routes = {name: numbers.pop(name) for name in ("load", "load_by_domain")}
    cost = {key: value for key, value in dataclasses.asdict(model.cost(seq=seq)).items() if value is not None}
    took = {"seconds": round(trained.seconds, 3), "peak_memory_bytes": trained.peak_memory_bytes}
    if model.routers:
        shown = [one.to_json_dict() for one in passages(model, tokens, length=min(seq, _PASSAGE_TOKENS))]
        body = json.dumps(routes | {"passages": shown}, separators=(",", ":"))
        write_whole(out / "routes.json", body + "\n")
    write_whole(out / "result.json", json.dumps(numbers | {"cost": cost} | took, indent=2) + "\n")
