"""The routers that ``attach`` knows by name: from the adapters of one linear map to the module that chooses."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from turnout.decide.token import PHATGOOSE, SMEAR, Arrow, Glider, Poly
from turnout.errors import ShapeError, UsageError, nearest, word
from turnout.paths import LoRA, ScaLearn
from turnout.types import Routing

__all__ = ["ROUTERS", "Site", "check_options"]

_WHERE = "turnout.reshape.attach"


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One linear map that adapters change, as a builder of routers sees it.

    Args:
        module: the map's name in the model.
        paths: the adapters, filled.
        names: of the adapters, in the order of ``paths``.
        options: keywords for the router.
        shared: what builders leave there for the next maps of the same model.
        gates: of each adapter, what PHATGOOSE trained for it here, (D,); None where it has none.
        everyone: the names of all adapters of the model, also of those that do not change this map; empty is ``names``.

    >>> Site("layers.0.q_proj", LoRA(8, 4, ranks=(2, 2)), ("math", "code"), {"top_k": 1}).names
    ('math', 'code')

    Source: none; plain bookkeeping.
    """

    module: str
    paths: LoRA
    names: tuple[str, ...]
    options: Mapping[str, Any]
    shared: dict[object, nn.Module] = dataclasses.field(default_factory=dict)
    gates: tuple[Tensor | None, ...] = ()
    everyone: tuple[str, ...] = ()

    def top_k(self, most: int) -> int:
        """K, as asked or ``most``; where fewer adapters change this map than were asked for, all of those."""
        asked, here = self.options.get("top_k", most), len(self.names)
        if "top_k" not in self.options or here < asked <= len(self.everyone):
            return min(asked, here)
        return asked

    @property
    def width(self) -> int:
        """D, of what the map takes."""
        return self.paths.down.shape[1]


def _arrow(site: Site) -> nn.Module:
    options: dict[str, Any] = dict(site.options) | {"top_k": site.top_k(3)}  # 3 is what PEFT takes
    router = Arrow(site.width, len(site.names), **options)
    with torch.no_grad():
        router.weight.copy_(site.paths.directions())
    return router.requires_grad_(False)


def _phatgoose(site: Site) -> nn.Module:
    gate_ED = _gates(site, "phatgoose")
    options: dict[str, Any] = dict(site.options) | {"top_k": site.top_k(2)}
    router = PHATGOOSE(site.width, len(site.names), **options)
    with torch.no_grad():
        router.weight.copy_(gate_ED)
    return router


def _glider(site: Site) -> nn.Module:
    """The gates are in the adapters' folders; ``embeddings`` says, for each name, what the adapter is for."""
    gate_ED, options = _gates(site, "glider"), dict(site.options)
    embedding_EQ = _embeddings(site, options.pop("embeddings", None))
    every: dict[str, Any] = {"query_width": embedding_EQ.shape[1]} | options | {"top_k": site.top_k(2)}
    router = Glider(site.width, len(site.names), **every)
    with torch.no_grad():
        router.weight.copy_(gate_ED)
        router.embedding.copy_(embedding_EQ)
    router.embedding.requires_grad_(False)
    return router


