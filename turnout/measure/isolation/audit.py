"""Runs every probe against a layer of experts or a model, whoever made it."""

from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, TurnoutError, UsageError, word
from turnout.expects import expects
from turnout.measure.isolation.finding import Finding, Isolation
from turnout.measure.isolation.overflow import overflow
from turnout.measure.isolation.padding import padding
from turnout.measure.isolation.position import position
from turnout.measure.isolation.repeat import repeat
from turnout.measure.isolation.rounding import Rounding
from turnout.measure.isolation.scale import scale
from turnout.measure.isolation.shape import shape
from turnout.measure.isolation.subject import Layer, Model, routed_layers
from turnout.measure.isolation.threads import threads
from turnout.measure.isolation.ties import ties
from turnout.measure.observe import evaluating

__all__ = ["audit"]

_WHERE = "turnout.measure.audit"
# What rounding is given: as the certificate of equal models, but of one model beside itself.
_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_PROBES = (overflow, ties, scale, padding, shape, position, threads)


@expects(module=nn.Module)
def audit(
    module: nn.Module,
    *,
    width: int | None = None,
    vocabulary: int | None = None,
    length: int | None = None,
    batches: int = 40,
    bound: float | None = None,
    seed: int = 0,
    name: str = "",
) -> Isolation:
    """Whether what a network gives one user depends on the others in the batch, by which way, and how much.

    A victim's rows stay as they are while everything beside them changes. In a model the loudness of neighbours is
    tried on each layer of experts inside, which a norm before it would hide. It runs in evaluation mode without
    gradients, and puts modes back.

    Args:
        module: a layer, called with (B, S, D) or (T, D), or a model, called with ids (B, S). Tuples, transformers'
            outputs and ours are understood.
        width: D of a layer; None asks its own attributes and its router.
        vocabulary: ids of a model; None asks its configuration.
        length: tokens a row; None for 4 of a layer, 12 ids of a model.
        batches: how many batches a probe tries at least, 4 or more.
        bound: the relative difference up to which rounding explains it. None for 1e-4, 3e-2 in bf16, 1e-2 in fp16,
            and in those two for what float32 does not show (``Rounding``).
        seed: of the rows.
        name: of the module, for the report; None for its class.

    Raises:
        UsageError: neither width nor vocabulary is known, or outputs are not finite or depend on nothing.

    >>> print(audit(nn.Linear(8, 8), width=8, batches=4)["scale"].leak)
    none

    Source: Hayes et al., 2024, "Buffer Overflow in Mixture of Experts"; Yona et al., 2024, "Stealing User Prompts from
    Mixture of Experts"; vllm-project/vllm, issue 57016; He, 2025, "Defeating Nondeterminism in LLM Inference".
    """
    _check_asked(batches, length, width, bound)
    subject = _subject(module, width, vocabulary, length, name or type(module).__name__)
    limit = _BOUNDS.get(subject.dtype, 1e-4) if bound is None else bound
    with evaluating(module):
        _check_alive(subject, torch.Generator().manual_seed(seed))
        findings = [_probed(repeat, subject, None, seed, batches, limit)]
        if findings[0].leak == "none":
            rounding = Rounding(subject, seed) if bound is None else None
            findings += [_probed(probe, subject, rounding, seed, batches, limit) for probe in _PROBES]
        else:  # the rest cannot be told from chance
            why = "the same batch gives other outputs by itself"
            findings += [Finding(probe.__name__, "not run", 0, 0, 0.0, why) for probe in _PROBES]
    context = {
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": str(subject.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batches": batches,
        "seed": seed,
    }
    return Isolation(subject.name, tuple(findings), limit, context)


def _check_asked(batches: int, length: int | None, width: int | None, bound: float | None) -> None:
    for what, number, least in (("batches", batches, 4), ("length", length, 1), ("width", width, 1)):
        if number is not None and number < least:
            raise UsageError(word(what, got=number, allowed=f"be {least} or more", where=_WHERE, fix="leave it out"))
    if bound is not None and not 0 < bound < float("inf"):
        allowed, fix = "be a finite number above 0", "leave it out; whether a bit differs is told beside it"
        raise UsageError(word("bound", got=bound, allowed=allowed, where=_WHERE, fix=fix))


def _probed(
    probe: Any, subject: Layer | Model, rounding: Rounding | None, seed: int, batches: int, bound: float
) -> Finding:
    if probe is not scale or isinstance(subject, Layer):
        found = probe(subject, torch.Generator().manual_seed(seed), batches, bound)
        return found if rounding is None else rounding.settled(found, probe, batches)
    layers = routed_layers(subject, subject.rows(8, torch.Generator().manual_seed(seed)))
    each = [_probed(scale, one, rounding and Rounding(one, seed), seed, batches, bound) for one in layers.values()]
    if not each:
        why = "no layer of experts was found inside: none has a router or experts right inside"
        return Finding("scale", "not run", 0, 0, 0.0, why, "audit the layer itself")
    return max(each, key=lambda one: (one.leak == "numbers", one.difference, one.outputs))


def _check_alive(subject: Layer | Model, chance: torch.Generator) -> None:
    """Refuses a network whose output of a row does not depend on the row."""
    one, other, rest = subject.rows(1, chance), subject.rows(1, chance), subject.rows(3, chance)
    try:
        y, z = (subject.run(torch.cat((row, rest)))[0] for row in (one, other))
    except Exception as error:  # of anybody's network: what it says is the answer
        if isinstance(error, TurnoutError) and not isinstance(error, ShapeError):
            raise
        said = str(error).partition(" Nearest fix")[0].removesuffix(".")
        got, fix = f"{type(error).__name__}: {said:.300}", "pass another length or width, as it takes them"
        allowed = f"run on rows of {subject.length} tokens"
        allowed += f" of {subject.width} numbers" if isinstance(subject, Layer) else ""
        raise UsageError(word("the network", got=got, allowed=allowed, where=_WHERE, fix=fix)) from error
    if torch.equal(y, z):
        got, fix = "the same for two different rows", "audit one that is trained or initialised, and does not drop all"
        raise UsageError(word("the output", got=got, allowed="depend on the input", where=_WHERE, fix=fix))


def _subject(
    module: nn.Module, width: int | None, vocabulary: int | None, length: int | None, name: str
) -> Layer | Model:
    config = getattr(module, "config", None)
    if width is None and vocabulary is None:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocabulary = getattr(text, "vocab_size", None)
    if isinstance(vocabulary, int):
        return Model(module, vocabulary, length=length or 12, name=name)
    width = _width(module) if width is None else width
    if width is None:
        got, fix = name, "pass width=D of a layer"
        allowed = "say how wide its input is, or how many ids it knows"
        raise UsageError(word("the network", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return Layer(module, width, length=length or 4, name=name)


def _width(module: nn.Module) -> int | None:
    """D, by what layers call it, or by the matrix of the router inside."""
    for one in (module, getattr(module, "config", None)):
        for name in ("width", "hidden_size", "d_model", "model_dim", "hidden_dim"):
            if isinstance(getattr(one, name, None), int):
                return getattr(one, name)
    for name, inside in module.named_modules():
        weight = getattr(inside, "weight", None)
        if name.rpartition(".")[2] in ("router", "gate", "wg", "policy", "classifier") and isinstance(weight, Tensor):
            return weight.shape[-1]
    return None
