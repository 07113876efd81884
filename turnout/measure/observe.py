"""What the modules of a network take and give in one call, and which modules of two networks are the same."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, nearest, word
from turnout.types import Routing

__all__ = ["Key", "Record", "evaluating", "layer_of", "match", "observe", "part_of"]

# One thing seen: the module's name, the how-manieth of its calls, and what of it.
Key = tuple[str, int, Literal["takes", "routes", "gives"]]
Model = nn.Module | Callable[[Tensor], Any]

# The first pattern that fits the innermost part of a module's name says what it does; then the next part outwards.
_PARTS = (
    ("norm", re.compile(r"norm|^ln_")),
    ("shared expert", re.compile(r"shared")),
    ("router", re.compile(r"^(router|gate|wg|policy)$")),
    ("experts", re.compile(r"^(experts?|bank|paths)$")),
    ("attention", re.compile(r"attn|attention|rope|rotary")),
    ("embedding", re.compile(r"emb|^w[tp]e$")),
    ("head", re.compile(r"^(lm_head|head|logits)$")),
    ("feed-forward", re.compile(r"^(ff|mlp|ffn|feed_forward|block_sparse_moe|moe)$")),
)
# What others call the parts of a block; ours first.
_WORDS = {
    "attention": ("self_attn", "attn", "self_attention"),
    "attention_norm": ("input_layernorm", "ln_1"),
    "ff_norm": ("post_attention_layernorm", "pre_feedforward_layernorm", "ln_2"),
    "ff_out_norm": ("post_feedforward_layernorm",),
    "ff": ("mlp", "feed_forward", "block_sparse_moe", "ffn"),
    "router": ("gate",),
    "bank": ("experts",),
    "shared": ("shared_expert", "shared_experts", "shared_mlp"),
    "qkv": ("c_attn",),
    "out": ("o_proj", "c_proj"),
    "embedding": ("embed_tokens", "wte"),
    "head": ("lm_head",),
    "norm": ("ln_f",),
}
_CANONICAL = {other: ours for ours, others in _WORDS.items() for other in others}
# Where there is a norm after the feed-forward layer, the one that is called so stands after attention as well.
_AFTER = _CANONICAL | {"post_attention_layernorm": "attention_out_norm"}


def part_of(name: str) -> str | None:
    """What a module does, by its name: "attention" for ``blocks.0.attention.qkv``; None where no part says so."""
    for piece in reversed(name.split(".")):
        for part, pattern in _PARTS:
            if pattern.search(piece):
                return part
    return None


def layer_of(name: str) -> str:
    """The block that a module is in, ``blocks.0``; outside of blocks, what it does."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else part_of(name) or name


# ---- which modules are the same


def match(a: nn.Module, b: nn.Module, names: Mapping[str, str | None]) -> dict[str, str]:
    """Name in A -> name in B: as ``names`` says, else the same name, else the same place under another name.

    Args:
        a: the first network.
        b: the second.
        names: modules of A and their counterparts in B, with all that is inside; None for none.

    Raises:
        UnknownNameError: a name that the network does not have.
    """
    ours = [name for name, _ in a.named_modules() if name]
    theirs = {name for name, _ in b.named_modules() if name}
    for one, other in names.items():
        if one not in ours:
            raise nearest(one, ours, kind="module of A", where="the map")
        if other is not None and other not in theirs:
            raise nearest(other, theirs, kind="module of B", where="the map")
    found: dict[str, str] = {}
    for name in ours:
        mapped = _mapped(name, names)
        if mapped is not None and mapped in theirs:
            found[name] = mapped
    left = _places(sorted(theirs - set(found.values())))
    for name, place in ((name, place) for place, name in _places(ours).items()):
        if name not in found and place in left and _mapped(name, names) == name:
            found[name] = left[place]
    return {name: found[name] for name in ours if name in found}


def _mapped(name: str, names: Mapping[str, str | None]) -> str | None:
    above = [one for one in names if name == one or name.startswith(f"{one}.")]
    if not above:
        return name
    nearest_above = max(above, key=len)
    target = names[nearest_above]
    return None if target is None else target + name[len(nearest_above) :]


def _places(names: list[str]) -> dict[str, str]:
    """Canonical name -> name, of those that have one for themselves."""
    found: dict[str, list[str]] = {}
    after = any(name.rpartition(".")[2] == "post_feedforward_layernorm" for name in names)
    words = _AFTER if after else _CANONICAL
    for name in names:
        inside = re.sub(r"^(?:.*?\.)?(\d+)(?=\.|$)", r"blocks.\1", name)
        pieces = inside.split(".") if inside != name or inside.startswith("blocks.") else name.split(".")[-1:]
        found.setdefault(".".join(words.get(piece, piece) for piece in pieces), []).append(name)
    return {place: those[0] for place, those in found.items() if len(those) == 1}


# ---- what they take and give


