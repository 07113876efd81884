"""Adopt: the experts of a live transformers model run through turnout's executors, and can be put back.

transformers dispatches the forward pass of an experts module by a name in its configuration. ``register_backend`` adds
turnout's names to that table; ``adopt`` sets them where turnout computes the same function, and says where it does not.
Parameters, their names in the state dict, and the classes of all modules stay as they are.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from turnout import __version__
from turnout.errors import MissingExtraError, UsageError, nearest, word
from turnout.expects import expects
from turnout.run import EXECUTORS, execute
from turnout.types import ExpertWeights, Report, Routing
from turnout.types.weights import OAI_LIMIT, OAI_SLOPE

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["adopt", "register_backend", "release"]

# What transformers' decorator for experts leaves on every module of such a class.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "config")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where the one gate of its own is defined that turnout computes.
_CLAMPED = "transformers.models.gpt_oss.modeling_gpt_oss"
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
_BACKENDS = (*EXECUTORS, "kernels")  # the last by name alone, on CUDA
# What adopted modules remember for ``release``: the implementation, or the configuration, that they had before.
_BEFORE, _CONFIG_BEFORE = "_implementation_before_turnout", "_config_before_turnout"


def register_backend() -> tuple[str, ...]:
    """The names under which transformers can run experts with turnout; registers them, once or again.

    They are ``"turnout"``, which chooses an executor for every call, and ``"turnout:NAME"`` for each executor. Any
    model whose experts use the hook then takes them: ``model.set_experts_implementation("turnout")``, or
    ``from_pretrained(..., experts_implementation="turnout")``. Unlike ``adopt``, that asks nothing beforehand: experts
    that turnout cannot run raise an error when they are called.

    Returns:
        The names. There is no model to return: this function changes none.

    Raises:
        MissingExtraError: transformers is not installed, or is too old to have the hook.

    >>> register_backend()[:2]
    ('turnout', 'turnout:reference')

    Source: none; ``ALL_EXPERTS_FUNCTIONS`` of transformers.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise MissingExtraError(
            "turnout.adopt needs transformers 5.20 or newer, which is not installed. Nearest fix: "
            "pip install 'turnout[hf]'."
        ) from error
    functions = _functions()
    for name, function in functions.items():
        ALL_EXPERTS_FUNCTIONS.register(name, function)
    return tuple(functions)


@expects(hf_model=nn.Module)
def adopt(hf_model: Model, *, backend: str = "auto") -> tuple[Model, Report]:
    """The same model, with the experts of every mixture-of-experts block run by turnout; changed in place.

    Outputs and gradients stay what they were, up to the order of sums; parameters and the names in the state dict stay
    the very same, so Trainer, PEFT, ``generate`` and ``save_pretrained`` go on as before. Experts that turnout does not
    compute exactly (a gate of their own other than gpt-oss's, an unknown activation, quantised weights) keep their own
    implementation, and the report says which and why. Adopting again changes the backend.

    Args:
        hf_model: a transformers model, or any module around one.
        backend: the name of an executor in ``turnout.run``, or "auto".

    Returns:
        ``hf_model`` itself, and a report: ``adopted`` and ``left`` count modules, ``modules`` names the adopted ones,
        ``left_because`` gives each other one's reason. Where nothing could be adopted a warning says so too.

    Raises:
        MissingExtraError: transformers is not installed.
        UnknownNameError: no executor is called ``backend``.
        UsageError: the model has no experts.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    >>> model, report = adopt(MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, **sizes)))
    >>> report["modules"], model.get_experts_implementation()
    (['model.layers.0.mlp.experts'], {'': 'turnout'})

    Source: none; the experts hook of transformers, with Gale et al., 2022, "MegaBlocks", for the dispatch.
    """
    names = register_backend()
    if backend not in (*_BACKENDS, "auto"):
        raise nearest(backend, [*_BACKENDS, "auto"], kind="backend", where="turnout.adopt")
    found = _experts(hf_model)
    if not found:
        raise UsageError(
            word(
                "hf_model",
                got=f"{type(hf_model).__name__}, which has no experts",
                allowed="have mixture-of-experts blocks",
                where="turnout.adopt",
                fix="leave a dense model as it is",
            )
        )
    reasons = {name: reason for name, experts in found.items() if (reason := _why_not(experts))}
    fit = {name: experts for name, experts in found.items() if name not in reasons}
    before = sorted({str(_implementation(experts)) for experts in fit.values()} - set(names))
    for experts in fit.values():
        if _implementation(experts) not in names:
            setattr(experts, _BEFORE, _implementation(experts))
    shared = {id(experts.config) for experts in fit.values()}
    for name in reasons:
        # Blocks share their configuration: one that is left gets its own, which still says what it said.
        experts = found[name]
        if id(getattr(experts, "config", None)) in shared:
            setattr(experts, _CONFIG_BEFORE, experts.config)
            experts.config = copy.copy(experts.config)  # pyrefly: ignore[bad-argument-type]
    for experts in fit.values():
        _set(experts, "turnout" if backend == "auto" else f"turnout:{backend}")
    return hf_model, _adopted(list(fit), reasons, backend, before)


