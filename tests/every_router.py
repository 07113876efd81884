"""Each router by its name in a small language model, and what it must be told of a batch."""

import contextlib

import torch

from turnout.decide import token
from turnout.layers import given
from turnout.models import LM, LMConfig, MoEConfig

FIXED = {"Switch": 1, "GShard": 2, "BASE": 1, "StableMoE": 1, "VQ": 1, "ByKind": 1, "CIGT": 1}
# Routers of sequences and of adapters, which no feed-forward layer takes.
ELSEWHERE = {"Arrow", "FedIns", "FedJETs", "Glider", "PHATGOOSE", "Poly", "SMEAR"}
NAMES = [name for name in token.__all__ if name not in ELSEWHERE]
IDS = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(4))


def network(name: str, seed: int = 0) -> LM:
    free = {"constant": 1, "copy": 1, "zero": 1} if name == "MoEPlusPlus" else None
    moe = MoEConfig(4, FIXED.get(name, 2), 16, router=name, layers=(0, 2), zero_computation=free)
    sizes = {"width": 16, "layers": 3, "heads": 2, "hidden": 32, "max_seq": 16, "init_std": 0.3}
    return LM(LMConfig(vocab_size=32, moe=moe, **sizes), seed=seed)


def told(name: str) -> contextlib.AbstractContextManager[None]:
    task_B, kind_BS = torch.tensor([0, 1]), IDS % 2
    needs = name in ("ByKind", "Skills", "CIGT")
    return given(task_B=task_B, kind_BS=kind_BS, label_B=task_B) if needs else contextlib.nullcontext()
