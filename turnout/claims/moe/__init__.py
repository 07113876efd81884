"""Claims of the family ``moe``: routers of tokens, each seen to do what its paper says, or not."""

from turnout.claims.moe.angles import angles
from turnout.claims.moe.compete import compete
from turnout.claims.moe.discrete_codes import discrete_codes
from turnout.claims.moe.even_loads import even_loads
from turnout.claims.moe.fine_experts import fine_experts
from turnout.claims.moe.global_balance import global_balance
from turnout.claims.moe.hyper_router import hyper_router
from turnout.claims.moe.information_routes import information_routes
from turnout.claims.moe.latent_trained import latent_trained
from turnout.claims.moe.patch_moe import patch_moe
from turnout.claims.moe.prototypes import prototypes
from turnout.claims.moe.rectify import rectify
from turnout.claims.moe.recurrent_router import recurrent_router
from turnout.claims.moe.remoe import remoe
from turnout.claims.moe.routed_laws import routed_laws
from turnout.claims.moe.sinkhorn_plan import sinkhorn_plan
from turnout.claims.moe.skill_net import skill_net
from turnout.claims.moe.sparse_plan import sparse_plan
from turnout.claims.moe.stable_moe import stable_moe
from turnout.claims.moe.switch_and_mixture import switch_and_mixture
from turnout.claims.moe.top_p import top_p
from turnout.claims.moe.untied_kinds import untied_kinds
from turnout.claims.moe.zero_experts import zero_experts

__all__ = [
    "angles",
    "compete",
    "discrete_codes",
    "even_loads",
    "fine_experts",
    "global_balance",
    "hyper_router",
    "information_routes",
    "latent_trained",
    "patch_moe",
    "prototypes",
    "rectify",
    "recurrent_router",
    "remoe",
    "routed_laws",
    "sinkhorn_plan",
    "skill_net",
    "sparse_plan",
    "stable_moe",
    "switch_and_mixture",
    "top_p",
    "untied_kinds",
    "zero_experts",
]
