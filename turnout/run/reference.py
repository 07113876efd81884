"""The obvious loop over experts: what every other executor must equal, in values and in gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.errors import ShapeError, UsageError, word
from turnout.run.composed import transformed
from turnout.types import ExpertWeights, Routing
from turnout.types.invariant import alike
from turnout.types.weights import GATED, OAI_LIMIT, OAI_SLOPE, Activation

__all__ = ["Executor", "activate", "as_reference", "by_reference", "prepare", "reference", "trains", "uncompiled"]

Executor = Callable[[Tensor, Routing, ExpertWeights], Tensor]

_ACTIVATE = "turnout.run.activate"
_PLAIN = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "reglu": F.relu,
    "swiglu_oai": lambda gate: gate * torch.sigmoid(OAI_SLOPE * gate),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def activate(hidden: Tensor, activation: str, *, interleaved: bool = False) -> Tensor:
    """What lies between the two products of a feed-forward expert.

    A gated activation takes (..., 2F), gate first and value last, and gives g(gate) * value of (..., F); a plain one
    keeps the shape. GELU is the exact one, with the error function; "geglu_tanh" and "gelu_tanh" have its approximation
    x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). "swiglu_oai" clamps gate and value first, g = min(gate, 7) and
    v = min(max(value, -7), 7), and gives g * sigmoid(1.702 g) * (v + 1).

    Args:
        hidden: (..., H), the up product.
        activation: one of "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "gelu", "gelu_tanh", "relu", "silu".
        interleaved: whether gate and value alternate, rather than being halves.

    Raises:
        UsageError: another name.

    >>> import torch
    >>> activate(torch.tensor([[-1.0, 2.0, 3.0, 4.0]]), "reglu")
    tensor([[0., 8.]])

    Source: Shazeer, 2020, "GLU Variants Improve Transformer"; GELU and its approximation as Hendrycks & Gimpel, 2016;
    "swiglu_oai" as OpenAI, 2025, "gpt-oss-120b & gpt-oss-20b Model Card", with the constants of the released code.
    """
    if activation not in _PLAIN:
        raise UsageError(
            word(
                "activation",
                got=activation,
                allowed=f"be one of {', '.join(_PLAIN)}",
                where="turnout.run",
                fix="pass activation='swiglu'",
            )
        )
    if activation in GATED:
        gate, value = (hidden[..., 0::2], hidden[..., 1::2]) if interleaved else hidden.chunk(2, dim=-1)
        if activation == "swiglu_oai":
            gate, value = gate.clamp(max=OAI_LIMIT), value.clamp(-OAI_LIMIT, OAI_LIMIT) + 1
        return alike(_PLAIN[activation], gate, _ACTIVATE) * value
    return alike(_PLAIN[activation], hidden, _ACTIVATE)


def uncompiled(executor: Executor) -> Executor:
    """The executor, left as it is by torch.compile, which cannot trace token counts that differ at every step."""

    @functools.wraps(executor)
    def run(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        # Decorating with torch.compiler.disable outright would import the compiler with turnout.
        chosen = torch.compiler.disable(executor) if torch.compiler.is_compiling() else executor
        return chosen(x_TD, routing, weights)

    return run


def prepare(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, cast_weights: bool = True
) -> tuple[Tensor, ExpertWeights]:
    """Checks that the three fit, and gives input and weights in the dtype of the products.

    That is the dtype they share, or autocast's own where autocast is on; gradients return in the dtype that was passed.
    Without ``cast_weights`` only the input is cast, and the executor sees to the weights.

    Raises:
        ShapeError: tokens, experts, width or hidden do not fit each other.
        UsageError: the dtypes differ and autocast is off.
    """
    fits = (
        x_TD.ndim == 2
        and x_TD.shape == (routing.num_tokens, weights.width)
        and routing.num_experts == weights.num_experts
        and weights.up_EDH.shape[2] == weights.hidden * (2 if weights.gated else 1)
        and weights.down_EFD.shape == (weights.num_experts, weights.hidden, weights.width)
    )
    if not fits:
        raise ShapeError(
            word(
                "x_TD, routing and weights",
                got=f"{tuple(x_TD.shape)}, {routing.num_tokens} tokens x {routing.num_experts} experts, "
                f"up {tuple(weights.up_EDH.shape)} and down {tuple(weights.down_EFD.shape)} of {weights.activation}",
                allowed="agree in T, D, E and F, with H = 2F for a gated activation and F otherwise",
                where="turnout.run",
                fix="take the routing from a router of this width and number of experts",
            )
        )
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        if not cast_weights:
            return x_TD.to(dtype), weights
        up_bias, down_bias = (b if b is None else b.to(dtype) for b in (weights.up_bias_EH, weights.down_bias_ED))
        up, down = weights.up_EDH.to(dtype), weights.down_EFD.to(dtype)
        cast = {"up_EDH": up, "down_EFD": down, "up_bias_EH": up_bias, "down_bias_ED": down_bias}
        return x_TD.to(dtype), dataclasses.replace(weights, **cast)
    if not x_TD.dtype == weights.up_EDH.dtype == weights.down_EFD.dtype:
        raise UsageError(
            word(
                "the dtypes of x, up and down",
                got=f"{x_TD.dtype}, {weights.up_EDH.dtype} and {weights.down_EFD.dtype}",
                allowed="be the same unless autocast is on",
                where="turnout.run",
                fix=f"pass x.to({weights.up_EDH.dtype}), or run under torch.autocast",
            )
        )
    return x_TD, weights


def trains(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> bool:
    """Whether a gradient will be asked for."""
    tensors = (x_TD, routing.weight_R, weights.up_EDH, weights.down_EFD, weights.up_bias_EH, weights.down_bias_ED)
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@uncompiled
def reference(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Each token's weighted sum of its experts' outputs, one expert after the other, with plain operations.

    y[t] = sum over the entries r of token t of weight_R[r] * expert_e(r)(x[t]), summed in fp32 or wider.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        weights: the experts.

    Returns:
        (T, D) in x's dtype; tokens without entries are zero.

    Raises:
        ShapeError: the three do not fit each other.
        UsageError: their dtypes differ and autocast is off.

    >>> import torch
    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> reference(torch.ones(1, 3), routing, weights)
    tensor([[6., 6., 6.]])

    Source: Shazeer et al., 2017, "Outrageously Large Neural Networks", equation 1.
    """
    dtype = x_TD.dtype
    x_TD, weights = prepare(x_TD, routing, weights)
    with torch.autocast(x_TD.device.type, enabled=False):
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
        bound_E = routing.bounds()
        for e in range(weights.num_experts):
            rows = slice(bound_E[e], bound_E[e + 1])
            token_C = routing.token_R[rows]
            hidden = x_TD.index_select(0, token_C) @ weights.up_EDH[e]
            if weights.up_bias_EH is not None:
                hidden = hidden + weights.up_bias_EH[e]
            out_CD = activate(hidden, weights.activation, interleaved=weights.interleaved) @ weights.down_EFD[e]
            if weights.down_bias_ED is not None:
                out_CD = out_CD + weights.down_bias_ED[e]
            y_TD = y_TD.index_add(0, token_C, out_CD.to(wide) * routing.weight_R[rows, None].to(wide))
        return y_TD.to(dtype)


def as_reference(executor: Executor) -> Executor:
    """The executor, and ``reference`` in its place under torch.func and forward mode, of which its code knows less."""

    @functools.wraps(executor)
    def run(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        return (reference if transformed() else executor)(x_TD, routing, weights)

    return run


def by_reference(routing: Routing, activation: Activation, interleaved: bool) -> Callable[..., Tensor]:
    """What an executor computes from x, the combine weights and the stacks, by operations that torch differentiates."""

    def run(x_TD: Tensor, weight_R: Tensor, *stacks: Any) -> Tensor:
        up, down = (stack.to(x_TD.dtype) for stack in stacks[:2])
        up_bias, down_bias = (bias if bias is None else bias.to(x_TD.dtype) for bias in stacks[2:])
        weights = ExpertWeights(up, down, up_bias, down_bias, activation, interleaved)
        return reference(x_TD, dataclasses.replace(routing, weight_R=weight_R), weights)

    return run
