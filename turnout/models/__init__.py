"""Whole networks: a decoder language model, dense or sparse, and its files on disk."""

from turnout.models import checkpoint
from turnout.models.fused import token_loss
from turnout.models.head import LMLoss, head_loss
from turnout.models.jets import Jets
from turnout.models.lm import LM, Cache, FactoredConfig, LMConfig, LMOutput, MLAConfig, MoEConfig, QuantizedConfig
from turnout.models.pre_gate import PreGate
from turnout.models.sentence import SentenceEncoder

__all__ = [
    "LM",
    "Cache",
    "FactoredConfig",
    "Jets",
    "LMConfig",
    "LMLoss",
    "LMOutput",
    "MLAConfig",
    "MoEConfig",
    "PreGate",
    "QuantizedConfig",
    "SentenceEncoder",
    "checkpoint",
    "head_loss",
    "token_loss",
]
