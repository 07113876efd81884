"""Latent experts: what the experts of a group do to a token begins and ends in one narrow space that they share."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.expects import expects
from turnout.models import LM, FactoredConfig, LMConfig
from turnout.reshape.calibrate import checked, difference, probe
from turnout.reshape.rebuild import bill, rebuild
from turnout.reshape.resumable import by_layer
from turnout.reshape.to_smaller.factors import errors, matrices, routed_layers, whole, with_factors
from turnout.types import Report

__all__ = ["latent_experts"]

_WHERE = "turnout.reshape.latent_experts"


@expects(lm=LM)
def latent_experts(
    lm: LM,
    *,
    rank: int,
    share: int | None = None,
    reduce: int | None = None,
    basis: str = "svd",
    batches: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> tuple[LM, Report]:
    """The model with gates and values W_e = A_e B and down matrices W_e = B^T A_e, each B one for many experts.

    B holds the first right singular vectors of the W_e on top of each other, and A_e = W_e B^T; what is left out is

        min over A, B of sum_e |W_e - A_e B|_F^2 = sum over i > rank of sigma_i^2.

    With ``reduce`` each W_e is first cut to that rank; what goes then is orthogonal to all that follows, so squares of
    both errors add. x B^T is made once a token for all its experts of a group; their sum leaves through B once, too.

    Args:
        lm: a model with experts, merged ones too; it is left as it is.
        rank: width of the latent space, of gate, value and down each; the model's width leaves everything as it is.
        share: how many neighbouring experts share B; None for all.
        reduce: rank that each expert's matrices are cut to first; None leaves them.
        basis: "svd", or "random", an orthonormal B drawn at random: the ablation.
        batches: (B, S) token ids to compare on; random tokens when None.
        seed: of what is random.

    Returns:
        The smaller model; and per layer the relative error that singular values foretell (``bound``) and that of the
        new matrices (``relative_error``), for up, down and both; the bill, and the difference on the text.

    Raises:
        UsageError: no experts, factored ones, or a number out of range.

    >>> from turnout.models import MoEConfig
    >>> lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, moe=MoEConfig(4, 2, hidden=8)))
    >>> small, report = latent_experts(lm, rank=4)
    >>> abs(report["bound"]["0"]["both"] - report["relative_error"]["0"]["both"]) < 1e-6
    True

    Source: Liu et al., 2025, "Beyond Standard MoE: Mixture of Latent Experts for Resource-Efficient Language Models",
    its conversion in two phases. The first only adds to the error; it is off unless asked for. B is orthonormal here.
    """
    text = checked(batches, lm, _WHERE)
    config = planned(lm.config, rank=rank, share=share, reduce=reduce)
    drawn = _seed(basis, seed)
    found, layers = dict[int, Mapping[str, Tensor]](), routed_layers(lm)
    sizes = None if config.moe is None else config.moe.factored
    if sizes is not None:
        found = by_layer("finding latent spaces", layers, lambda layer: _layer(lm, layer, sizes, reduce, drawn))
    new = rebuild(lm, config, _banks(lm, found))
    values = {"rank": rank, "share": sizes.share if sizes else None, "reduce": reduce, "basis": basis} | {
        "bound": {str(layer): _bound(piece) for layer, piece in found.items()},
        "relative_error": errors(lm, new, layers),
        **bill(lm, new),
        **difference(lm, new, text or probe(lm, seed)),
    }
    return new, Report("latent_experts", values, _notes(lm.config, config, values))


def _seed(basis: str, seed: int) -> int | None:
    if basis not in ("svd", "random"):
        raise UsageError(word("basis", got=basis, allowed="be 'svd' or 'random'", where=_WHERE, fix="pass basis='svd'"))
    return seed if basis == "random" else None


def planned(config: LMConfig, *, rank: int, share: int | None = None, reduce: int | None = None) -> LMConfig:
    """The configuration that ``latent_experts`` makes of this one.

    Raises:
        UsageError: as ``latent_experts``.
    """
    moe = whole(config, _WHERE)
    share = moe.num_experts if share is None else share
    narrow = min(config.width, moe.hidden)
    limits = {
        "rank": (rank, config.width),
        "share": (share, moe.num_experts),
        "reduce": (narrow if reduce is None else reduce, narrow),
    }
    for name, (got, most) in limits.items():
        if not 1 <= got <= most:
            fix = f"pass {name}={min(max(got, 1), most)}"
            raise UsageError(word(name, got=got, allowed=f"be from 1 to {most}", where=_WHERE, fix=fix))
    if rank == config.width and (reduce is None or reduce == narrow):
        return config
    return with_factors(config, moe, FactoredConfig(rank, rank, share=share))


def _layer(lm: LM, layer: int, sizes: FactoredConfig, reduce: int | None, drawn: int | None) -> dict[str, Tensor]:
    """The factors of one layer, and the squares of what they leave out and of what there was."""
    of = matrices(lm, layer)
    rows = {"up": of.up_EPFD.transpose(0, 1), "down": of.down_EDF.transpose(1, 2).unsqueeze(0)}  # (P, E, F, D)
    found = dict[str, Tensor]()
    for kind, rank in (("up", sizes.up_rank), ("down", sizes.down_rank)):
        cut_PEFD, lost = _cut(rows[kind], reduce)
        size = rows[kind].square().sum()
        factors, bases = [], []
        for part, matrix_EFD in enumerate(cut_PEFD):
            of_part = None if drawn is None else drawn + 101 * layer + 10 * part + (kind == "down")
            pieces = [_shared(group_EFD, rank, of_part) for group_EFD in matrix_EFD.split(sizes.share)]
            bases.append(torch.stack([basis_rD for basis_rD, _ in pieces]))
            lost = lost + sum(left_out for _, left_out in pieces)
            each_ErD = bases[-1].repeat_interleave(sizes.share, 0)[: len(matrix_EFD)]
            factors.append(matrix_EFD @ each_ErD.transpose(1, 2))
        found |= {f"{kind}_basis": torch.cat(bases, 1), f"{kind}_own": torch.cat(factors, 1)}
        found |= {f"{kind}_lost": lost.reshape(()), f"{kind}_size": size}
    return found


def _cut(matrix_PEFD: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Every matrix at a rank of its own, and the sum of the squares of what that leaves out."""
    if rank is None:
        return matrix_PEFD, matrix_PEFD.new_zeros(())
    left, value, right = torch.linalg.svd(matrix_PEFD, full_matrices=False)
    kept = (left[..., :rank] * value[..., None, :rank]) @ right[..., :rank, :]
    return kept, value[..., rank:].square().sum()


