"""Where two networks part: the first thing taken, routed or given that is further apart than a bound, and its part."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from turnout.measure.certificate import Gap, Parting
from turnout.measure.gap import RouteGap, chosen
from turnout.measure.observe import Key, layer_of, part_of
from turnout.types import Routing

__all__ = ["Apart", "Place", "Worst", "locate"]

# Of what only one network has, or what a module holds itself, this says most about what went wrong.
_TELLING = ("experts", "shared expert", "router", "head", "embedding", "norm", "attention", "feed-forward")


@dataclasses.dataclass(frozen=True)
class Worst:
    """The largest distance of one thing: where, and how many tokens were routed otherwise."""

    relative: float
    prompt: int
    position: int | None
    changed: int


class Place:
    """One input: its shape (B, S), its first row among all, and the positions that are set aside."""

    def __init__(self, shape: tuple[int, ...], first_row: int) -> None:
        self.shape, self.first_row = shape, first_row
        self.aside_N = torch.zeros(shape[0] * shape[1], dtype=torch.bool)

    def set_aside(self, mask_N: Tensor) -> None:
        """Sets these positions aside, and those after them in their rows."""
        aside_BS = (self.aside_N | mask_N).view(self.shape[0], self.shape[1])
        self.aside_N = aside_BS.int().cummax(1).values.bool().flatten()


@dataclasses.dataclass(eq=False)
class Apart:
    """How far everything is apart, in the order in which A runs, and what ran.

    Args:
        worst: the largest distance of each thing.
        routed: the tokens of an expert module's output that are apart, and the pattern of its decision.
        tied: how many tokens changed experts that are tied.
        ran: names in A of what ran in either; "B:name" for what A has no name for.
        ran_in_both: names in A.
    """

    worst: dict[Key, Worst] = dataclasses.field(default_factory=dict)
    routed: dict[Key, list[tuple[Tensor, Tensor]]] = dataclasses.field(default_factory=dict)
    tied: dict[Key, int] = dataclasses.field(default_factory=dict)
    ran: set[str] = dataclasses.field(default_factory=set)
    ran_in_both: set[str] = dataclasses.field(default_factory=set)

    def add_routing(self, key: Key, gap: RouteGap, place: "Place", bound: float) -> None:
        """Takes a decision about one input. Tokens that changed tied experts, and those after them, are set aside."""
        tied_T = gap.tied_T(bound)
        new_T = tied_T & ~place.aside_N if len(tied_T) == len(place.aside_N) else torch.zeros_like(tied_T)
        if bool(new_T.any()):
            self.tied[key] = self.tied.get(key, 0) + int(new_T.sum())
            place.set_aside(new_T)
        self.add(key, gap.relative_T, None, place, bound, changed=int(gap.changed_T.sum()))

    def add(
        self, key: Key, relative_N: Tensor, routing: Routing | None, place: "Place", bound: float, *, changed: int = 0
    ) -> None:
        """Takes one thing of one input: how far it is apart at each position."""
        aside_N = place.aside_N if len(place.aside_N) == len(relative_N) else None
        if not len(relative_N) or (aside_N is None and bool(place.aside_N.any())):
            return
        kept_N = relative_N if aside_N is None else torch.where(aside_N, 0.0, relative_N)
        index = int(kept_N.argmax())
        row, position = (0, None) if aside_N is None else divmod(index, place.shape[1])
        new, old = Worst(float(kept_N[index]), place.first_row + row, position, changed), self.worst.get(key)
        if old is not None:
            new = dataclasses.replace(new if new.relative > old.relative else old, changed=changed + old.changed)
        self.worst[key] = new
        if key[2] == "gives" and routing is not None and aside_N is not None and routing.num_tokens == len(aside_N):
            pair = (relative_N > bound)[~aside_N], chosen(routing)[~aside_N]
            self.routed.setdefault(key, []).append(pair)

    def outputs(self) -> dict[str, float | None]:
        """Module -> the distance of what it gives."""
        found: dict[str, float] = {}
        for (name, _, kind), worst in self.worst.items():
            if kind == "gives":
                found[name] = max(worst.relative, found.get(name, 0.0))
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def lonely(self, side: str) -> set[str]:
        """What ran in one of the two only, by its own names."""
        only_b = {name for name in self.ran if name.startswith("B:")}
        return {name[2:] for name in only_b} if side == "B" else self.ran - only_b - self.ran_in_both


def locate(a: nn.Module, b: nn.Module, matched: Mapping[str, str], apart: Apart, bound: float, logits: Gap) -> Parting:
    """The first thing that is further apart than the bound; the first tie, or the logits, when nothing before them is.

    An output that parts though all that ran inside agrees, is the module's own doing, or that of something inside that
    only one of the two has. An input that parts is the doing of what contains the module; before the first block that
    is the embedding.
    """
    key = next((key for key, worst in apart.worst.items() if worst.relative > bound), None)
    if key is None and apart.tied:
        name = _router(next(iter(apart.tied))[0], a)
        changed = apart.worst[next(iter(apart.tied))].changed
        where = logits.prompt, logits.position
        return Parting(layer_of(name), "router", name, logits.relative, *where, changed=changed)
    if key is None:
        return Parting("head", "head", "logits", logits.relative, logits.prompt, logits.position)
    worst, name = apart.worst[key], key[0]
    if key[2] == "routes":
        module, part = _router(name, a), "router"
    elif key[2] == "gives":
        module = name
        part = _telling(_inside(name, a, b, matched, apart)) or part_of(name) or "residual"
    else:
        around = part_of(name.rpartition(".")[0])
        module = name.rpartition(".")[0] if around else name
        part = around or ("residual" if _after_a_block(key, apart) else "embedding")
    layer = part if part == "embedding" else layer_of(module)
    changed = [
        its.changed for (other, _, kind), its in apart.worst.items() if kind == "routes" and layer_of(other) == layer
    ]
    experts = _experts(apart.routed.get((module, key[1], "gives"), [])) if part == "experts" else ()
    relative = worst.relative if math.isfinite(worst.relative) else None
    return Parting(layer, part, module, relative, worst.prompt, worst.position, experts, max(changed, default=0))


def _inside(name: str, a: nn.Module, b: nn.Module, matched: Mapping[str, str], apart: Apart) -> list[str | None]:
    """The parts of what is directly inside a module and ran in one of the two only; else of its own parameters."""
    other, lone = matched[name], apart.ran - apart.ran_in_both
    one, two = a.get_submodule(name), b.get_submodule(other)
    back = {their: our for our, their in matched.items()}
    alone = [f"{name}.{child}" for child, _ in one.named_children() if f"{name}.{child}" in lone]
    theirs = [f"{other}.{child}" for child, _ in two.named_children()]
    alone += [full for full in theirs if back.get(full, f"B:{full}") in lone]
    if alone:
        return [part_of(full) for full in alone]
    own = {param for module in (one, two) for param, _ in module.named_parameters(recurse=False)}
    return [part_of(param) for param in sorted(own)]


def _telling(parts: Iterable[str | None]) -> str | None:
    """The most telling of these parts."""
    return min((part for part in parts if part), key=_TELLING.index, default=None)


def _router(name: str, a: nn.Module) -> str:
    """The router of a routed layer, whichever of its modules told of the decision."""
    if part_of(name) == "router":
        return name
    parent = name.rpartition(".")[0]
    siblings = [f"{parent}.{child}" for child, _ in a.get_submodule(parent).named_children()]
    return next((sibling for sibling in siblings if part_of(sibling) == "router"), name)


def _after_a_block(key: Key, apart: Apart) -> bool:
    """Whether a block has given its output before this happened."""
    for other in apart.worst:
        if other == key:
            return False
        if other[2] == "gives" and layer_of(other[0]) == other[0]:
            return True
    return False


def _experts(routed: list[tuple[Tensor, Tensor]]) -> tuple[int, ...]:
    """The fewest experts that explain which tokens are apart: those whose tokens are so most often, until all are.

    When every token is apart all experts may be at fault, and all that took a token are named.
    """
    if not routed:
        return ()
    apart_T = torch.cat([apart_T for apart_T, _ in routed])
    mask_TE = torch.cat([mask_TE for _, mask_TE in routed])
    load_E = mask_TE.sum(0)
    if bool(apart_T.all()):
        return tuple((load_E > 0).nonzero().flatten().tolist())
    share_E = (mask_TE & apart_T[:, None]).sum(0) / load_E.clamp(min=1)
    found: list[int] = []
    left_T = apart_T.clone()
    while bool((mask_TE & left_T[:, None]).any()):
        takes_E = (mask_TE & left_T[:, None]).sum(0)
        ranked = [(float(share_E[e]), int(takes_E[e]), -e) for e in range(len(load_E)) if takes_E[e]]
        found.append(-max(ranked)[2])
        left_T &= ~mask_TE[:, found[-1]]
    return tuple(sorted(found))
