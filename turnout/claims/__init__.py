"""Published results reproduced small, each measured against its own ablation; ``turnout verify`` runs them."""

from turnout.claims import scale
from turnout.claims.arrow import arrow
from turnout.claims.backends import backends
from turnout.claims.claim import Claim, FEWEST_SEEDS, Result
from turnout.claims.compress_experts import compress_experts
from turnout.claims.dense_to_sparse import dense_to_sparse
from turnout.claims.drop_experts import drop_experts
from turnout.claims.evo_moe import evo_moe
from turnout.claims.expert_choice import expert_choice
from turnout.claims.fedins import fedins
from turnout.claims.fedjets import fedjets
from turnout.claims.fisher import fisher
from turnout.claims.glider import glider
from turnout.claims.latent_experts import latent_experts
from turnout.claims.loss_free import loss_free
from turnout.claims.merge_aligned import merge_aligned
from turnout.claims.merge_experts import merge_experts
from turnout.claims.mhr import mhr
from turnout.claims.mhr_mu import mhr_mu
from turnout.claims.moe_beats_dense import moe_beats_dense
from turnout.claims.mos import mos
from turnout.claims.phatgoose import phatgoose
from turnout.claims.read_me import read_me
from turnout.claims.scale import co2, coded, diloco, gpipe, interleaved, one_byte, schedule_search, zero, zero_bubble, zero_plus_plus, zeropp
from turnout.claims.scalearn import scalearn
from turnout.claims.smear import smear
from turnout.claims.soup import soup
from turnout.claims.split import split
from turnout.claims.stragglers import stragglers
from turnout.claims.upcycle import upcycle
from turnout.errors import nearest

__all__ = [
    "arrow",
    "backends",
    "co2",
    "coded",
    "compress_experts",
    "dense_to_sparse",
    "diloco",
    "drop_experts",
    "evo_moe",
    "expert_choice",
    "fedins",
    "fedjets",
    "fisher",
    "glider",
    "gpipe",
    "interleaved",
    "latent_experts",
    "loss_free",
    "merge_aligned",
    "merge_experts",
    "mhr",
    "mhr_mu",
    "moe_beats_dense",
    "mos",
    "one_byte",
    "phatgoose",
    "read_me",
    "scale",
    "scalearn",
    "schedule_search",
    "smear",
    "soup",
    "split",
    "stragglers",
    "upcycle",
    "zero",
    "zero_bubble",
    "zero_plus_plus",
    "zeropp",
]
