"""The same page for a recorded trace: texts coloured by their experts, without a server."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from turnout.expects import expects
from turnout.serve.viewer.page import document
from turnout.types import Trace

__all__ = ["trace_html"]

# Of one page: more would be megabytes, and more than anybody reads.
_DOCUMENTS, _TOKENS = 24, 800


@expects(trace=Trace)
def trace_html(trace: Trace, *, name: str = "", text_of: Callable[[int], str] | None = None) -> str:
    """A page of a trace's first documents, which opens without a network or a server.

    Args:
        trace: what was recorded.
        name: what the page is called; by default the trace's folder.
        text_of: a token's text; without it, or where the trace has no token ids, tokens are shown by their places.

    Returns:
        The text of the page: the beginnings of up to 24 documents, and every layer's load over all tokens.

    >>> import tempfile, torch
    >>> from turnout.types import Routing, TraceWriter
    >>> routing = Routing.from_topk(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
    >>> folder = tempfile.mkdtemp() + "/trace"
    >>> with TraceWriter(folder, num_experts_L=[2], domains=["code"]) as writer:
    ...     writer.add([routing], document_tokens=[2], document_domains=[0])
    >>> '"routes":[[[1],[0]]]' in trace_html(Trace.open(folder))
    True

    Source: none; plain bookkeeping.
    """
    domain_N, bounds = trace.column("domain"), [int(at) for at in trace.document_N]
    documents = list[dict[str, Any]]()
    for number, (start, stop) in enumerate(itertools.pairwise(bounds[: _DOCUMENTS + 1])):
        end = min(stop, start + _TOKENS)
        routes = [_experts(trace, layer, start, end) for layer in range(trace.num_layers)]
        title = f"{number + 1}: {trace.domains[int(domain_N[number])]}, {stop - start} tokens"
        tokens = _texts(trace, start, end, text_of)
        documents.append({"title": title, "tokens": tokens, "routes": routes, "length": stop - start})
    load = [
        np.bincount(trace.column("expert", layer), minlength=count).tolist()
        for layer, count in enumerate(trace.num_experts_L)
    ]
    shown = f"the first {len(documents)} are here" if trace.num_documents > len(documents) else "all are here"
    says = f"{trace.num_tokens:,} tokens in {trace.num_documents:,} documents; {shown}"
    return document(
        {
            "model": name or trace.path.name,
            "models": [],
            "layers": trace.layers,
            "experts": trace.num_experts_L,
            "load": load,
            "trace": {"documents": documents, "says": says},
        }
    )


def _experts(trace: Trace, layer: int, start: int, end: int) -> list[list[int]]:
    """Of each token its experts, the one with the most weight first."""
    place_T = [int(at) for at in trace.column("start", layer)[start : end + 1]]
    expert_R, weight_R = trace.column("expert", layer), trace.column("weight", layer)
    found = []
    for first, last in itertools.pairwise(place_T):
        order = np.argsort(-weight_R[first:last], kind="stable")
        found.append([int(expert) for expert in expert_R[first:last][order]])
    return found


def _texts(trace: Trace, start: int, end: int, text_of: Callable[[int], str] | None) -> Sequence[str]:
    if text_of is None or not trace.has_token_ids:
        return [f"{place} " for place in range(end - start)]
    return [text_of(int(token)) for token in trace.column("token_id")[start:end]]
