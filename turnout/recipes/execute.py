"""Execute a Run: prepare its text, train, measure, and leave a folder that explains itself."""

import contextlib
import dataclasses
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from turnout.errors import Interrupted, UsageError, word
from turnout.measure import RunData, hardware, read_run, results_rows, results_table
from turnout.measure.memory import forget_peak
from turnout.models import LM, checkpoint
from turnout.models.families.express import architecture_of
from turnout.models.placed import placed
from turnout.recipes.inspect import measure_model, run_tokens, write_report, write_result
from turnout.recipes.run import Run
from turnout.recipes.size import check_size
from turnout.recipes.start import KEPT, begin, folded_only, kept_tokenizer, write_adapters
from turnout.recipes.teach import need_teacher, read_teacher, tokenizer_of
from turnout.reshape import fold_low_rank
from turnout.run.tuned import tuning
from turnout.show.headline import at_equal_time, headline
from turnout.train.allocator import return_freed_memory
from turnout.train.config import TrainResult
from turnout.train.data import TokenSet, load_tokenizer, prepare, python_text
from turnout.train.folder import read_run_json, refuse_foreign, refuse_missing_run, refuse_other_run
from turnout.train.loop import train
from turnout.train.state import find


@dataclasses.dataclass(frozen=True)
class Done:
    """What is left of finished runs: their folders, their numbers and the page that shows them.

    Args:
        folders: one output folder per run.
        runs: what is in them.
        report: the path of the self-contained page.

    Source: none; plain bookkeeping.
    """

    folders: tuple[Path, ...]
    runs: tuple[RunData, ...]
    report: Path

    def table(self) -> str:
        """The results as a plain text table, one column per run."""
        return results_table(self.runs)

    def said(self) -> str:
        """The result in words: who needs fewer bits, what it took, and where both stood after the same time."""
        return "\n".join(filter(None, (f"{headline(self.runs)}.", at_equal_time(self.runs))))

    def rows(self) -> list[dict[str, object]]:
        """The results as plain JSON values, one dict per run."""
        return results_rows(self.runs)


def tokens_for(run: Run, folder: Path, *, tokenizer: Path | None = None, quiet: bool) -> TokenSet:
    """The run's text as tokens, prepared in ``folder`` or found there; by this tokenizer, or by one of the text's own.

    Raises:
        UsageError: the folder holds tokens that another tokenizer made, perhaps those of another run.
    """
    if tokenizer is not None:
        _refuse_other_tokens(folder, tokenizer)
    limit = None if run.data.limit_mb is None else int(run.data.limit_mb * 1e6)
    domains = run.data.domains or python_text(limit_bytes=limit)
    return prepare(
        domains,
        folder,
        vocab_size=run.model.vocab_size,
        tokenizer=tokenizer,
        held_out=run.data.held_out,
        limit_bytes=limit,
        part_bytes=run.data.part_bytes,
        field=run.data.field,
        bad=run.data.bad,
        quiet=quiet,
    )


def _refuse_other_tokens(folder: Path, tokenizer: Path) -> None:
    place = folder / "tokenizer.json"
    if (folder / "tokens.json").is_file() and place.is_file():
        ours, theirs = (load_tokenizer(file).to_str() for file in (tokenizer, place))
        if ours != theirs:
            got, fix = f"{folder}, made with another tokenizer", "name another folder with --tokens, or leave it out"
            allowed = "be made with the tokenizer of the model that the run starts from"
            raise UsageError(word("the tokens", got=got, allowed=allowed, where="turnout train --from", fix=fix))


def execute(
    run: Run,
    out: str | Path,
    *,
    resume: str | None = None,
    tokens_folder: str | Path | None = None,
    tensorboard: bool = False,
    quiet: bool = False,
    device: str | None = None,
) -> Done:
    """Trains what ``run`` describes in the folder ``out``, measures it on all held-out text and writes report.html.

    A run with a ``start`` begins with that model's weights, and reads text with its tokenizer. Its small files (chat
    template, generation configuration) go along in the folder, so that ``turnout convert --as transformers`` has them.

    Args:
        run: from a recipe, ``turnout.recipes.tune`` or a run.json.
        out: a new folder; or, with ``resume``, the folder that holds this run.
        resume: ``"latest"`` or the name of a checkpoint to go on from.
        tokens_folder: where the prepared tokens are kept, to share them between runs; default ``out/tokens``.
        tensorboard: also write TensorBoard events (an extra).
        quiet: no progress on stderr.
        device: where to train, in the place of the run's own ``train.device``.

    Returns:
        Where everything is, with the numbers.

    Raises:
        TurnoutError: the input, the folder or the training is at fault; the message says what to do.
    """
    out = Path(out)
    if device is not None:
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, device=device))
    need_teacher(run)
    check_size(run)
    found = claim(run, out, resume)
    with resumable(out):
        with begun(run, out):
            model = placed(begin(run, out, resume=resume), run.train.device)
            tokenizer, teacher = tokenizer_of(run, out), read_teacher(run)
            tell(run, model, out, quiet=quiet)
            folder = Path(tokens_folder or out / "tokens")
            tokens = found or tokens_for(run, folder, tokenizer=tokenizer, quiet=quiet)
        how = {"resume": resume, "tensorboard": tensorboard, "quiet": quiet}
        trained = _train(run, model, tokens, out, teacher, **how)
        return finish(run, model, tokens, out, trained)