@expects(hf_model=nn.Module)
def release(hf_model: Model) -> tuple[Model, Report]:
    """The same model as before ``adopt``: every block has the implementation back that it had; changed in place.

    Args:
        hf_model: what ``adopt`` was given, a copy of it, or a module around it.

    Returns:
        ``hf_model`` itself, and a report: ``released`` counts modules, ``modules`` names them. Blocks whose
        implementation was set to something else since are left alone, and a note says so.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    >>> model, _ = adopt(MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, **sizes)))
    >>> model, report = release(model)
    >>> report["released"], model.get_experts_implementation()
    (1, {'': 'grouped_mm'})

    Source: none; plain bookkeeping.
    """
    names = tuple(_functions())
    modules = dict(hf_model.named_modules())
    adopted = {name: module for name, module in modules.items() if _BEFORE in vars(module)}
    changed = [name for name, module in adopted.items() if _implementation(module) not in names]
    for name, module in adopted.items():
        before = vars(module).pop(_BEFORE)
        if name not in changed:
            _set(module, before)
    for module in modules.values():
        if _CONFIG_BEFORE in vars(module):
            module.config = vars(module).pop(_CONFIG_BEFORE)
    released = [name for name in adopted if name not in changed]
    notes = tuple(f"{name} had been given another implementation since; it was left alone" for name in changed)
    return hf_model, Report("release", {"released": len(released), "modules": released}, notes, _context())


