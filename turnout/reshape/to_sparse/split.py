"""Splitting: the neurons of a dense feed-forward layer are dealt out to equal experts; none is copied, none is lost."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.errors import UsageError, nearest, word
from turnout.expects import expects
from turnout.models import LM, LMConfig, MoEConfig
from turnout.paths import FeedForward
from turnout.reshape.calibrate import blocks, checked, difference, probe, reach, refuse_no_text
from turnout.reshape.rebuild import bill, rebuild
from turnout.reshape.to_sparse.neuron_groups import Deal, cluster, coactivation, gradient
from turnout.types import Report
from turnout.types.weights import GATED

__all__ = ["split"]

_WHERE = "turnout.reshape.split"
_BY = ("cluster", "coactivation", "gradient", "random")
# How large the starting logits are, where a token leaves experts out and where it takes all: weights are within a
# thousandth of 1, and 1 to rounding. The order of the experts, which is what matters, does not depend on it.
_SPREAD, _ALL = 1e-3, 1e-6


@expects(lm=LM)
def split(
    lm: LM,
    *,
    num_experts: int,
    top_k: int,
    by: Literal["cluster", "coactivation", "gradient", "random"] = "cluster",
    batches: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> tuple[LM, Report]:
    """A mixture of experts whose experts are the dense model's neurons, F / E each, every one in exactly one expert.

    "cluster": balanced spherical k-means on the normalised gate rows (up rows without a gate). "coactivation": the same
    on each neuron's activations over the text. "gradient": tokens are clustered, and neuron n goes to the cluster c
    where it matters most, sum over its tokens of |h_n dL/dh_n|. All give each expert F / E neurons, by exact transport.
    The router's rows are the directions of the experts' mean gate rows (for "gradient" of the tokens' centres); logits
    start at 1e-3, so the chosen experts weigh 1 +- 0.001 each: K = E computes what the dense layer does.

    Args:
        lm: a dense model; it is left as it is.
        num_experts: E, a divisor of the hidden width.
        top_k: K, experts per token, 2 to E; 1 with E = 1, which leaves the model dense.
        by: how neurons are dealt out.
        batches: (B, S) token ids; needed for "coactivation" and "gradient".
        seed: of the starting centres, of "random", and of ids to compare on without text.

    Returns:
        The sparse model; and the expert of each neuron per layer, the bill, and the difference on the text.

    Raises:
        UsageError: a model that is not dense, sizes that do not fit, or no text where it is needed.

    >>> from turnout.models import LMConfig
    >>> dense = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, hidden=12))
    >>> sparse, report = split(dense, num_experts=4, top_k=4)
    >>> sparse.config.moe.hidden, report["relative_difference"] < 1e-5
    (3, True)

    Source: Zhu et al., 2024, "LLaMA-MoE: Building Mixture-of-Experts from LLaMA with Continual Pre-training"; "cluster"
    and "coactivation" after Zhang et al., 2022, "MoEfication". No neuron is shared; co-activation is clustered, not
    cut with METIS; we cluster rows of the gate, LLaMA-MoE those of the up projection; the chosen experts are not scaled
    up, where LLaMA-MoE multiplies by E / K.
    """
    text = checked(batches, lm, _WHERE)
    if by not in _BY:
        raise nearest(by, _BY, kind="way to split", where=_WHERE)
    config = planned(lm.config, num_experts=num_experts, top_k=top_k)
    if by in ("coactivation", "gradient"):
        refuse_no_text(text, f"{by!r} looks at the neurons on it", _WHERE)
    if config.moe is None:  # one expert is the dense layer
        new = rebuild(lm, lm.config, {})
        values = {"num_experts": 1, **bill(lm, new), **difference(lm, new, text or probe(lm, seed))}
        return new, Report("split", values, ("one expert: the model stays dense",))
    find = {"coactivation": coactivation, "gradient": gradient}.get(by)
    dealt = find(lm, text, num_experts, seed) if find else cluster(lm, num_experts, seed, at_random=by == "random")
    new = _sparse(lm, config, dealt)
    return new, _report(lm, new, by, dealt, text or probe(lm, seed))


def _sparse(lm: LM, config: LMConfig, dealt: list[Deal]) -> LM:
    moe = config.moe
    assert moe is not None
    num_experts, top_k = moe.num_experts, moe.top_k
    changed = dict[str, Tensor]()
    for layer, deal in enumerate(dealt):
        block, name = blocks(lm)[layer], f"blocks.{layer}.ff"
        assert isinstance(block.ff, FeedForward)
        up_EDH, down_EFD = _experts(block.ff, deal.expert_F, num_experts)
        changed |= {f"{name}.bank.up": up_EDH, f"{name}.bank.down": down_EFD * top_k}
        if block.ff.up_bias is not None and block.ff.down_bias is not None:
            up_EH, down_D = _dealt(block.ff.up_bias, block.ff, deal.expert_F, num_experts), block.ff.down_bias.detach()
            changed |= {f"{name}.bank.up_bias": up_EH, f"{name}.bank.down_bias": down_D.repeat(num_experts, 1)}
        size = (_ALL if top_k == num_experts else _SPREAD) / max(reach(lm, layer), 1e-12)
        changed[f"{name}.router.weight"] = (F.normalize(deal.centre_ED, dim=1) * size).to(lm.embedding.dtype)
    return rebuild(lm, config, changed)


def planned(config: LMConfig, *, num_experts: int, top_k: int) -> LMConfig:
    """The configuration that ``split`` makes of this one.

    Raises:
        UsageError: as ``split``.
    """
    _check(config, num_experts, top_k)
    if num_experts == 1:  # the one expert is the dense layer
        return config
    moe = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        hidden=config.dense_hidden // num_experts,
        router_options={"renormalize": True},
        activation=config.activation,
        bias=config.ff_bias,
    )
    return dataclasses.replace(config, moe=moe)


def _experts(ff: FeedForward, expert_F: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Up (E, D, H) and down (E, F/E, D), the neurons of each expert in their old order."""
    up_EHD, order_Ef = _dealt(ff.up, ff, expert_F, num_experts), _order(expert_F, num_experts, ff.up.device)
    return up_EHD.transpose(1, 2), ff.down.detach().t()[order_Ef]


