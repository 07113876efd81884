"""The teacher of a run: named once, known by digest, and read again when the run begins or goes on."""

import dataclasses
from pathlib import Path

import torch

from turnout.errors import CheckpointError, TurnoutError, UsageError, word
from turnout.models import LM, checkpoint
from turnout.recipes.calibration import find_tokenizer
from turnout.recipes.certify import model_folder
from turnout.recipes.models import opened
from turnout.recipes.run import Run
from turnout.recipes.start import kept_tokenizer, look

__all__ = ["need_teacher", "read_teacher", "taught", "tokenizer_of"]

_WHERE = "turnout train --teacher"


def taught(run: Run, path: str | Path) -> Run:
    """The run with a teacher: it takes that model's tokenizer, and learns from its probabilities at first.

    Args:
        run: of a recipe; without ``train.kd_weight`` it gets 1.
        path: a run's output folder, or another folder of a model with its tokenizer.

    Raises:
        TurnoutError: no such model.

    Source: Rajbhandari et al., 2022, "DeepSpeed-MoE": staged knowledge distillation.
    """
    found = look(path)
    config = checkpoint.peek(model_folder(path, where=_WHERE), dtype=torch.float32).config
    model = dataclasses.replace(run.model, vocab_size=config.vocab_size)
    train = dataclasses.replace(run.train, kd_weight=run.train.kd_weight or 1.0)
    return dataclasses.replace(run, model=model, train=train, teacher=found)


def need_teacher(run: Run) -> None:
    """Refuses a run that is to be taught, and by nobody.

    Raises:
        UsageError: such.
    """
    if run.train.kd_weight > 0 and run.teacher is None:
        got, fix = "nobody", "add --teacher MODEL (turnout.recipes.teach.taught), or kd_weight=0"
        allowed = f"be named with kd_weight={run.train.kd_weight}"
        raise UsageError(word("the teacher", got=got, allowed=allowed, where=f"recipe {run.recipe!r}", fix=fix))


def tokenizer_of(run: Run, out: Path) -> Path | None:
    """The tokenizer that a run must read its text with; None for one of that text."""
    if run.teacher is not None:
        return find_tokenizer(model_folder(run.teacher.path, where=_WHERE), where=_WHERE)
    return None if run.start is None else kept_tokenizer(out)


def read_teacher(run: Run) -> LM | None:
    """The teacher of a run, the very one that it recorded, on the run's device; None where it has none.

    Raises:
        CheckpointError: it has changed, or is gone.
        UsageError: it reads fewer tokens at once than the run trains on.
    """
    if run.teacher is None:
        return None
    try:
        now = look(run.teacher.path)
    except TurnoutError as error:
        raise _changed(run.teacher.path, str(error)) from error
    if now != run.teacher:
        raise _changed(run.teacher.path, "its weights or its tokenizer have other bytes now")
    lm = opened(run.teacher.path, _WHERE, run.train.device).lm
    if lm.config.max_seq < run.train.seq:
        got, allowed = f"one that reads {lm.config.max_seq}", f"read the {run.train.seq} tokens of a row"
        fix = f"pass seq={lm.config.max_seq}"
        raise UsageError(word("the teacher", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return lm


def _changed(path: str, problem: str) -> CheckpointError:
    fix = "bring that model back, or begin another run with another teacher"
    return CheckpointError(word(path, got=problem, allowed="be the recorded teacher", where=_WHERE, fix=fix))
