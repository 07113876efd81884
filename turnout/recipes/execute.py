"""Execute a Run: prepare its text, train, measure, and leave a folder that explains itself."""

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path

from turnout.measure import RunData, hardware, read_run, results_rows, results_table
from turnout.models import LM, checkpoint
from turnout.recipes.inspect import measure_model, result_json, write_report
from turnout.recipes.run import Run
from turnout.storage import write_whole
from turnout.train.data import TokenSet, prepare, python_text
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
) -> Done:
    """Trains what ``run`` describes in the folder ``out``, measures it on all held-out text and writes report.html.

    Args:
        run: from a recipe or a run.json.
        out: a new folder; or, with ``resume``, the folder that holds this run.
        resume: ``"latest"`` or the name of a checkpoint to go on from.
        tokens_folder: where the prepared tokens are kept, to share them between runs; default ``out/tokens``.
        tensorboard: also write TensorBoard events (an extra).
        quiet: no progress on stderr.

    Returns:
        Where everything is, with the numbers.

    Raises:
        TurnoutError: the input, the folder or the training is at fault; the message says what to do.
    """
    out = Path(out)
    tokens = tokens_for(run, Path(tokens_folder) if tokens_folder else out / "tokens", quiet=quiet)
    model = LM(run.model, seed=run.train.seed)
    beside = {
        "tokens_digest": tokens.digest,
        "tokens_folder": str(tokens.path.resolve()),
        "hardware": hardware(),
        "command": shlex.join(sys.argv),
    }
    train(
        model,
        tokens,
        run.train,
        out,
        resume=resume,
        run_json=run.to_json_dict() | beside,
        tensorboard=tensorboard,
        quiet=quiet,
    )
    return finish(run, model, tokens, out, quiet=quiet)


def finish(run: Run, model: LM, tokens: TokenSet, out: Path, *, quiet: bool) -> Done:
    """Measures a trained model on all held-out text and writes model/, trace/, result.json and report.html."""
    checkpoint.save(out / "model", model)
    tokens.tokenizer.save(str(out / "model" / "tokenizer.json"))
    trace = out / "trace" if model.routers else None
    if trace is not None and trace.exists():
        shutil.rmtree(trace)  # of the same run, finished before
    found = measure_model(model, tokens, seq=run.train.seq, trace=trace)
    result = result_json(model, tokens, found, seq=run.train.seq)
    write_whole(out / "result.json", json.dumps(result, indent=2) + "\n")
    data = read_run(out)
    report = write_report([out], out / "report.html")
    return Done((out,), (data,), report)
