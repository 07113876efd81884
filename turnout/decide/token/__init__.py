"""Routers: which experts a token takes. Each is a module from tokens (T, D) to a ``Routing``.

All of them compute in fp32 whatever the dtype of the tokens, break ties towards the lower index on every device, and
draw noise in training only. They differ in who chooses (the token, the expert, its id) and in what keeps the load even.
"""

from turnout.decide.token.arrow import Arrow
from turnout.decide.token.balanced import BASE
from turnout.decide.token.by_kind import ByKind, Skills
from turnout.decide.token.cigt import CIGT
from turnout.decide.token.compete import CompeteSMoE
from turnout.decide.token.deepseek import GroupLimited
from turnout.decide.token.dense_to_sparse import DenseToSparse
from turnout.decide.token.expert_choice import ExpertChoice
from turnout.decide.token.fedins import FedIns
from turnout.decide.token.fedjets import FedJETs
from turnout.decide.token.glider import Glider
from turnout.decide.token.gshard import GShard
from turnout.decide.token.hash import Hash
from turnout.decide.token.hyper_router import HyperRouter
from turnout.decide.token.loss_free import LossFree
from turnout.decide.token.moe_plus_plus import MoEPlusPlus
from turnout.decide.token.noisy import NoisyTopK
from turnout.decide.token.patch_choice import PatchChoice
from turnout.decide.token.phatgoose import PHATGOOSE
from turnout.decide.token.poly import Poly
from turnout.decide.token.prototyping import Prototyping
from turnout.decide.token.rectify import Rectify
from turnout.decide.token.remoe import ReMoE
from turnout.decide.token.rmoe import RMoE
from turnout.decide.token.sam import SAM
from turnout.decide.token.sinkhorn_router import Sinkhorn
from turnout.decide.token.smear import SMEAR
from turnout.decide.token.sparse_transport import SparseTransport
from turnout.decide.token.stable import StableMoE
from turnout.decide.token.switch import Switch
from turnout.decide.token.top_p import TopP
from turnout.decide.token.topk import TopK
from turnout.decide.token.vq import VQ
from turnout.decide.token.xmoe import XMoE

__all__ = [
    "BASE",
    "CIGT",
    "PHATGOOSE",
    "SAM",
    "SMEAR",
    "VQ",
    "Arrow",
    "ByKind",
    "CompeteSMoE",
    "DenseToSparse",
    "ExpertChoice",
    "FedIns",
    "FedJETs",
    "GShard",
    "Glider",
    "GroupLimited",
    "Hash",
    "HyperRouter",
    "LossFree",
    "MoEPlusPlus",
    "NoisyTopK",
    "PatchChoice",
    "Poly",
    "Prototyping",
    "RMoE",
    "ReMoE",
    "Rectify",
    "Sinkhorn",
    "Skills",
    "SparseTransport",
    "StableMoE",
    "Switch",
    "TopK",
    "TopP",
    "XMoE",
]
