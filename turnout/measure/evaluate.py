"""Held-out bits per byte, overall and per domain, with the expert load that came about on the way."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.errors import DataError, ShapeError, word
from turnout.expects import CALLED, expects
from turnout.measure.load import entropy, max_vio
from turnout.types import Routing, TraceWriter
from turnout.wrappers import takes

__all__ = ["Evaluation", "bits_per_byte"]

IGNORE = -100


class Batch(Protocol):
    """Tokens, what follows each of them (-100 where nothing is to be predicted), and the domain of each row.

    It may have a ``real_BS``, (B, S) bool: false at padding.
    """

    @property
    def id_BS(self) -> Tensor: ...
    @property
    def target_BS(self) -> Tensor: ...
    @property
    def domain_B(self) -> Tensor | None: ...


class Output(Protocol):
    """What a language model answers."""

    @property
    def logits_BSV(self) -> Tensor: ...
    @property
    def routings(self) -> Sequence[Routing]: ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well held-out text was predicted, and which experts it went through.

    Args:
        bits_per_byte: nats / ln 2 / bytes.
        by_domain: the same for each domain that has text.
        nats: the summed negative log-likelihood of the predicted tokens.
        bytes: UTF-8 bytes that the predicted tokens stand for.
        tokens: predicted tokens.
        load_LE: per routed layer, the entries that each expert received; empty for a dense model.
        load_by_domain: domain -> the same, counting that domain's tokens.
        dropped: share of the wanted entries that capacity took away; None for a dense model.

    >>> Evaluation(2.0, {"code": 2.0}, nats=1.0, bytes=1, tokens=1, load_LE=((3, 1),)).max_vio
    0.5

    Source: Gao et al., 2020, "The Pile", for bits per byte as the measure that tokenizers cannot change.
    """

    bits_per_byte: float
    by_domain: Mapping[str, float]
    nats: float
    bytes: int
    tokens: int
    load_LE: tuple[tuple[int, ...], ...] = ()
    load_by_domain: Mapping[str, tuple[tuple[int, ...], ...]] = dataclasses.field(default_factory=dict)
    dropped: float | None = None

    @property
    def share_LE(self) -> list[list[float]]:
        """Per routed layer, the share of each expert; each layer sums to 1 (to 0 where nothing was routed)."""
        return _shares(self.load_LE)

    @property
    def max_vio(self) -> float | None:
        """MaxVio, the mean over the layers; None for a dense model."""
        return _mean([max_vio(torch.tensor(load_E)) for load_E in self.load_LE])

    @property
    def entropy(self) -> float | None:
        """Normalised entropy of the load, the mean over the layers; None for a dense model."""
        return _mean([entropy(torch.tensor(load_E)) for load_E in self.load_LE])

    def to_json_dict(self, *, domains: bool = False) -> dict[str, object]:
        """What an evaluation line of metrics.jsonl holds; with ``domains`` also the shares of experts per domain."""
        values: dict[str, object] = {
            "bits_per_byte": self.bits_per_byte,
            "by_domain": dict(self.by_domain),
            "nats": self.nats,
            "bytes": self.bytes,
            "predicted": self.tokens,
            "load": self.share_LE,
            "max_vio": self.max_vio,
            "entropy": self.entropy,
            "dropped": self.dropped,
        }
        if domains:
            values["load_by_domain"] = {name: _shares(load_LE) for name, load_LE in self.load_by_domain.items()}
        return values


@expects(forward=CALLED)
@torch.no_grad()
def bits_per_byte(
    forward: Callable[[Tensor], Output],
    batches: Iterable[Batch],
    byte_length_V: Tensor,
    *,
    domains: Sequence[str] = (),
    trace: TraceWriter | None = None,
) -> Evaluation:
    """How many bits the model needs for each byte of held-out text.

    bits per byte = sum of -ln p(target) over all predicted tokens / ln 2 / sum of their bytes. Tokens that stand
    for no byte (special ones) count with their nats and no bytes. Positions without a target count nowhere: neither
    their likelihood nor their routing. The number does not depend on how rows are batched and padded: padding is not
    shown to the model, or is masked where ``forward`` takes an ``attention_mask``; and rows are given one by one to a
    model whose routers let tokens take each other's place (a capacity, ``ExpertChoice``).

    Args:
        forward: (B, S) token ids -> logits (B, S, V) and one Routing per routed layer over the B·S tokens: a model,
            which gets the ids on its device, or a function. Put the model into ``eval()`` before.
        batches: each with ``id_BS``, ``target_BS`` (-100 where there is nothing to predict) and ``domain_B`` (indices
            into ``domains``; may be None or missing when there is at most one domain). Padding is where its ``real_BS``
            is false; where it has none, what stands after the last target of a row.
        byte_length_V: (V,) UTF-8 bytes that each token stands for; a numpy array is fine. One below 0 is of a token
            that opens a document, and is added to those of the token after it: a space that is no part of the text.
        domains: their names; default one, ``"all"``.
        trace: a TraceWriter, entered, which gets every row as a document with its routings.

    Returns:
        The evaluation.

    Raises:
        DataError: there is nothing to predict.
        ShapeError: the model's answer, the batches and the domains do not fit each other.

    >>> import types
    >>> batch = types.SimpleNamespace(id_BS=torch.tensor([[0, 1]]), target_BS=torch.tensor([[1, 0]]), domain_B=None)
    >>> uniform = lambda id_BS: types.SimpleNamespace(logits_BSV=torch.zeros(1, 2, 4), routings=())
    >>> print(f"{bits_per_byte(uniform, [batch], torch.tensor([1, 1, 1, 1])).bits_per_byte:.4f}")
    2.0000

    Source: Gao et al., 2020, "The Pile", section 3.1.
    """
    names = tuple(domains) or ("all",)
    length_V = torch.as_tensor(byte_length_V).long()
    sums = _Sums(len(names))
    for output, id_BS, target_BS, domain_B in _calls(forward, batches, names):
        keep_BS = target_BS != IGNORE
        sums.add_likelihood(_nats(output.logits_BSV, target_BS), id_BS, target_BS, length_V, domain_B)
        if len(output.routings):
            kept = [_kept(routing, keep_BS) for routing in output.routings]
            sums.add_routings(output.routings, kept, domain_B.repeat_interleave(keep_BS.sum(1).cpu()))
            if trace is not None:
                ids = {"token_id_T": id_BS[keep_BS]} if trace.token_ids else {}
                trace.add(kept, document_tokens=keep_BS.sum(1).tolist(), document_domains=domain_B.tolist(), **ids)
    return sums.finish(names)


