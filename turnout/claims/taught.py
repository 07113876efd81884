"""A small sparse and a small dense model, trained once a process, for the claims that change models that exist."""

import copy
import functools

import torch
from torch import Tensor

from turnout.claims.trial import SEQ, small, text, trial
from turnout.measure import bits_per_byte
from turnout.models import LM, MoEConfig
from turnout.train.data import windows

STEPS, HIDDEN, SCORED = 300, 192, 32_768
EXPERTS, TOP_K = 16, 2
UNEVEN = 0.01  # the weight of an auxiliary loss that leaves the load uneven


@functools.lru_cache(6)
def _taught(seed: int, routed: bool, even: bool) -> LM:
    options: dict[str, object] = {"rate": 0.01 if even else 0.0, "renormalize": True}
    moe = MoEConfig(EXPERTS, TOP_K, HIDDEN // TOP_K, router="LossFree", router_options=options)
    lm = LM(small(moe if routed else None, hidden=HIDDEN), seed=seed)
    trial(lm, seed=seed, steps=STEPS, aux_weight=0.0 if even else UNEVEN)
    return lm.eval()


def taught(seed: int, *, routed: bool, even: bool = True) -> LM:
    """The model after 300 steps of 1,024 tokens: dense, or of 16 experts, 2 a token; a copy.

    The experts' load is balanced by a bias, or left uneven by a light auxiliary loss.
    """
    return copy.deepcopy(_taught(seed, routed, even))


def sample(seed: int, *, rows: int = 32) -> list[Tensor]:
    """Calibration text: rows of training tokens, (B, S) of 8 x 128 each."""
    token_T = text().train.token_T
    generator = torch.Generator().manual_seed(seed)
    start_B = torch.randint(len(token_T) - SEQ, (rows,), generator=generator).tolist()
    id_BS = torch.stack([torch.from_numpy(token_T[start : start + SEQ].astype("int64")) for start in start_B])
    return list(id_BS.split(8))


def score(lm: LM) -> float:
    """Held-out bits per byte on the text of the trials."""
    tokens = text()
    lm.eval()
    held_out = windows(tokens.held_out, batch=8, seq=SEQ, limit=SCORED)
    return bits_per_byte(lm, held_out, torch.from_numpy(tokens.byte_length_V), domains=tokens.domains).bits_per_byte