def _shared(matrix_EFD: Tensor, rank: int, drawn: int | None) -> tuple[Tensor, Tensor]:
    """The (r, D) orthonormal rows that serve these experts best, and the sum of the squares of what they leave out."""
    gram_DD = torch.einsum("efd,efc->dc", matrix_EFD, matrix_EFD)
    if drawn is None:
        value_D, vector_DD = torch.linalg.eigh(gram_DD)
        return vector_DD[:, -rank:].flip(1).t(), value_D[:-rank].clamp_min(0).sum()
    generator = torch.Generator().manual_seed(drawn)
    random_Dr = torch.randn(len(gram_DD), rank, generator=generator, dtype=torch.float64)
    basis_rD = torch.linalg.qr(random_Dr)[0].t().to(gram_DD.device)
    return basis_rD, gram_DD.trace() - ((basis_rD @ gram_DD) * basis_rD).sum()


def _banks(lm: LM, found: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of the new banks by name."""
    return {f"blocks.{n}.ff.bank.{name}": part for n, piece in found.items() for name, part in _bank(lm, piece).items()}


def _bank(lm: LM, piece: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer's new bank by name, in the model's own dtype."""
    found = {
        "up_in": piece["up_basis"],
        "up_out": piece["up_own"],
        "down_in": piece["down_own"].transpose(1, 2),
        "down_out": piece["down_basis"].transpose(1, 2),
        "up_rest": piece["up_basis"].new_zeros(0, piece["up_basis"].shape[2]),
        "down_rest": piece["up_basis"].new_zeros(0, piece["down_own"].shape[1]),
    }
    none = torch.zeros(0, dtype=torch.int64)
    return {name: part.to(lm.embedding.dtype) for name, part in found.items()} | {"up_row": none, "down_row": none}


def _bound(piece: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative errors that the singular values foretell."""
    lost, size = ([float(piece[f"{kind}_{what}"]) for kind in ("up", "down")] for what in ("lost", "size"))
    pairs = {"up": (lost[0], size[0]), "down": (lost[1], size[1]), "both": (sum(lost), sum(size))}
    return {name: math.sqrt(gap / max(of, 1e-300)) for name, (gap, of) in pairs.items()}


def _notes(before: LMConfig, after: LMConfig, values: Mapping[str, object]) -> tuple[str, ...]:
    if before == after:
        return ("nothing was changed: the latent space is as wide as the model",)
    ours, theirs = values["params_after"], values["params_before"]
    assert isinstance(ours, int) and isinstance(theirs, int)
    if ours >= theirs:
        return ("the factors are no smaller than the matrices: take a lower rank, or share them among more experts",)
    return ()
