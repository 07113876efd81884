"""Compressing experts: every matrix becomes a product of two thin ones, plus those rows of the rest that matter."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.errors import UsageError, nearest, word
from turnout.expects import expects
from turnout.layers import MoE
from turnout.models import LM, FactoredConfig, LMConfig
from turnout.paths import Bank
from turnout.reshape.calibrate import blocks, checked, difference, evaluating, probe, refuse_no_text
from turnout.reshape.rebuild import bill, rebuild
from turnout.reshape.resumable import by_batch, by_layer
from turnout.reshape.to_smaller.factors import errors, matrices, routed_layers, whole, with_factors
from turnout.types import Report
from turnout.types.weights import GATED

__all__ = ["compress_experts"]

_WHERE = "turnout.reshape.compress_experts"
_BY = ("sensitivity", "magnitude", "random")


@expects(lm=LM)
def compress_experts(
    lm: LM,
    *,
    rank: int,
    rows: float = 0.1,
    by: Literal["sensitivity", "magnitude", "random"] = "sensitivity",
    batches: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> tuple[LM, Report]:
    """The model whose expert matrices, merged ones best, are W = L R + S, S with a few rows (a row makes one output).

    L R holds W's first singular vectors. Of the rest W - L R, the rows with the highest scores of all matrices of all
    layers stay, to the share ``rows`` of its entries. The score of row i is the mean over columns j, and batches, of

        |(W - L R)_ij dLoss/dW_ij| ("sensitivity"),    or |(W - L R)_ij| ("magnitude").

    The factors are what is held, saved and run; ``densify`` writes the matrices out again.

    Args:
        lm: a model with experts, merged ones too; it is left as it is.
        rank: of every gate, value and down matrix; 0 leaves the rows alone. Under FD / (F + D) it saves.
        rows: share of the rest that stays, in [0, 1]; 1 leaves everything as it is.
        by: the score of rows; "random" is the ablation.
        batches: (B, S) token ids; needed for "sensitivity". Others compare on random tokens without them.
        seed: of "random" and of those tokens.

    Returns:
        The smaller model; and per layer the error |W' - W| / |W|, the rows kept and the mean stable rank |W|_F^2 /
        |W|_2^2 that the matrices had; the bill, and the difference on the text.

    Raises:
        UsageError: no experts or factored ones, no such score, numbers out of range, or no text where it is needed.

    >>> from turnout.models import MoEConfig
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, moe=MoEConfig(4, 2, hidden=8)))
    >>> small, report = compress_experts(lm, rank=2, rows=0.1, batches=[torch.arange(16)[None]])
    >>> report["params_after"] < report["params_before"], sorted(report["relative_error"]["0"])
    (True, ['both', 'down', 'up'])

    Source: Li et al., 2024, "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy"
    (MC-SMoE), after Li et al., 2023, "LoSparse". They prune rows step by step while a teacher trains the model; here
    they are chosen at once, scores averaged over the text. Their models have no gates; one is a matrix of its own here.
    """
    text = checked(batches, lm, _WHERE)
    _check(lm.config, rank, rows, by)
    if by == "sensitivity" and rows not in (0, 1):
        refuse_no_text(text, "the loss is differentiated on it", _WHERE)
    layers = routed_layers(lm)
    thin = by_layer("factoring", layers, lambda layer: _thin(lm, layer, rank))
    kept = _best(_scores(lm, thin, text, by, seed), rows, lm.config) if rows < 1 else {}
    new = _compressed(lm, thin, kept, rank)
    values = {"rank": rank, "rows": rows, "by": by} | {
        "rows_kept": {str(layer): [len(up_N), len(down_N)] for layer, (up_N, down_N) in kept.items()},
        "stable_rank_before": {str(layer): float(piece["stable_rank"]) for layer, piece in thin.items()},
        "relative_error": errors(lm, new, layers),
        **bill(lm, new),
        **difference(lm, new, text or probe(lm, seed)),
    }
    return new, Report("compress_experts", values, _notes(values, rows))


def planned(config: LMConfig, *, rank: int, rows: float = 0.1) -> LMConfig:
    """The configuration that ``compress_experts`` makes of this one, if rows lie evenly on all matrices.

    Raises:
        UsageError: as ``compress_experts``.
    """
    _check(config, rank, rows, "magnitude")
    moe = whole(config, _WHERE)
    if rows == 1:
        return config
    parts = 2 if moe.activation in GATED else 1
    layers = [layer for layer in range(config.layers) if config.is_routed(layer)]
    held = [config.experts_held(layer) or moe.num_experts for layer in layers]
    pairs = tuple((int(rows * count * parts * moe.hidden), int(rows * count * config.width)) for count in held)
    return with_factors(config, moe, FactoredConfig(rank, rank, rows=pairs))


def _compressed(
    lm: LM, thin: Mapping[int, Mapping[str, Tensor]], kept: Mapping[int, tuple[Tensor, Tensor]], rank: int
) -> LM:
    """The model of the factors and rows; a copy where no layer has any."""
    if not kept:
        return rebuild(lm, lm.config, {})
    changed = dict[str, Tensor]()
    for layer, rows in kept.items():
        changed |= _bank(lm, layer, thin[layer], rows)
    held = tuple((len(up_N), len(down_N)) for up_N, down_N in kept.values())
    return rebuild(
        lm, with_factors(lm.config, whole(lm.config, _WHERE), FactoredConfig(rank, rank, rows=held)), changed
    )


def _check(config: LMConfig, rank: int, rows: float, by: str) -> None:
    whole(config, _WHERE)
    most = min(config.width, _hidden(config))
    if not 0 <= rank <= most:
        allowed, fix = f"be from 0 to {most}", f"pass rank={min(max(rank, 0), most)}"
        raise UsageError(word("rank", got=rank, allowed=allowed, where=_WHERE, fix=fix))
    if not 0 <= rows <= 1:
        raise UsageError(word("rows", got=rows, allowed="be a share in [0, 1]", where=_WHERE, fix="pass rows=0.1"))
    if by not in _BY:
        raise nearest(by, _BY, kind="score", where=_WHERE)


def _hidden(config: LMConfig) -> int:
    return whole(config, _WHERE).hidden


def _thin(lm: LM, layer: int, rank: int) -> dict[str, Tensor]:
    """The factors of one layer, singular values on both sides alike, and the mean stable rank of its matrices."""
    found, ranks = dict[str, Tensor](), []
    whole_W = matrices(lm, layer)
    for name, matrix in (("up", whole_W.up_EPFD), ("down", whole_W.down_EDF)):
        left, value, right = torch.linalg.svd(matrix, full_matrices=False)
        ranks.append((value.square().sum(-1) / value[..., 0].square().clamp_min(1e-300)).flatten())
        root = value[..., :rank].sqrt()
        found |= {f"{name}_left": left[..., :rank] * root.unsqueeze(-2)}
        found |= {f"{name}_right": root.unsqueeze(-1) * right[..., :rank, :]}
    return {name: tensor.contiguous() for name, tensor in found.items()} | {"stable_rank": torch.cat(ranks).mean()}


def _rest(lm: LM, layer: int, thin: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the factors leave out of one layer's matrices: (E, H, D) and (E, D, F)."""
    whole_W = matrices(lm, layer)
    up_EPFD = whole_W.up_EPFD - thin["up_left"] @ thin["up_right"]
    return up_EPFD.flatten(1, 2), whole_W.down_EDF - thin["down_left"] @ thin["down_right"]


