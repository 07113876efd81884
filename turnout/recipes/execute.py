"""Execute a Run: prepare its text, train, measure, and leave a folder that explains itself."""

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path

from turnout.errors import Interrupted, UsageError, word
from turnout.measure import RunData, hardware, read_run, results_rows, results_table
from turnout.models import LM, checkpoint
from turnout.models.families.express import architecture_of
from turnout.models.placed import placed
from turnout.recipes.inspect import measure_model, result_json, run_tokens, write_report
from turnout.recipes.run import Run
from turnout.recipes.size import check_size
from turnout.storage import write_whole
from turnout.train.data import TokenSet, prepare, python_text
from turnout.train.folder import read_run_json, refuse_foreign, refuse_missing_run, refuse_other_run
from turnout.train.loop import train


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

    def rows(self) -> list[dict[str, object]]:
        """The results as plain JSON values, one dict per run."""
        return results_rows(self.runs)


def tokens_for(run: Run, folder: Path, *, quiet: bool) -> TokenSet:
    """The run's text as tokens, prepared in ``folder`` or found there."""
    limit = None if run.data.limit_mb is None else int(run.data.limit_mb * 1e6)
    domains = run.data.domains or python_text(limit_bytes=limit)
    return prepare(
        domains,
        folder,
        vocab_size=run.model.vocab_size,
        held_out=run.data.held_out,
        limit_bytes=limit,
        part_bytes=run.data.part_bytes,
        field=run.data.field,
        bad=run.data.bad,
        quiet=quiet,
    )


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

    Args:
        run: from a recipe or a run.json.
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
    check_size(run)
    model = placed(LM(run.model, seed=run.train.seed), run.train.device)
    if not quiet and (why := unexportable(run)):
        print(f"note: {why}", file=sys.stderr)
    if not quiet and any(getattr(router, "sees_later_tokens", False) for router in model.routers):
        print(
            f"note: {run.model.moe and run.model.moe.router} chooses by looking at later tokens too, so the losses and "
            "bits per byte of this run are lower than what it can predict.",
            file=sys.stderr,
        )
    tokens = _claim(run, out, resume) or _prepare(run, out, Path(tokens_folder or out / "tokens"), quiet=quiet)
    beside = {
        "tokens_digest": tokens.digest,
        "held_out_text": tokens.head.get("held_out_text"),
        "tokens_folder": str(tokens.path.resolve()),
        "hardware": hardware(),
        "command": shlex.join(sys.argv),
    }
    result = train(
        model,
        tokens,
        run.train,
        out,
        resume=resume,
        run_json=run.to_json_dict() | beside,
        tensorboard=tensorboard,
        quiet=quiet,
    )
    return finish(run, model, tokens, out, peak_bytes=result.peak_memory_bytes)


def unexportable(run: Run) -> str:
    """Why the model of this run could not be written for transformers, as its families say; empty where it could."""
    try:
        architecture_of(run.model)
    except UsageError as error:
        return f"what this trains stays in turnout's own format, convert --as transformers will refuse it: {error}"
    return ""


def _claim(run: Run, out: Path, resume: str | None) -> TokenSet | None:
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


def _prepare(run: Run, out: Path, folder: Path, *, quiet: bool) -> TokenSet:
    """The tokens of a run whose run.json is there first, so that it can be resumed whatever stops it."""
    begun = not (out / "run.json").exists()
    if begun:
        run.save(out / "run.json")
    try:
        return tokens_for(run, folder, quiet=quiet)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped while the text was prepared; nothing is trained yet. To go on: "
            f"turnout train --resume --out {shlex.quote(str(out))}"
        ) from None
    except BaseException:
        if begun:
            (out / "run.json").unlink(missing_ok=True)
        raise


def finish(run: Run, model: LM, tokens: TokenSet, out: Path, *, peak_bytes: int) -> Done:
    """Measures a trained model on all held-out text and writes model/, trace/, result.json and report.html."""
    checkpoint.save(out / "model", model)
    tokens.tokenizer.save(str(out / "model" / "tokenizer.json"))
    trace = out / "trace" if model.routers else None
    if trace is not None and trace.exists():
        shutil.rmtree(trace)  # of the same run, finished before
    found = measure_model(model, tokens, seq=run.train.seq, trace=trace)
    result = result_json(model, tokens, found, seq=run.train.seq) | {"peak_memory_bytes": peak_bytes}
    write_whole(out / "result.json", json.dumps(result, indent=2) + "\n")
    data = read_run(out)
    report = write_report([out], out / "report.html")
    return Done((out,), (data,), report)