def _experts(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that holds stacked experts, by name: those of the hook, and those that look like it."""
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, flag) for flag in _FLAGS) or type(module).__name__.endswith("Experts")
    }


def _implementation(experts: nn.Module) -> str | None:
    return experts.config._experts_implementation  # pyrefly: ignore[missing-attribute]


def _set(experts: nn.Module, name: str | None) -> None:
    # What set_experts_implementation writes; it offers no way to change one part of a model and not another.
    experts.config._experts_implementation_internal = name  # pyrefly: ignore[missing-attribute, bad-argument-type]


def _adopted(modules: list[str], reasons: dict[str, str], backend: str, before: list[str]) -> Report:
    kinds: dict[str, int] = {}
    for reason in reasons.values():
        kinds[reason] = kinds.get(reason, 0) + 1
    notes = tuple(f"{count} left as they were: {reason}" for reason, count in kinds.items())
    if not modules:
        warnings.warn(f"turnout.adopt changed nothing; {'; '.join(notes)}", stacklevel=3)
    values: dict[str, Any] = {"adopted": len(modules), "left": len(reasons), "backend": backend, "before": before}
    return Report("adopt", values | {"modules": modules, "left_because": reasons}, notes, _context())


def _context() -> dict[str, Any]:
    import transformers

    return {"turnout": __version__, "transformers": transformers.__version__, "torch": torch.__version__}


# ---- what transformers calls


@functools.cache
def _functions() -> dict[str, Callable[..., Tensor]]:
    named = {f"turnout:{name}": functools.partial(_call, backend=name) for name in dict.fromkeys(_BACKENDS)}
    return {"turnout": functools.partial(_call, backend="auto"), **named}


def _call(experts: nn.Module, *arguments: Tensor, backend: str) -> Tensor:
    # torch.compile leaves the whole block out: one break in its graph, rather than one at each thing it cannot trace.
    forward = torch.compiler.disable(_forward) if torch.compiler.is_compiling() else _forward
    return forward(experts, *arguments, backend=backend)


def _forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: str
) -> Tensor:
    """(T, D) the weighted sum of each token's experts, as the implementations of transformers give it."""
    if reason := _unfit(experts):
        raise UsageError(
            word(
                "the experts",
                got=f"{type(experts).__name__}: {reason}",
                allowed="be ones that turnout computes exactly",
                where="the experts implementation 'turnout'",
                fix="use turnout.adopt(model), which leaves such blocks as they are and says so",
            )
        )
    weights = _weights(experts)
    x_TD, dtype = hidden_states, hidden_states.dtype
    if x_TD.dtype != weights.up_EDH.dtype and not torch.is_autocast_enabled(x_TD.device.type):
        x_TD = x_TD.to(weights.up_EDH.dtype)  # the default implementation does so too
    routing = _routing(top_k_index, top_k_weights, weights.num_experts, getattr(experts, "_is_expert_parallel", False))
    return execute(x_TD, routing, weights, backend=backend).to(dtype)


def _routing(index_TK: Tensor, weight_TK: Tensor, num_experts: int, sharded: bool) -> Routing:
    """The decision; the index E, by which transformers means an expert elsewhere, is no entry here."""
    # On the CPU looking is free; elsewhere it would wait for the device, and only sharded experts can be meant.
    if (sharded or index_TK.device.type == "cpu") and index_TK.numel() and int(index_TK.max()) >= num_experts:
        return Routing.from_topk(index_TK, weight_TK, num_experts=num_experts, dropped=num_experts)
    return Routing.from_topk(index_TK, weight_TK, num_experts=num_experts)


def _weights(experts: Any) -> ExpertWeights:
    """Views of the module's parameters, in "input, output" order; nothing is copied."""
    if _is_clamped(experts):
        name, activation = "gate_up_proj", "swiglu_oai"
    elif experts.has_gate:
        name, activation = "gate_up_proj", _GATED.get(_activation(experts) or "")
    else:
        name, activation = "up_proj", _activation(experts)
    up, down = getattr(experts, name), experts.down_proj
    return ExpertWeights(
        up if experts.is_transposed else up.transpose(1, 2),
        down if experts.is_transposed else down.transpose(1, 2),
        getattr(experts, f"{name}_bias") if experts.has_bias else None,
        experts.down_proj_bias if experts.has_bias else None,
        activation,  # pyrefly: ignore[bad-argument-type] - one of ours: _why_not has looked
        interleaved=experts.has_gate and not experts.is_concatenated,
    )


@functools.cache
def _activations() -> dict[type, str]:
    """Our name for what the classes of activation compute."""
    from transformers import activations

    kinds: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu", nn.GELU: "gelu", activations.GELUActivation: "gelu"}
    named = {"SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
    named |= {"NewGELUActivation": "gelu_tanh"}
    return kinds | {kind: ours for name, ours in named.items() if (kind := getattr(activations, name, None))}


def _activation(experts: Any) -> str | None:
    function = getattr(experts, "act_fn", None)
    if isinstance(function, nn.GELU) and function.approximate != "none":
        return "gelu_tanh"
    return _activations().get(type(function))


def _is_clamped(experts: Any) -> bool:
    """Whether the gate is that of gpt-oss, with the constants that it was published with."""
    gate = getattr(type(experts), "_apply_gate", None)
    if not experts.has_gate or getattr(gate, "__module__", None) != _CLAMPED:
        return False
    return not experts.is_concatenated and (experts.alpha, experts.limit) == (OAI_SLOPE, OAI_LIMIT)


def _why_not(experts: Any) -> str | None:
    """Why turnout does not run this module, in words that follow a colon; None when it does."""
    kind = type(experts).__name__
    if not all(hasattr(experts, flag) for flag in _FLAGS):
        return f"{kind} does not use the experts hook of transformers"
    if _implementation(experts) == "deepgemm_megamoe":
        return "transformers locks deepgemm_megamoe when it loads the model"
    return _unfit(experts)


def _unfit(experts: Any) -> str | None:
    """The same for a module that the hook has called; asked at every call, so it must cost little."""
    kind = type(experts).__name__
    clamped = _is_clamped(experts)
    if not experts.is_concatenated and experts.has_gate and not clamped:
        return "gate and value alternate, under a gate that turnout does not know"
    if getattr(experts, "has_post_expert_norm", False):
        return "each expert ends in a norm of its own"
    gate = getattr(type(experts), "_apply_gate", None)
    if experts.has_gate and not clamped and getattr(gate, "__module__", None) != "transformers.integrations.moe":
        return f"{kind} has a gate of its own (clamped or scaled)"
    if not clamped and _activation(experts) is None:
        return f"turnout has no activation {type(getattr(experts, 'act_fn', None)).__name__}"
    names = ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
    names += [f"{name}_bias" for name in names] if experts.has_bias else []
    for name in names:
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor):
            return f"{kind} has no stacked weight {name}"
        if weight.dtype not in _FLOATS:
            return f"{name} is {str(weight.dtype).removeprefix('torch.')}, a quantised weight"
    return None