def _order(expert_F: Tensor, num_experts: int, device: torch.device) -> Tensor:
    """(E, F/E) the neurons of each expert in their old order."""
    return expert_F.sort(stable=True)[1].view(num_experts, -1).to(device)


def _dealt(up: Tensor, ff: FeedForward, expert_F: Tensor, num_experts: int) -> Tensor:
    """(E, H, ...) the rows of the up product, or of its bias (H,), that belong to each expert."""
    parts = 2 if ff.activation in GATED else 1
    of_PEf = up.detach().unflatten(0, (parts, -1))[:, _order(expert_F, num_experts, up.device)]
    return of_PEf.transpose(0, 1).flatten(1, 2)


def _report(before: LM, after: LM, by: str, dealt: list[Deal], text: tuple[Tensor, ...]) -> Report:
    moe = after.config.moe
    assert moe is not None
    values = {
        "by": by,
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "expert_hidden": moe.hidden,
        "expert_of_neuron": {str(layer): deal.expert_F.tolist() for layer, deal in enumerate(dealt)},
        **bill(before, after),
        **difference(before, after, text),
    }
    notes = (f"a token skips {moe.num_experts - moe.top_k} of {moe.num_experts} experts: train on to win back quality",)
    return Report("split", values, notes if moe.top_k < moe.num_experts else ())


def _check(config: LMConfig, num_experts: int, top_k: int) -> None:
    if config.moe is not None:
        fix = "split the dense model that it came from"
        raise UsageError(word("the model", got="one with experts", allowed="be dense", where=_WHERE, fix=fix))
    hidden = config.dense_hidden
    if num_experts < 1 or hidden % num_experts:
        near = min((e for e in range(1, hidden + 1) if hidden % e == 0), key=lambda e: abs(e - num_experts))
        fix = f"pass num_experts={near}"
        allowed = f"divide the hidden width {hidden}"
        raise UsageError(word("num_experts", got=num_experts, allowed=allowed, where=_WHERE, fix=fix))
    least = min(2, num_experts)
    if not least <= top_k <= num_experts:
        allowed = f"be from {least} to num_experts={num_experts}"
        if top_k == 1:
            allowed += " (with one, the weight would be a probability, or the router could not learn)"
        fix = f"pass top_k={min(max(top_k, least), num_experts)}"
        raise UsageError(word("top_k", got=top_k, allowed=allowed, where=_WHERE, fix=fix))
