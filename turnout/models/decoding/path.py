"""Which path a model's decoding takes: the compiled step where it computes exactly what the modules do, or theirs."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_torch

from turnout.decide import token
from turnout.layers import MoE
from turnout.models.attention import Attention, LatentAttention, Projection
from turnout.models.block import Block
from turnout.models.lm import LM
from turnout.models.norm import LayerNorm, RMSNorm
from turnout.models.rope import Rope
from turnout.paths import Bank, FeedForward, OffloadedBank, PackedBank, PackedFeedForward, PackedLinear, PackedWeight
from turnout.run.compiled import why_not_compiled
from turnout.run.compiled.engine import takes
from turnout.run.compiled.formats import knows
from turnout.run.compiled.tables import CODES
from turnout.run.composed import transformed
from turnout.run.product import replaced
from turnout.types import Packed

__all__ = ["decoding_path", "why_plain"]

# What the compiled step knows, and nothing that is derived from it.
_ROUTERS = (token.TopK, token.LossFree, token.GroupLimited, token.Switch, token.GShard)
_KNOWN = (
    LM, Block, Attention, LatentAttention, Projection, RMSNorm, LayerNorm, Rope, FeedForward, MoE, Bank,
    PackedLinear, PackedFeedForward,
    PackedBank, PackedWeight, OffloadedBank, nn.ModuleList, *_ROUTERS,
)  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def why_plain(lm: nn.Module) -> str | None:
    """Why decoding runs the model's own modules, in words; None where the compiled step computes the same.

    Asked once for a generation. Whatever the step does not know exactly is a reason: modules of other types or with
    hooks, adapters, other devices and dtypes, gradients, autocast.

    >>> from turnout.models import LMConfig
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2))
    >>> lm.rope = torch.compile(lm.rope, backend="eager")
    >>> "OptimizedModule" in why_plain(lm) or "numba" in why_plain(lm) or "TURNOUT" in why_plain(lm)
    True

    Source: none; plain bookkeeping.
    """
    if not lm.training and any(module.training for module in lm.modules()):
        return "some of the model's modules are training"
    return _why_not_here() or _why_modules(lm) or _why_tensors(lm)


def decoding_path(lm: nn.Module) -> str:
    """What generation runs after the prompt, in words: one compiled step a token, or the model's modules and why.

    >>> from turnout.models import LMConfig
    >>> decoding_path(torch.nn.Identity()).startswith("the model's modules, because")
    True

    Source: none; plain bookkeeping.
    """
    why = why_plain(lm)
    return "one compiled step a token" if why is None else f"the model's modules, because {why}"


def _why_not_here() -> str | None:
    if (why := why_not_compiled()) is not None:
        return why
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.compiler.is_compiling() or transformed():
        return "torch is tracing or transforming the model"
    if replaced():
        return "linear products go elsewhere (turnout.run.product.instead_of_linear)"
    return "hooks on all modules" if any(getattr(of_torch, f"_global{name}") for name in _HOOKS) else None


def _why_modules(lm: nn.Module) -> str | None:
    for name, module in lm.named_modules():
        where = name or "the model"
        if type(module) not in _KNOWN:
            return f"{where} is of type {type(module).__name__}"
        if "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS):
            return f"{where} has hooks, or a forward of its own"
        if any(getattr(module, added, None) is not None for added in ("added", "up_added", "down_added", "owners")):
            return f"{where} has something added to it, or experts on other processes"
        if getattr(module, "capacity_factor", None) is not None:
            return f"{where} limits what an expert takes of a batch"
        if getattr(module, "backend", "auto") != "auto":
            return f"{where} is told to run by {module.backend}"
        if isinstance(module, MoE) and module.router is None:
            return f"{where} has no router of its own"
        if isinstance(module, PackedWeight) and not knows(module.packed, torch.float32):
            return f"{where} has groups of {module.group}, which no kernel reads, or is no plain tensor of a CPU"
        if isinstance(module, OffloadedBank):
            for stack in module.stacks():
                if isinstance(stack, Packed) and not knows(stack, torch.float32):
                    return f"{where} has groups of {stack.group}, which no kernel reads"
    return None


def _why_tensors(lm: nn.Module) -> str | None:
    packed = {id(one) for module in lm.modules() if isinstance(module, PackedWeight) for one in module.buffers()}
    tensors: list[tuple[str, Tensor]] = [*lm.named_parameters(), *lm.named_buffers()]
    for name, tensor in tensors:
        if id(tensor) in packed:  # looked at above
            continue
        if not takes(tensor) or tensor.layout != torch.strided:
            return f"{name} is on {tensor.device}, or no plain tensor"
        if tensor.is_floating_point() and tensor.dtype not in CODES:
            return f"{name} is {tensor.dtype}"
        if tensor.ndim >= 2 and 1 not in (tensor.stride(-1), tensor.stride(-2)):
            return f"{name} lies in memory in strides of {tensor.stride()}"
    return None