@dataclasses.dataclass(eq=False)
class Record:
    """One call of a network: its logits, and what its modules took, gave and were routed by, in the order of things."""

    logits: Tensor
    values: dict[Key, Tensor] = dataclasses.field(default_factory=dict)
    routings: dict[Key, Routing] = dataclasses.field(default_factory=dict)
    order: list[Key] = dataclasses.field(default_factory=list)
    ran: set[str] = dataclasses.field(default_factory=set)
    # Modules that were given a decision: rows inside them stand in the order of experts, which may be renamed.
    routed: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def evaluating(*models: Model) -> Iterator[None]:
    """Evaluation mode without gradients, and every module's own mode again afterwards."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def observe(model: Model, id_BS: Tensor, names: Mapping[str, str], *, values: bool) -> Record:
    """Runs the model once and looks at its modules.

    Args:
        model: gives logits (B, S, V), or something that has them.
        id_BS: (B, S) its input.
        names: the modules to look at, by their names, and the names to note them by; the others are noted as ran.
        values: keep the tensors too, not only the routings. They are copied to the CPU.

    Raises:
        UsageError: the model gives no logits (B, S, V).
    """
    record, handles = Record(torch.empty(0)), []
    if isinstance(model, nn.Module):
        device = next((tensor.device for tensor in model.parameters()), id_BS.device)
        id_BS = id_BS.to(device)
        for name, module in model.named_modules():
            if name:
                look = _Look(record, names.get(name), name, id_BS.shape, values)
                handles.append(module.register_forward_pre_hook(look.before, with_kwargs=True))
                handles.append(module.register_forward_hook(look.after))
    try:
        record.logits = _logits(model(id_BS), id_BS)
    finally:
        for handle in handles:
            handle.remove()
    return record


@dataclasses.dataclass
class _Look:
    """The hooks of one module."""

    record: Record
    noted: str | None
    name: str
    shape: torch.Size
    values: bool
    calls: int = 0

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.record.ran.add(self.name)
        given = [*args, *kwargs.values()]
        self._note("takes", _first(given))
        routing = _routing(module, given)
        if routing is not None:
            self.record.routed.append(self.name)
            self._route(routing)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Routing):
            self._route(output)
        elif self.noted is not None and part_of(self.noted) == "router" and isinstance(output, tuple):
            pass  # scores in the order of experts, which may be renamed: what the experts are then given counts
        else:
            self._note("gives", _first([output]))
        self.calls += 1

    def _note(self, kind: Literal["takes", "gives"], value: Tensor | None) -> None:
        if self.noted is None or not self.values or value is None or value.ndim < 2 or not value.is_floating_point():
            return
        if any(self.name.startswith(f"{name}.") for name in self.record.routed):
            return
        key: Key = (self.noted, self.calls, kind)
        self.record.order.append(key)
        self.record.values[key] = rows(value, self.shape).detach().to("cpu", copy=True)

    def _route(self, routing: Routing) -> None:
        if self.noted is None:
            return
        key: Key = (self.noted, self.calls, "routes")
        self.record.order.append(key)
        self.record.routings[key] = _on_cpu(routing)


def rows(value: Tensor, shape: torch.Size) -> Tensor:
    """(B·S, ...) where the tensor has a row for each position, else (N, last axis)."""
    count = shape[0] * shape[1]
    if tuple(value.shape[:2]) == tuple(shape) or value.shape[0] == count:
        return value.reshape(count, -1)
    return value.reshape(-1, value.shape[-1])


def _first(given: list[Any]) -> Tensor | None:
    """The first tensor, also inside of what layers give: tuples, and results with an ``output``."""
    for item in given:
        if isinstance(item, Tensor):
            return item
        inner = [*item] if isinstance(item, tuple | list) else [getattr(item, "output", None)]
        if inner and isinstance(inner[0], Tensor):
            return inner[0]
    return None


def _routing(module: nn.Module, given: list[Any]) -> Routing | None:
    """The decision that a module was given: a Routing, or as transformers does it indices and weights (T, K)."""
    found = next((item for item in given if isinstance(item, Routing)), None)
    experts = getattr(module, "num_experts", None)
    if found is not None or not isinstance(experts, int):
        return found
    matrices = [item for item in given if isinstance(item, Tensor) and item.ndim == 2]
    index = next((item for item in matrices if not item.is_floating_point()), None)
    if index is None or (index.numel() and int(index.max()) >= experts):
        return None
    weight = next((item for item in matrices if item.is_floating_point() and item.shape == index.shape), None)
    return None if weight is None else Routing.from_topk(index, weight, num_experts=experts)


def _on_cpu(routing: Routing) -> Routing:
    score_TE, routing = routing.score_TE, routing.detach()
    move = functools.partial(torch.Tensor.to, device="cpu", copy=True)
    return Routing(
        token_R=move(routing.token_R),
        weight_R=move(routing.weight_R),
        offset_E=move(routing.offset_E),
        num_tokens=routing.num_tokens,
        score_TE=None if score_TE is None else move(score_TE.detach()),
    )


def _logits(output: Any, id_BS: Tensor) -> Tensor:
    for name in ("logits_BSV", "logits"):
        output = getattr(output, name, output)
    output = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(output, Tensor) and output.ndim == 3 and output.shape[:2] == id_BS.shape:
        return output.detach()
    got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    allowed = f"give logits (B, S, V) for ids {tuple(id_BS.shape)}"
    fix = "pass a function that returns the logits of every position"
    raise UsageError(word("the model", got=got, allowed=allowed, where="turnout.measure.certify", fix=fix))
