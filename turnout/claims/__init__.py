"""Published results reproduced small, each measured against its own ablation; ``turnout verify`` runs them."""

import statistics
from collections.abc import Callable

from turnout.claims import moe, scale, serve
from turnout.claims.arrow import arrow
from turnout.claims.backends import backends
from turnout.claims.claim import FEWEST_SEEDS, Claim, Result
from turnout.claims.compress_experts import compress_experts
from turnout.claims.dense_to_sparse import dense_to_sparse
from turnout.claims.drop_experts import drop_experts
from turnout.claims.evo_moe import evo_moe
from turnout.claims.expert_choice import expert_choice
from turnout.claims.fedins import fedins
from turnout.claims.fedjets import fedjets
from turnout.claims.fisher import fisher
from turnout.claims.glider import glider
from turnout.claims.k_bits import k_bits
from turnout.claims.latent_experts import latent_experts
from turnout.claims.loss_free import loss_free
from turnout.claims.merge_aligned import merge_aligned
from turnout.claims.merge_experts import merge_experts
from turnout.claims.mhr import mhr
from turnout.claims.mhr_mu import mhr_mu
from turnout.claims.moe import (
    angles,
    compete,
    discrete_codes,
    even_loads,
    fine_experts,
    global_balance,
    hyper_router,
    information_routes,
    latent_trained,
    patch_moe,
    prototypes,
    rectify,
    recurrent_router,
    remoe,
    routed_laws,
    sinkhorn_plan,
    skill_net,
    sparse_plan,
    stable_moe,
    switch_and_mixture,
    top_p,
    untied_kinds,
    zero_experts,
)
from turnout.claims.moe_beats_dense import moe_beats_dense
from turnout.claims.mos import mos
from turnout.claims.phatgoose import phatgoose
from turnout.claims.read_me import read_me
from turnout.claims.scale import (
    agvm,
    block_schedule,
    co2,
    coded,
    comet,
    diloco,
    exflow,
    flowmoe,
    flows,
    fsmoe,
    fuyou,
    fzoos,
    gpipe,
    hecate,
    interleaved,
    moetuner,
    one_byte,
    post_validation,
    replan,
    schedule_search,
    shuffle_private,
    sparse_zo,
    superpipeline,
    surco,
    tutel,
    zero,
    zero_bubble,
    zero_plus_plus,
    zeropp,
)
from turnout.claims.scalearn import scalearn
from turnout.claims.serve import (
    buffer_overflow,
    c3po,
    expert_caching,
    expert_flow,
    few_predictions,
    pr_moe,
    pre_gated,
    scmoe,
    trace_matching,
)
from turnout.claims.smear import smear
from turnout.claims.soup import soup
from turnout.claims.split import split
from turnout.claims.stragglers import stragglers
from turnout.claims.upcycle import upcycle
from turnout.claims.zipnn import zipnn
from turnout.errors import nearest

__all__ = [
    "agvm",
    "angles",
    "arrow",
    "backends",
    "block_schedule",
    "buffer_overflow",
    "c3po",
    "co2",
    "coded",
    "comet",
    "compete",
    "compress_experts",
    "dense_to_sparse",
    "diloco",
    "discrete_codes",
    "drop_experts",
    "even_loads",
    "evo_moe",
    "exflow",
    "expert_caching",
    "expert_choice",
    "expert_flow",
    "fedins",
    "fedjets",
    "few_predictions",
    "fine_experts",
    "fisher",
    "flowmoe",
    "flows",
    "fsmoe",
    "fuyou",
    "fzoos",
    "glider",
    "global_balance",
    "gpipe",
    "hecate",
    "hyper_router",
    "information_routes",
    "interleaved",
    "k_bits",
    "latent_experts",
    "latent_trained",
    "loss_free",
    "merge_aligned",
    "merge_experts",
    "mhr",
    "mhr_mu",
    "moe_beats_dense",
    "moetuner",
    "mos",
    "one_byte",
    "patch_moe",
    "phatgoose",
    "post_validation",
    "pr_moe",
    "pre_gated",
    "prototypes",
    "read_me",
    "rectify",
    "recurrent_router",
    "remoe",
    "replan",
    "routed_laws",
    "scalearn",
    "schedule_search",
    "scmoe",
    "shuffle_private",
    "sinkhorn_plan",
    "skill_net",
    "smear",
    "soup",
    "sparse_plan",
    "sparse_zo",
    "split",
    "stable_moe",
    "stragglers",
    "superpipeline",
    "surco",
    "switch_and_mixture",
    "top_p",
    "trace_matching",
    "tutel",
    "untied_kinds",
    "upcycle",
    "zero",
    "zero_bubble",
    "zero_experts",
    "zero_plus_plus",
    "zeropp",
    "zipnn",
]


FAMILIES = {"moe": moe, "scale": scale, "serve": serve}


def family(name: str) -> list[str]:
    """The names of the claims of one family, in their order.

    Raises:
        UnknownNameError: there is no such family; the nearest is offered.

    >>> set(family("scale")) <= set(__all__)
    True

    Source: none; plain bookkeeping.
    """
    if name not in FAMILIES:
        raise nearest(name, list(FAMILIES), kind="family", where="turnout verify")
    return FAMILIES[name].__all__


def find(name: str) -> Callable[[], Claim]:
    """The claim of this name.

    Raises:
        UnknownNameError: there is no such claim; the nearest is offered.
    """
    if name not in __all__:
        raise nearest(name, __all__, kind="claim", where="turnout verify")
    return globals()[name]


def show(result: Result) -> str:
    """The claim and its evidence as a few lines of text."""
    claim, few = result.claim, len(result.seeds) < FEWEST_SEEDS
    verdict = f"no verdict from {len(result.seeds)} of at least {FEWEST_SEEDS} seeds" if few else _verdict(result)
    how = "simulated, " if claim.simulated else ""
    lines = [f"{claim.name}: {verdict} ({how}{result.seconds:.0f} s)", f"  {claim.statement}"]
    for one in result.evidence:
        row, seen = one.row, "--" if few else "ok" if one.holds else "NO"
        measured, control = statistics.fmean(one.measured), statistics.fmean(one.control)
        limits = {
            "below": f"spread {one.spread:.4f}",
            "no_worse": f"{one.difference:+.4f} + spread {one.spread:.4f}, margin {row.margin}",
            "within": f"bound {row.bound}",
        }
        metric = f"{row.metric} (the paper's headline)" if row.headline else row.metric
        lines.append(
            f"  {seen}  {metric}: {measured:.4g} against {control:.4g} ({row.against}), {limits[row.relation]}"
        )
    return "\n".join([*lines, f"  Off: {claim.off}. {claim.source}. {result.note}"])


def _verdict(result: Result) -> str:
    if result.holds:
        return "holds"
    if result.mechanism:
        return "its mechanism holds, the paper's headline DOES NOT"
    return "DOES NOT HOLD" + (", the paper's headline does" if result.headline else "")
