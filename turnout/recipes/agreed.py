"""What the ranks of a run must have in common before its first step, and who has something else."""

import functools
import hashlib
from pathlib import Path

import torch
from torch import nn

from turnout import __version__
from turnout.recipes.run import Run
from turnout.run.ranks.processes import agree, shared
from turnout.types.plan import Plan

__all__ = ["agree_on_run", "agree_on_tokens", "agree_on_weights", "code_digest", "weights_digest"]


@functools.cache
def code_digest() -> str:
    """SHA-256 over turnout's own source files: their names and their bytes.

    >>> len(code_digest())
    64

    Source: none; SHA-256.
    """
    root, total = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root).as_posix()}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names and the numbers of a model's parameters and persistent buffers.

    >>> weights_digest(nn.Linear(1, 1)) == weights_digest(nn.Linear(1, 1))
    False

    Source: none; SHA-256.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def agree_on_run(run: Run, plan: Plan) -> None:
    """Stops every rank where one has other code, another torch, another plan or another run.

    Raises:
        UsageError: on every rank, naming what differs and where.

    Source: none; plain bookkeeping.
    """
    same = "install the same turnout on every machine, and start all ranks anew"
    agree("turnout's code", f"turnout {__version__} ({code_digest()[:16]})", fix=same)
    agree("torch", torch.__version__, fix="install the same torch on every machine")
    agree("the plan", f"{plan.layout} ({plan.digest})", fix="give every rank the same --layout or --plan")
    fields = {name: repr(value) for name, value in run.fields().items()} | {"start": repr(run.start)}
    others = shared(fields)
    for name in sorted({name for each in others for name in each}):
        if len({each.get(name, "nothing") for each in others}) > 1:
            agree(name, fields.get(name, "nothing"), fix="give every rank the same recipe and fields")


def agree_on_weights(model: nn.Module) -> None:
    """Stops every rank where one would begin with other weights.

    Raises:
        UsageError: on every rank, naming those that differ.

    Source: none; plain bookkeeping.
    """
    fix = "start every rank from the same seed, or from the same model's files"
    agree("the initial weights", weights_digest(model)[:16], fix=fix)


def agree_on_tokens(tokens_digest: str) -> None:
    """Stops every rank where one reads other text.

    Raises:
        UsageError: on every rank, naming those that differ.

    Source: none; plain bookkeeping.
    """
    agree("the tokens", tokens_digest[:16], fix="put --out, or --tokens, in a folder that all machines share")
