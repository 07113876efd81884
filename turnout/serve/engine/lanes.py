"""Which lane a model takes."""

import functools
import warnings
from pathlib import Path

from torch import nn

from turnout.errors import UsageError, word
from turnout.models.checkpoint.live import lm_or_itself
from turnout.models.decoding import Decoder
from turnout.models.decoding.path import why_plain
from turnout.models.generation import foreign_steps
from turnout.models.lm import LM
from turnout.models.with_lora import with_lora
from turnout.serve.engine.lane import Lane
from turnout.serve.engine.paged_lane import PagedLane
from turnout.serve.engine.plain_lane import PlainLane
from turnout.wrappers import unwrapped

__all__ = ["adapted", "lane_of", "say_beside"]


def lane_of(model: nn.Module, slots: int, cache_bytes: int | None, sharing: bool) -> Lane:
    """That of pages where the model is compiled and keys mean the same in texts of any length; else the plain one."""
    if isinstance(model, LM) and why_plain(model) is None and model.rope.border is None:
        return PagedLane(model, slots, cache_bytes, sharing)
    if cache_bytes is not None:
        why = (why_plain(model) or "longrope") if isinstance(model, LM) else "a model of transformers as it is"
        said = (
            f"cache_bytes={cache_bytes:,} has no effect: this model ({why}) keeps its keys and values for each request"
        )
        warnings.warn(f"{said}. Nearest fix: bound slots, and the length of texts.", UserWarning, stacklevel=3)
    return _plain(model)


def say_beside(cache_bytes: int, slots: int) -> None:
    """Says that requests of adapters keep their keys and values beside the budget."""
    said = (
        f"cache_bytes={cache_bytes:,} is for the model alone: requests of its adapters keep their keys and values "
        f"beside that, each by itself, {slots} at most"
    )
    warnings.warn(f"{said}. Nearest fix: leave room for them, or bound slots.", UserWarning, stacklevel=3)


def adapted(lm: nn.Module, adapter: str | Path | nn.Module) -> Lane:
    """The lane of a model with adapters, which shares its weights with the model."""
    inside = unwrapped(adapter) if isinstance(adapter, nn.Module) else _with_lora(lm, adapter)
    return _plain((inside if isinstance(inside, LM) else lm_or_itself(inside, fallback=True)).eval())


def _plain(model: nn.Module) -> Lane:
    if isinstance(model, LM):
        return PlainLane(functools.partial(Decoder, model), model.config.max_seq)
    return PlainLane(functools.partial(foreign_steps, model), None)


def _with_lora(model: nn.Module, adapter: str | Path) -> LM:
    if not isinstance(model, LM):
        got, fix = f"a {type(model).__name__}, run as it is", "attach it to the model, and pass that under its name"
        allowed = "be folders where the model is an LM"
        raise UsageError(word("adapters", got=got, allowed=allowed, where="turnout.serve.Engine", fix=fix))
    return with_lora(model, adapter)