def _gates(site: Site, router: str) -> Tensor:
    """(E, D) what PHATGOOSE trained for each adapter here."""
    gates = [gate for gate in site.gates if gate is not None]
    if len(gates) < len(site.names):
        without = [name for name, gate in zip(site.names, site.gates, strict=True) if gate is None]
        fix = "call turnout.reshape.train_gates(model, FOLDER, batches) for each of them, or use router='arrow'"
        got = f"none at {site.module} of {', '.join(without)}"
        allowed = f"be in the folder of every adapter for router={router!r}"
        raise UsageError(word("trained gates", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return torch.stack(gates)


def _embeddings(site: Site, said: Any) -> Tensor:
    """(E, Q) the embeddings of this map's adapters, from those of all by name."""
    said = said if isinstance(said, Mapping) else {}
    without = [name for name in site.names if name not in said]
    if without:
        fix = "pass router_options={'embeddings': {NAME: vector}}, as turnout.models.SentenceEncoder makes them"
        got, allowed = f"none for {', '.join(without)}", "say for every adapter's name what it is for"
        raise UsageError(word("embeddings", got=got, allowed=allowed, where=_WHERE, fix=fix))
    rows = [torch.as_tensor(said[name], dtype=torch.float32).detach().cpu() for name in site.names]
    if any(not bool(row.isfinite().all()) for row in rows):
        got, fix = "numbers that are not", "embed the descriptions again"
        raise UsageError(word("embeddings", got=got, allowed="be finite", where=_WHERE, fix=fix))
    if any(row.ndim != 1 or not len(row) or row.shape != rows[0].shape for row in rows):
        got, allowed = ", ".join(str(tuple(row.shape)) for row in rows), "be vectors (Q,) of one length"
        fix = "embed all descriptions with the same encoder"
        raise ShapeError(word("embeddings", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return torch.stack(rows)


class _Even(nn.Module):
    """All adapters, with the same weight each, for every token: what a router has to beat."""

    def __init__(self, num_experts: int, everyone: int) -> None:
        super().__init__()
        self.num_experts, self.everyone = num_experts, everyone

    def forward(self, x_TD: Tensor) -> Routing:
        weight_TE = x_TD.new_full((len(x_TD), self.num_experts), 1 / self.everyone, dtype=torch.float32)
        return Routing.from_dense(weight_TE)


def even(site: Site) -> nn.Module:
    """The mean of all adapters, whatever comes in; with one adapter, that adapter.

    One that does not change this map adds nothing to the mean here, and counts: half of each is half everywhere.
    """
    return _Even(len(site.names), len(site.everyone or site.names))


def _smear(site: Site) -> nn.Module:
    return SMEAR(site.width, len(site.names), **site.options)


def _scalearn(site: Site) -> nn.Module:
    """With ``share`` (ScaLearn++), maps of the same name in all layers have one omega."""
    options = dict(site.options)
    count, out = len(site.names), site.paths.up.shape[1]
    if not options.pop("share", False):
        return ScaLearn(count, out, **options)
    key = ("scalearn", site.module.rpartition(".")[2], site.names, out)
    if key not in site.shared:
        site.shared[key] = ScaLearn(count, out, **options)
    return site.shared[key]


def _poly(site: Site) -> nn.Module:
    """With ``share``, all maps with the same adapters have one table."""
    options = dict(site.options)
    if not options.pop("share", False):
        return Poly(site.width, len(site.names), **options)
    key = ("poly", site.names)
    if key not in site.shared:
        site.shared[key] = Poly(site.width, len(site.names), **options)
    return site.shared[key]


# The routers that read the gates in the adapters' folders: a live model cannot be saved without those folders.
GATED = ("glider", "phatgoose")
# A new router adds its builder here.
ROUTERS: Mapping[str, Callable[[Site], nn.Module]] = {
    "arrow": _arrow,
    "even": even,
    "glider": _glider,
    "phatgoose": _phatgoose,
    "poly": _poly,
    "scalearn": _scalearn,
    "smear": _smear,
}
# What each passes its options to, and what it takes beside.
_TAKES: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "arrow": (Arrow, ()),
    "even": (nn.Identity, ()),
    "glider": (Glider, ("embeddings",)),
    "phatgoose": (PHATGOOSE, ()),
    "poly": (Poly, ("share",)),
    "scalearn": (ScaLearn, ("share",)),
    "smear": (SMEAR, ()),
}


def check_options(router: str, options: Mapping[str, Any], count: int, *, where: str = _WHERE) -> None:
    """Refuses options that the router of that name does not take, of another type, or more adapters than there are.

    Args:
        router: one of ``ROUTERS``.
        options: its keywords.
        count: how many adapters there are.
        where: who asks.

    Raises:
        UsageError: an option of no such name, or of another type than its default.
        ShapeError: a ``top_k`` that is not between 1 and ``count``.

    >>> check_options("arrow", {"top_k": 2}, 2)

    Source: none; plain bookkeeping.
    """
    module, more = _TAKES[router]
    parameters = inspect.signature(module.__init__).parameters.values()
    default = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    for name, value in options.items():
        if not default and not more:
            fix = f"leave {name} out, or choose another router"
            raise UsageError(word(f"options of {router!r}", got=name, allowed="be none", where=where, fix=fix))
        if name not in default and name not in more:
            raise nearest(str(name), [*default, *more], kind=f"option of router {router!r}", where=where)
        wanted = _type(name, default.get(name))
        if wanted is not None and not _is(value, wanted):
            got, fix = repr(value), f"pass such as {name}={default.get(name, False)}"
            allowed = f"be a {'finite ' if wanted is float else ''}{wanted.__name__}"
            raise UsageError(word(name, got=got, allowed=allowed, where=where, fix=fix))
    top_k = options.get("top_k", 1)
    if not 1 <= top_k <= count:
        allowed, fix = f"be between 1 and the number of adapters, {count}", f"pass top_k={min(max(top_k, 1), count)}"
        raise ShapeError(word("top_k", got=top_k, allowed=allowed, where=where, fix=fix))


def _type(name: str, default: Any) -> type | None:
    """What an option must be; None where its module says so itself."""
    if name in ("generator", "embeddings"):
        return None
    return {"share": bool, "query_width": int}.get(name, type(default))


def _is(value: Any, wanted: type) -> bool:
    if wanted is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return type(value) is wanted
