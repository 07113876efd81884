"""What may be told of a trace: how much the experts of each layer did for a crowd, and nothing of anyone in it."""

import numpy as np

from turnout.errors import UsageError, word
from turnout.expects import expects
from turnout.types import Report, Trace

__all__ = ["crowd_load"]


@expects(trace=Trace)
def crowd_load(trace: Trace, *, floor: int = 10) -> Report:
    """How many tokens each expert received, where at least ``floor`` documents sent it some; else nothing.

    Which experts a token took says which token it was: of 32-token texts nine tenths can be read back from the routes
    alone. A trace is as sensitive as its text. What leaves here are sums over documents, one for each expert of each
    layer: no token, no order, no weight, no document and no domain. Where one cell of a layer is hidden, a second is,
    the one of the fewest documents, or what is hidden would be what is left of the sum. It is no differential privacy:
    who knows all documents but one can subtract.

    Args:
        trace: what was recorded; a document is what one request or one user sent.
        floor: the fewest documents that a number is given for, 2 or more.

    Returns:
        A report: ``load``, by layer and expert, None where it is hidden; ``hidden``, how many are, by layer; ``floor``
        and ``documents``.

    Raises:
        UsageError: floor is below 2, or the trace has fewer documents than that.

    >>> import tempfile, torch
    >>> from turnout.types import Routing, TraceWriter
    >>> with TraceWriter(tempfile.mkdtemp() + "/t", num_experts_L=[4], domains=["all"]) as writer:
    ...     for expert in (0, 0, 1, 1, 2):
    ...         routing = Routing.from_topk(torch.tensor([[expert], [3]]), torch.ones(2, 1), num_experts=4)
    ...         writer.add([routing], document_tokens=[2], document_domains=[0])
    >>> crowd_load(Trace.open(writer.path), floor=2)["load"]
    [[None, 2, None, 5]]

    Source: the floor and the second hidden cell: Cox, 1980, "Suppression Methodology and Statistical Disclosure
    Control"; why: Nuriyev & Kulp, 2026, "Expert Selections In MoE Models Reveal (Almost) As Much As Text".
    """
    if floor < 2 or trace.num_documents < floor:
        got = f"floor={floor} of {trace.num_documents} documents"
        fix = "record more documents, or share nothing"
        allowed = "be 2 or more, and no more than there are documents"
        raise UsageError(word("floor", got=got, allowed=allowed, where="turnout.measure.crowd_load", fix=fix))
    load_L, hidden_L = [], []
    for layer in range(trace.num_layers):
        load_E, sent_E = _counts(trace, layer)
        shown_E = sent_E >= floor
        if (~shown_E).sum() == 1 and shown_E.any():
            shown_E[np.where(shown_E, sent_E, sent_E.max() + 1).argmin()] = False
        load_L.append([int(load) if shown else None for load, shown in zip(load_E, shown_E, strict=True)])
        hidden_L.append(int((~shown_E).sum()))
    values = {"documents": trace.num_documents, "floor": floor, "hidden": hidden_L, "load": load_L}
    return Report("load of a crowd", values)


def _counts(trace: Trace, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(E,) how many tokens each expert received, and from how many documents."""
    expert_R, start_T, experts = trace.column("expert", layer), trace.column("start", layer), trace.num_experts_L[layer]
    load_E, sent_E = np.zeros(experts, np.int64), np.zeros(experts, np.int64)
    for first, last, _ in trace.documents():
        own_E = np.bincount(expert_R[start_T[first] : start_T[last]], minlength=experts)
        load_E += own_E
        sent_E += own_E > 0
    return load_E, sent_E