def _calls(
    forward: Callable[..., Output], batches: Iterable[Batch], names: Sequence[str]
) -> Iterator[tuple[Output, Tensor, Tensor, Tensor]]:
    """What the model makes of the rows of the batches, in order, with their ids, targets and domains."""
    masks, alone = takes(forward, "attention_mask"), rows_mix(forward)
    home = next((p.device for p in forward.parameters()), None) if isinstance(forward, nn.Module) else None

    def called(id_BS: Tensor, **keywords: Tensor) -> Output:
        return forward(id_BS if home is None else id_BS.to(home), **keywords)

    for batch in batches:
        id_BS, target_BS, domain_B = batch.id_BS, batch.target_BS, _domains(batch, names)
        real_BS, said = _real(batch)
        target_BS = target_BS.masked_fill(~real_BS.to(target_BS.device), IGNORE)
        if not alone and (masks or not said or bool(real_BS.all())):
            padded = not bool(real_BS.all())
            output = called(id_BS, attention_mask=real_BS) if masks and padded else called(id_BS)
            alone = any(routing.wanted_E is not None for routing in output.routings)
            # Padding at the end, of which the model knows nothing, matters to routers alone.
            if not alone and (masks or not padded or not len(output.routings)):
                yield output, id_BS, target_BS, domain_B
                continue
        length_B = real_BS.sum(1).tolist()
        # Rows of one length that stand beside each other go together.
        for length, group in itertools.groupby(range(len(id_BS)), key=length_B.__getitem__):
            rows = list(group)
            for some in [[row] for row in rows] if alone else [rows]:
                if length:
                    id_NS, target_NS = (each[some][real_BS[some]].view(-1, length) for each in (id_BS, target_BS))
                    yield called(id_NS), id_NS, target_NS, domain_B[some]


def _real(batch: Batch) -> tuple[Tensor, bool]:
    """(B, S) bool, false at padding: as the batch says, else after the last target of each row; and whether it says."""
    said = getattr(batch, "real_BS", None)
    if said is not None:
        return torch.as_tensor(said).bool(), True
    kept_BS = batch.target_BS != IGNORE
    return kept_BS.flip(1).cumsum(1).flip(1) > 0, False


def rows_mix(forward: Callable[..., Any]) -> bool:
    """Whether the rows of a batch are not independent: a router limits how many tokens an expert takes."""
    modules = list(forward.modules()) if isinstance(forward, nn.Module) else []
    return any(getattr(module, "capacity_factor", None) is not None for module in modules)