def beside(tokens: TokenSet) -> dict[str, object]:
    """What run.json holds beside the run: of its text, the machine and the command."""
    return {
        "tokens_digest": tokens.digest,
        "held_out_text": tokens.head.get("held_out_text"),
        "tokens_folder": str(tokens.path.resolve()),
        "hardware": hardware(),
        "command": shlex.join(sys.argv),
    }


def _train(
    run: Run,
    model: LM,
    tokens: TokenSet,
    out: Path,
    teacher: LM | None,
    *,
    resume: str | None,
    tensorboard: bool,
    quiet: bool,
) -> TrainResult:
    return_freed_memory()
    forget_peak()  # of preparing the text, and of another run in this process
    return train(
        model,
        tokens,
        run.train,
        out,
        resume=resume,
        run_json=run.to_json_dict() | beside(tokens),
        tensorboard=tensorboard,
        quiet=quiet,
        teacher=teacher,
    )


def tell(run: Run, model: LM, out: Path, *, quiet: bool) -> None:
    """Says what should be known of this model before it is trained."""
    if not quiet and (why := folded_only(run, model, out)):
        print(f"note: {why}", file=sys.stderr)
    if not quiet and (why := unexportable(run)):
        print(f"note: {why}", file=sys.stderr)
    if not quiet and model.embedding.device.type == "cpu" and tuning().origin == "assumed":
        # Offered, not done: what a run computes must not hang on how busy the machine was just before it.
        print(
            f"note: turnout was never measured on {tuning().processor}: kernels are chosen by a rule. `turnout doctor "
            "--calibrate` takes half a minute and may make training faster.",
            file=sys.stderr,
        )
    if not quiet and any(getattr(router, "sees_later_tokens", False) is True for router in model.routers):
        print(
            f"note: {run.model.moe and run.model.moe.router} chooses by looking at later tokens too, so the losses and "
            "bits per byte of this run are lower than what it can predict.",
            file=sys.stderr,
        )


def unexportable(run: Run) -> str:
    """Why the model of this run could not be written for transformers, as its families say; empty where it could."""
    try:
        architecture_of(run.model)
    except UsageError as error:
        return f"what this trains stays in turnout's own format, convert --as transformers will refuse it: {error}"
    return ""


def claim(run: Run, out: Path, resume: str | None) -> TokenSet | None:
    """Refuses a folder of another run before anything in it is touched; a resumed run has its tokens already."""
    if resume is None:
        refuse_other_run(out, run.to_json_dict())
        refuse_foreign(out)
        return None
    refuse_missing_run(out, resume)
    body = read_run_json(out)
    if not body:
        return None
    began = Run.from_json_dict(body)
    if (began.data, began.model.vocab_size) != (run.data, run.model.vocab_size):
        now, then = ({**run.fields()} for run in (run, began))
        name = next(name for name in now if name.startswith(("data.", "model.vocab")) and now[name] != then[name])
        raise UsageError(
            word(
                name,
                got=now[name],
                allowed=f"stay {then[name]!r}, as the run in {out} began",
                where="turnout train --resume",
                fix=f"go on with: turnout train --resume --out {shlex.quote(str(out))}, or start anew in another --out",
            )
        )
    return run_tokens(out, body)


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Whenever Ctrl-C strikes, the way to go on is said; what was said already stands."""
    try:
        yield
    except KeyboardInterrupt:
        known = find(out / "checkpoints")
        saved = f"{known[-1].name} is saved" if known else "nothing is trained yet"
        how = f"turnout train --resume --out {shlex.quote(str(out))}"
        raise Interrupted(f"stopped; {saved}. To go on: {how}") from None


@contextlib.contextmanager
def begun(run: Run, out: Path) -> Iterator[None]:
    """The run.json is there first, so that a run can be resumed whatever stops it; a refusal takes it back."""
    new, begun = not out.exists(), not (out / "run.json").exists()
    if begun:
        run.save(out / "run.json")
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        if begun:
            (out / "run.json").unlink(missing_ok=True)
            shutil.rmtree(out / KEPT, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # tokens are there, which the next try finds
                out.rmdir()
        raise


def _save(run: Run, model: LM, tokens: TokenSet, out: Path) -> None:
    """Writes model/; where adapters were trained, these too, and the model with them folded in."""
    if run.train.only == "adapters":
        write_adapters(run, model, out)
        fold_low_rank(model)
    checkpoint.save(out / "model", model)
    if run.start is None:
        tokens.tokenizer.save(str(out / "model" / "tokenizer.json"))
    else:
        shutil.copyfile(kept_tokenizer(out), out / "model" / "tokenizer.json")


def finish(run: Run, model: LM, tokens: TokenSet, out: Path, trained: TrainResult) -> Done:
    """Measures a trained model on all held-out text; writes model/, trace/, result.json, routes.json, report.html."""
    _save(run, model, tokens, out)
    trace = out / "trace" if model.routers else None
    if trace is not None and trace.exists():
        shutil.rmtree(trace)  # of the same run, finished before
    found = measure_model(model, tokens, seq=run.train.seq, trace=trace)
    write_result(out, model, tokens, found, trained, seq=run.train.seq)
    data = read_run(out)
    report = write_report([out], out / "report.html")
    return Done((out,), (data,), report)
