"""What a model's folder holds, known before any weight is read."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Literal

import torch

from turnout.errors import CheckpointError
from turnout.expects import PATH, expects
from turnout.hub import located
from turnout.models.checkpoint.few_bits import held_config
from turnout.models.checkpoint.own import describe, read_json
from turnout.models.checkpoint.survey import survey
from turnout.models.config import LMConfig

__all__ = ["Peek", "peek"]


@dataclasses.dataclass(frozen=True)
class Peek:
    """A model on disk.

    Args:
        kind: who wrote the folder: "transformers", or "turnout" with ``save``.
        architecture: the class in transformers, else "LM".
        config: of the model.
        dtype: of its weights.
        notes: what else is to be known of them: that they are packed, or of several dtypes.
        wider_bytes: how much more those of wider dtypes take on the disk.
        stored_as: of a folder of transformers whose weights are stored in fewer bits: how.
        held: the configuration with these weights held in few bits, as ``from_hf(packed=True)`` does; None where that
            cannot be. ``config`` is of the numbers that they stand for.

    >>> config = LMConfig(vocab_size=8, width=8, layers=1, heads=2)
    >>> Peek("turnout", "LM", config, torch.float32).kind
    'turnout'

    Source: none; plain bookkeeping.
    """

    kind: Literal["transformers", "turnout"]
    architecture: str
    config: LMConfig
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    wider_bytes: int = 0
    stored_as: Literal["mxfp4", "fp8", "compressed-tensors"] | None = None
    held: LMConfig | None = None


@expects(path=PATH)
def peek(path: str | Path, *, dtype: torch.dtype | None = None) -> Peek:
    """The configuration of the model in a folder, with the headers of all weights checked against it.

    Args:
        path: a folder of transformers, or one that ``save`` wrote; or its name on the hub.
        dtype: that the weights will be read in, where they are stored in several; None for the one they are stored in.

    Raises:
        CheckpointError: as ``from_hf`` and ``load``; what only the bytes of the weights tell is not seen.

    >>> import tempfile
    >>> from turnout.models import LM, checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(folder, LM(LMConfig(vocab_size=8, width=8, layers=1, heads=2)))
    ...     peek(folder).config.width
    8

    Source: none; the headers of safetensors.
    """
    path = located(path, where="turnout.models.checkpoint.peek").folder
    keys = read_json(path / "config.json", "turnout.models.checkpoint.peek")
    if "model_type" in keys or "architectures" in keys:
        found = survey(path, dtype)
        name, held = found.family.architecture, None
        if found.packed.kinds:
            with contextlib.suppress(CheckpointError):
                held = held_config(path, found)
        of = (found.config, found.dtype, found.notes(), found.wider_bytes)
        return Peek("transformers", name, *of, found.packed.method if found.packed.scales else None, held)
    config, stored = describe(path)
    return Peek("turnout", "LM", config, dtype or stored)