class _Sums:
    """What adds up over the batches, on the CPU in double precision and whole numbers."""

    def __init__(self, num_domains: int) -> None:
        self.nats_N = torch.zeros(num_domains, dtype=torch.float64)
        self.bytes_N = torch.zeros(num_domains, dtype=torch.long)
        self.tokens = 0
        self.load_L: list[Tensor] = []
        self.dropped = self.wanted = 0

    def add_likelihood(
        self, nats_BS: Tensor, id_BS: Tensor, target_BS: Tensor, length_V: Tensor, domain_B: Tensor
    ) -> None:
        target_BS = target_BS.cpu()
        bytes_BS = length_V.clamp(min=0)[target_BS.clamp(min=0)] * (target_BS != IGNORE)
        if bool((length_V < 0).any()):  # what opens a document takes off what is put before its text
            bytes_BS += length_V.clamp(max=0)[id_BS.cpu()] * (target_BS != IGNORE)
        self.nats_N.index_add_(0, domain_B, nats_BS.cpu().double().sum(1))
        self.bytes_N.index_add_(0, domain_B, bytes_BS.sum(1))
        self.tokens += int((target_BS != IGNORE).sum())

    def add_routings(self, whole: Sequence[Routing], kept: Sequence[Routing], domain_T: Tensor) -> None:
        if not self.load_L:
            self.load_L = [torch.zeros(len(self.nats_N), r.num_experts, dtype=torch.long) for r in kept]
        for layer, routing in enumerate(kept):
            cell_R = domain_T[routing.token_R.cpu()] * routing.num_experts + routing.expert_R.cpu()
            total_NE = self.load_L[layer]
            self.load_L[layer] = total_NE + torch.bincount(cell_R, minlength=total_NE.numel()).view_as(total_NE)
        self.dropped += sum(int(routing.dropped_E.sum()) for routing in whole)
        self.wanted += sum(int(routing.dropped_E.sum()) + routing.num_entries for routing in whole)

    def finish(self, names: Sequence[str]) -> Evaluation:
        total_bytes = int(self.bytes_N.sum())
        if total_bytes == 0:
            raise DataError(
                word(
                    "the held-out text",
                    got=f"{self.tokens} tokens to predict, which stand for no byte",
                    allowed="hold at least one byte to predict",
                    where="turnout.measure.bits_per_byte",
                    fix="hold out more documents, or name other text",
                )
            )
        nats = float(self.nats_N.sum())
        seen = [n for n in range(len(names)) if int(self.bytes_N[n])]
        return Evaluation(
            bits_per_byte=nats / math.log(2) / total_bytes,
            by_domain={names[n]: float(self.nats_N[n]) / math.log(2) / int(self.bytes_N[n]) for n in seen},
            nats=nats,
            bytes=total_bytes,
            tokens=self.tokens,
            load_LE=tuple(tuple(total_NE.sum(0).tolist()) for total_NE in self.load_L),
            load_by_domain={names[n]: tuple(tuple(t[n].tolist()) for t in self.load_L) for n in seen if self.load_L},
            dropped=(self.dropped / self.wanted if self.wanted else 0.0) if self.load_L else None,
        )


def _nats(logits_BSV: Tensor, target_BS: Tensor) -> Tensor:
    """(B, S) fp32, -ln p of each target; row by row, so that a fp32 copy of all logits never exists."""
    if logits_BSV.shape[:2] != target_BS.shape:
        raise ShapeError(
            word(
                "the logits",
                got=f"{tuple(logits_BSV.shape)} for targets {tuple(target_BS.shape)}",
                allowed="have the shape (B, S, V)",
                where="turnout.measure.bits_per_byte",
                fix="return the logits of every position",
            )
        )
    rows = [
        F.cross_entropy(logits_SV.float(), target_S, ignore_index=IGNORE, reduction="none")
        for logits_SV, target_S in zip(logits_BSV, target_BS.to(logits_BSV.device), strict=True)
    ]
    return torch.stack(rows)


def _domains(batch: Batch, names: Sequence[str]) -> Tensor:
    """(B,) int64 on the CPU, the domain of each row, checked."""
    domain_B = getattr(batch, "domain_B", None)
    if domain_B is None and len(names) == 1:
        return torch.zeros(batch.target_BS.shape[0], dtype=torch.long)
    problem = "no domain_B"
    if domain_B is not None:
        domain_B = torch.as_tensor(domain_B).long().cpu()
        if domain_B.shape == batch.target_BS.shape[:1] and bool(((domain_B >= 0) & (domain_B < len(names))).all()):
            return domain_B
        problem = f"domain_B {domain_B.tolist()} for {batch.target_BS.shape[0]} rows"
    raise ShapeError(
        word(
            "the batch",
            got=problem,
            allowed=f"name one of the {len(names)} domains for each row",
            where="turnout.measure.bits_per_byte",
            fix="pass domains=tokens.domains, and batches of the same token set",
        )
    )


def _kept(routing: Routing, keep_BS: Tensor) -> Routing:
    """The routing over only the tokens that are kept, renumbered in order."""
    keep_T = keep_BS.reshape(-1).to(routing.token_R.device)
    if keep_T.numel() != routing.num_tokens:
        raise ShapeError(
            word(
                "a routing",
                got=f"{routing.num_tokens} tokens",
                allowed=f"be over the {keep_T.numel()} tokens of the batch",
                where="turnout.measure.bits_per_byte",
                fix="flatten (B, S) in row order before routing",
            )
        )
    routing = routing.detach()
    if bool(keep_T.all()):
        return routing
    part = routing.keep(keep_T[routing.token_R])
    place_T = keep_T.long().cumsum(0) - 1
    count = int(keep_T.sum())
    return dataclasses.replace(part, token_R=place_T[part.token_R], num_tokens=count, wanted_E=None, real_T=None)


def _shares(load_LE: Sequence[Sequence[int]]) -> list[list[float]]:
    return [[count / max(sum(load_E), 1) for count in load_E] for load_E in load_LE]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
