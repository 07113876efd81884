"""A held-out passage with the experts of each of its tokens: what a page colours token by token."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from turnout.errors import CheckpointError, ShapeError, word
from turnout.types import Routing

__all__ = ["Passage"]

Route = tuple[int, float, float | None]


@dataclasses.dataclass(frozen=True)
class Passage:
    """A held-out passage, token by token, with the experts that each layer sent each token to.

    Args:
        tokens: the text of each token.
        routes: per routed layer, per token, its (expert, weight, score) entries, the heaviest first; score may be None.
        layers: the name of each routed layer.
        num_experts: experts in each layer (the largest).
        domain: the domain of the document.
        source: the name of the document.

    >>> import torch
    >>> routing = Routing.from_topk(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
    >>> Passage.from_routings(["a", " b"], [routing]).routes
    ((((1, 1.0, None),), ((0, 1.0, None),)),)

    Source: none; plain bookkeeping.
    """

    tokens: tuple[str, ...]
    routes: tuple[tuple[tuple[Route, ...], ...], ...]
    layers: tuple[str, ...]
    num_experts: int
    domain: str = ""
    source: str = ""

    @classmethod
    def from_routings(
        cls,
        tokens: Sequence[str],
        routings: Sequence[Routing],
        *,
        layers: Sequence[str] = (),
        domain: str = "",
        source: str = "",
    ) -> Self:
        """The passage whose tokens these routings sent on, one routing per layer.

        Raises:
            ShapeError: a routing is not over exactly these tokens.
        """
        if any(routing.num_tokens != len(tokens) for routing in routings):
            raise ShapeError(
                word(
                    "the routings",
                    got=f"over {[routing.num_tokens for routing in routings]} tokens",
                    allowed=f"be over the {len(tokens)} tokens of the passage",
                    where="Passage.from_routings",
                    fix="pass the text of every token of the forward pass",
                )
            )
        names = tuple(layers) or tuple(str(layer) for layer in range(len(routings)))
        experts = max((routing.num_experts for routing in routings), default=0)
        routes = tuple(tuple(_routes(routing)) for routing in routings)
        return cls(tuple(tokens), routes, names, experts, domain, source)

    def to_json_dict(self) -> dict[str, object]:
        """The passage as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json_dict(cls, body: Mapping[str, Any]) -> Self:
        """The passage that ``to_json_dict`` wrote.

        Raises:
            CheckpointError: the values are not a passage.
        """
        try:
            tokens = tuple(str(token) for token in body["tokens"])
            routes = tuple(
                tuple(
                    tuple((int(e), float(w), None if s is None else float(s)) for e, w, s in token) for token in layer
                )
                for layer in body["routes"]
            )
            if any(len(layer) != len(tokens) for layer in routes):
                raise ValueError("layers of other lengths than the tokens")
            layers = tuple(map(str, body["layers"]))
            if len(layers) != len(routes):
                raise ValueError(f"{len(routes)} layers of routes and {len(layers)} names")
            return cls(tokens, routes, layers, int(body["num_experts"]), str(body["domain"]), str(body["source"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                word(
                    "the passage",
                    got=f"{type(error).__name__}: {error}",
                    allowed="hold tokens, routes, layers and num_experts",
                    where="Passage.from_json_dict",
                    fix="write it with Passage.to_json_dict",
                )
            ) from error


def _routes(routing: Routing) -> Iterator[tuple[Route, ...]]:
    order_R, start_T = (tensor.tolist() for tensor in routing.by_token)
    expert_R, weight_R = routing.expert_R.tolist(), routing.weight_R.detach().float().tolist()
    score_TE = None if routing.score_TE is None else routing.score_TE.detach().float().cpu()
    for t in range(routing.num_tokens):
        entries = [(expert_R[r], weight_R[r]) for r in order_R[start_T[t] : start_T[t + 1]]]
        entries.sort(key=lambda entry: -entry[1])
        yield tuple((e, round(w, 4), None if score_TE is None else round(float(score_TE[t, e]), 4)) for e, w in entries)