def _scores(
    lm: LM, thin: Mapping[int, Mapping[str, Tensor]], text: tuple[Tensor, ...], by: str, seed: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer: the score of each row of the up (E, H) and down (E, D) matrices."""
    rests = {layer: _rest(lm, layer, piece) for layer, piece in thin.items()}
    if by == "random":
        generator = torch.Generator().manual_seed(seed)
        return {n: (_drawn(up, generator), _drawn(down, generator)) for n, (up, down) in rests.items()}
    if by == "magnitude" or not text:
        return {n: (up.abs().mean(2).cpu(), down.abs().mean(2).cpu()) for n, (up, down) in rests.items()}
    sums = {n: tuple(torch.zeros(part.shape[:2], dtype=torch.float64) for part in parts) for n, parts in rests.items()}

    def work(id_BS: Tensor) -> None:
        for layer, slopes in _slopes(lm, id_BS, list(rests)).items():
            for sum_EX, part, slope in zip(sums[layer], rests[layer], slopes, strict=True):
                sum_EX.add_((part * slope).abs().mean(2).cpu())

    names = {f"{kind}-{n}": total for n, pair in sums.items() for kind, total in zip(("up", "down"), pair, strict=True)}
    by_batch("scoring rows", text, names, work)
    return {layer: (up / len(text), down / len(text)) for layer, (up, down) in sums.items()}


def _drawn(part: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(part.shape[:2], dtype=torch.float64, generator=generator)


def _slopes(lm: LM, id_BS: Tensor, layers: list[int]) -> dict[int, tuple[Tensor, ...]]:
    """By layer, dLoss/dW of the up (E, H, D) and down (E, D, F) matrices; the loss is the mean of the next token's."""
    banks = [ff.bank for layer in layers if isinstance(ff := blocks(lm)[layer].ff, MoE) and isinstance(ff.bank, Bank)]
    leaves = [leaf for bank in banks for leaf in (bank.up, bank.down)]
    before = [leaf.requires_grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.requires_grad_(True)
        with torch.enable_grad(), evaluating(lm):
            logits_BSV = lm(id_BS).logits_BSV[:, :-1].float()
            loss = F.cross_entropy(logits_BSV.flatten(0, 1), id_BS[:, 1:].flatten())
            found = [slope.double() for slope in torch.autograd.grad(loss, leaves)]
    finally:
        for leaf, trained in zip(leaves, before, strict=True):
            leaf.requires_grad_(trained)
    return {layer: (found[2 * place], found[2 * place + 1]) for place, layer in enumerate(layers)}


def _best(
    scores: Mapping[int, tuple[Tensor, Tensor]], share: float, config: LMConfig
) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer, the rows that stay, as flat indices, ascending: the best of all until the share is used up."""
    lengths = config.width, _hidden(config)  # of a row of the up and of the down matrices
    parts = [(layer, kind, score) for layer, pair in scores.items() for kind, score in enumerate(pair)]
    score_N = torch.cat([score.flatten() for _, _, score in parts])
    length_N = torch.cat([torch.full((score.numel(),), lengths[kind]) for _, kind, score in parts])
    order_N = score_N.sort(descending=True, stable=True)[1]
    stays_N = torch.zeros(len(score_N), dtype=torch.bool)
    stays_N[order_N[length_N[order_N].cumsum(0) <= share * int(length_N.sum())]] = True
    pieces = [piece.nonzero().flatten() for piece in stays_N.split([score.numel() for _, _, score in parts])]
    return {layer: (pieces[2 * place], pieces[2 * place + 1]) for place, layer in enumerate(scores)}


def _bank(lm: LM, layer: int, thin: Mapping[str, Tensor], kept: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer's new bank by name, in the model's own dtype."""
    up_EHD, down_EDF = _rest(lm, layer, thin)
    up_N, down_N = (row_N.to(up_EHD.device) for row_N in kept)
    found = {"up_rest": up_EHD.flatten(0, 1)[up_N], "down_rest": down_EDF.flatten(0, 1)[down_N]}
    if thin["up_left"].shape[-1]:
        found |= {"up_in": thin["up_right"].flatten(1, 2), "up_out": thin["up_left"].flatten(1, 2)}
        found |= {"down_in": thin["down_right"], "down_out": thin["down_left"]}
    found = {name: tensor.to(lm.embedding.dtype) for name, tensor in found.items()}
    return {
        f"blocks.{layer}.ff.bank.{name}": tensor
        for name, tensor in (found | {"up_row": up_N, "down_row": down_N}).items()
    }


def _notes(values: Mapping[str, object], rows: float) -> tuple[str, ...]:
    if rows == 1:
        return ("nothing was compressed",)
    after, before = values["params_after"], values["params_before"]
    assert isinstance(after, int) and isinstance(before, int)
    if after >= before:
        return ("the factors are no smaller than the matrices: take a lower rank or fewer rows",)
    return ()
