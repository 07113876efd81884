"""Traffic: what a trace says to whoever places experts: how much each is used, and where tokens go from it."""

import dataclasses
import itertools
from typing import Self

import numpy as np

from turnout.errors import ShapeError, word
from turnout.storage import digest
from turnout.types.placement import Placement
from turnout.types.trace import Trace

__all__ = ["Traffic"]

_TOKENS = 1 << 15  # read at once: at 8 experts a token two million pairs, some 50 MB


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic:
    """How often each expert ran, and how tokens went from the experts of one layer to those of the next.

    A token that ran in k experts of a layer and k' of the next spreads a weight of 1 evenly over the k x k' pairs: with
    one expert a token ``step_LEE`` counts tokens. A token that ran nowhere in one of the two takes no step there.

    Where an expert has several copies, tokens are dealt to them evenly and independently of where they come from. All
    numbers below are of that rule.

    Args:
        load_LE: for each layer (E,) entries that each expert got.
        step_LEE: for each layer but the last (E, E') weight that went from an expert to one of the next layer.
        layers: the names of the layers.
        num_tokens: T.
        source: the hash of the trace that it is of; empty where it is of none.

    Raises:
        ShapeError: tables that do not fit each other.

    >>> chain = Traffic((np.array([3, 1]), np.array([2, 2])), (np.array([[2.0, 1.0], [0.0, 1.0]]),))
    >>> placement = Placement.contiguous([2, 2], devices=2)
    >>> chain.imbalance(placement), chain.crossing(placement), chain.crossing(placement, "node")
    (1.25, 0.25, 0.0)

    Source: Yao et al., 2024, "Exploiting Inter-Layer Expert Affinity", for the steps; even dealing is EPLB's.
    """

    load_LE: tuple[np.ndarray, ...]
    step_LEE: tuple[np.ndarray, ...]
    layers: tuple[str, ...] = ()
    num_tokens: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        sizes = self.num_experts_L
        wanted = list(itertools.pairwise(sizes))
        found = [step_EE.shape for step_EE in self.step_LEE]
        if not sizes or any(load_E.ndim != 1 for load_E in self.load_LE) or found != wanted:
            got = f"loads of {sizes} experts and steps of shapes {found}"
            fix = "take both from a trace: Traffic.of(trace)"
            allowed = f"have a load for each layer, and steps of {wanted}"
            raise ShapeError(word("the traffic", got=got, allowed=allowed, where="turnout.types.Traffic", fix=fix))

    @classmethod
    def of(cls, trace: Trace) -> Self:
        """The traffic of a recorded trace, read in pieces: memory does not grow with its tokens."""
        sizes, last = trace.num_experts_L, trace.num_layers - 1
        load_LE = [np.zeros(experts, dtype=np.int64) for experts in sizes]
        step_LEE = [np.zeros(pair) for pair in itertools.pairwise(sizes)]
        for layer in range(trace.num_layers):
            start_T, expert_R = trace.column("start", layer), trace.column("expert", layer)
            for first in range(0, trace.num_tokens, _TOKENS):
                stop = min(first + _TOKENS, trace.num_tokens)
                here_T = np.asarray(start_T[first : stop + 1])
                left_R = np.asarray(expert_R[here_T[0] : here_T[-1]], dtype=np.int64)
                load_LE[layer] += np.bincount(left_R, minlength=sizes[layer])
                if layer < last:
                    next_T = np.asarray(trace.column("start", layer + 1)[first : stop + 1])
                    right_R = np.asarray(trace.column("expert", layer + 1)[next_T[0] : next_T[-1]], dtype=np.int64)
                    step_LEE[layer] += _steps(here_T, left_R, next_T, right_R, (sizes[layer], sizes[layer + 1]))
        seal = digest(trace.path / "trace.json")
        return cls(tuple(load_LE), tuple(step_LEE), trace.layers, trace.num_tokens, seal)

    @property
    def num_experts_L(self) -> tuple[int, ...]:
        """Experts in each layer."""
        return tuple(len(load_E) for load_E in self.load_LE)

    @property
    def steps(self) -> float:
        """The weight of all steps between layers."""
        return float(sum(step_EE.sum() for step_EE in self.step_LEE))

    def time(self, placement: Placement, speed_G: np.ndarray | None = None) -> np.ndarray:
        """(L, G) entries that each device gets in each layer, divided by its speed.

        Args:
            placement: of this model.
            speed_G: of each device, relative; None for like ones.

        Raises:
            ShapeError: a placement of another model.
        """
        self.check(placement)
        time_LG = np.stack([p_GE @ load_E for p_GE, load_E in zip(shares(placement), self.load_LE, strict=True)])
        return time_LG if speed_G is None else time_LG / speed_G

    def imbalance(self, placement: Placement, speed_G: np.ndarray | None = None) -> float:
        """How long the layers' busiest devices take, over how long it would be if all were busy alike; 1 is even."""
        busiest_L = self.time(placement, speed_G).max(1)
        total_L = np.array([load_E.sum() for load_E in self.load_LE], dtype=float)
        even = total_L.sum() / (placement.devices if speed_G is None else np.sum(speed_G))
        return float(busiest_L.sum() / even) if even else 1.0

    def crossing(self, placement: Placement, level: str = "device") -> float:
        """The share of steps between layers that go to another device, or to another ``node``.

        Raises:
            ShapeError: a placement of another model.
        """
        self.check(placement)
        share_LGE = shares(placement)
        if level == "node":
            share_LGE = [p_GE.reshape(placement.nodes, -1, p_GE.shape[1]).sum(1) for p_GE in share_LGE]
        pairs = zip(self.step_LEE, share_LGE, share_LGE[1:], strict=False)
        stays = sum(float(((left_GE @ step_EE) * right_GE).sum()) for step_EE, left_GE, right_GE in pairs)
        return 1 - stays / self.steps if self.steps else 0.0

    def check(self, placement: Placement) -> None:
        """Refuses a placement of another model.

        Raises:
            ShapeError: other experts, or layers of other names.
        """
        named = self.layers and placement.layers and self.layers != placement.layers
        if placement.num_experts_L != self.num_experts_L or named:
            allowed = f"have {self.num_experts_L} experts in layers {', '.join(self.layers) or 'of any name'}"
            got = f"{placement.num_experts_L} in {', '.join(placement.layers) or 'unnamed layers'}"
            fix = "place the model that the trace is of"
            raise ShapeError(word("the placement", got=got, allowed=allowed, where="turnout.types.Traffic", fix=fix))


def shares(placement: Placement) -> list[np.ndarray]:
    """For each layer (G, E): the part of an expert's tokens that each device gets."""
    held_LGE = (placement.held(layer).astype(float) for layer in range(placement.num_layers))
    return [held_GE / held_GE.sum(0) for held_GE in held_LGE]


def _steps(
    here_T: np.ndarray, left_R: np.ndarray, next_T: np.ndarray, right_R: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """(E, E') the weight of all pairs of experts that tokens ran in, from the first entries of each token."""
    left_T, right_T = np.diff(here_T), np.diff(next_T)
    token_R = np.repeat(np.arange(len(left_T)), left_T)
    times_R = right_T[token_R]  # each entry of the layer meets those of its token in the next
    ends_R = np.cumsum(times_R)
    within = np.arange(ends_R[-1] if len(ends_R) else 0) - np.repeat(ends_R - times_R, times_R)
    right = right_R[np.repeat(next_T[token_R] - next_T[0], times_R) + within]
    weight = np.repeat(1 / np.maximum(left_T * right_T, 1)[token_R], times_R)
    pair = np.repeat(left_R, times_R) * shape[1] + right
    return np.bincount(pair, weight, minlength=shape[0] * shape[1]).reshape(shape)
