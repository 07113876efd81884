"""Which architecture a configuration is, or exactly what keeps it from being one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from turnout.errors import TurnoutError, UsageError, nearest
from turnout.models.config import LMConfig
from turnout.models.families import FAMILIES
from turnout.models.families.family import Family, Keys
from turnout.models.families.meaning import meaning

__all__ = ["architecture_of", "family_of", "obstacles"]

# How a user gets rid of a difference, where there is a way; by the field's name. The model's own cannot be changed.
_FIXES = {
    "moe.factored": "write the experts' matrices out (--densify, turnout.reshape.densify)",
    "quantized": "write its weights out in full (--densify, turnout.reshape.densify)",
    "moe.distinct": "give each expert weights of its own (--densify, turnout.reshape.densify)",
    "moe.per_layer": "train with as many experts in every layer (per_layer=None)",
    "moe.router_options.capacity_factor": "train with a router that drops no tokens (capacity_factor=None)",
    "moe.router": "train with the router TopK, or with GroupLimited",
    "activation": "train with activation='swiglu'",
    "moe.activation": "train with activation='swiglu'",
}
_KEEP = "nothing to set, it is the model's own"


def architecture_of(config: LMConfig, *, prefer: str | None = None, only: str | None = None) -> tuple[Family, LMConfig]:
    """The architecture that computes exactly what this configuration computes, and the configuration as it has it.

    A configuration is written in an architecture's own keys and read back: what differs then is what the architecture
    has no words for. Where none has words for it as it is, one may with parts that add nothing (``Family.silent``).

    Args:
        config: of the model.
        prefer: the model_type to choose where several fit, as that of the folder the model came from.
        only: the name of the one architecture that is wanted; None for any.

    Raises:
        UsageError: none fits; says every difference to the nearest, each with what to change.
        UnknownNameError: ``only`` is not a name.
    """
    known = {family.architecture: family for family in FAMILIES}
    if only is not None and only not in known:
        raise nearest(only, known, kind="architecture", where="turnout.models.checkpoint.to_hf")
    families = sorted(FAMILIES, key=lambda family: family.model_type != prefer)
    families = [family for family in families if only in (None, family.architecture)]
    found = {family.architecture: obstacles(config, family) for family in families}
    for family in families:
        if not found[family.architecture]:
            return family, config
    for family in families:
        more = family.silent(config) if config.quantized is None else None
        if more is not None and not (less := obstacles(more, family)):
            return family, more
        if more is not None and len(less) < len(found[family.architecture]):
            found[family.architecture] = less
    near = min(families, key=lambda f: (f.routed != (config.moe is not None), len(found[f.architecture])))
    reasons = "".join(f"\n  - {reason}" for reason in found[near.architecture])
    others = [name for name in found if name != near.architecture]
    raise UsageError(
        f"the model cannot be written as {'any architecture of transformers' if only is None else only}. "
        f"Nearest: {near.architecture}, if it were not for\n{reasons.lstrip(chr(10))}"
        + (f"\nAlso tried: {', '.join(others)}." if others else "")
        + "\nNearest fix: keep it in turnout's own format (turnout convert --as model, turnout.models.checkpoint.save)"
        + ", which holds every model."
    )


def obstacles(config: LMConfig, family: Family) -> list[str]:
    """Every reason why this configuration cannot be of this architecture, each with the nearest fix."""
    if family.routed != (config.moe is not None):
        has = "experts" if family.routed else "no experts"
        fix = "make it a mixture of experts (--to moe)" if family.routed else "start from its dense model"
        return [f"{family.architecture} has {has}, the model has {'none' if family.routed else 'some'}: {fix}"]
    if config.quantized is not None:
        why = _few_bits(config, family)
        return [*([why] if why else []), *obstacles(dataclasses.replace(config, quantized=None), family)]
    try:
        theirs = meaning(family.read(Keys(family.write(config), {}, family.aliases)))
    except TurnoutError as error:
        if config.moe is not None and config.moe.top_k == 1 < config.moe.num_experts:
            two = dataclasses.replace(config.moe, top_k=2, router="TopK", router_options={"renormalize": True})
            others = obstacles(dataclasses.replace(config, moe=two), family)
            fix = "train with top_k=2, or as Qwen2MoeForCausalLM, which leaves the weights as they are"
            return [f"moe.top_k is 1, and there the weights of a token sum to 1: {fix}", *others]
        return [str(error)]
    ours = meaning(config)
    reasons = []
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            fix = _FIXES.get(name, _KEEP)
            reasons.append(f"{name} is {ours.get(name)!r}, there it would be {theirs.get(name)!r}: {fix}")
    return reasons + family.limits(config)


def _few_bits(config: LMConfig, family: Family) -> str | None:
    """Why maps in few bits cannot be written in this architecture."""
    quantized, names = config.quantized, family.layouts[0]
    assert quantized is not None
    if quantized.codes in family.unpacks and quantized.parts == ("experts",):
        return None
    if quantized.codes == "mxfp4":
        return f"quantized.codes is 'mxfp4', which GptOssForCausalLM has of experts alone: {_FIXES['quantized']}"
    if quantized.codes != "int":
        return f"quantized.codes is {quantized.codes!r}, there it would be 'int': round with codes='int' (--codes int)"
    whole = _FIXES["quantized"]
    if names.views is not None:
        return f"{family.architecture} has no linear maps that others read in few bits: {whole}"
    if names.fused is not None and "experts" in quantized.parts:
        return (
            f"{family.architecture} has all experts of a layer in one tensor, which nobody reads in few bits: {whole}"
        )
    return None


def family_of(keys: Mapping[str, Any], families: Sequence[Family] = FAMILIES) -> Family | None:
    """The architecture of a config.json; None when it is not one of ours.

    transformers goes by ``model_type``. A model of several names is known by the class that it says it is.
    """
    kind, names = keys.get("model_type"), [str(name).lower() for name in keys.get("architectures") or []]
    for family in families:
        named = family.architecture.lower() in names
        if (kind == family.model_type and (named or not names)) or (kind in family.also_called and named):
            return family
    return None
