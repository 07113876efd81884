"""Whole networks: a decoder language model, dense or sparse, and its files on disk."""

from turnout.models import checkpoint
from turnout.models.c3po import C3PO, Pathways
from turnout.models.contrast import Contrast
from turnout.models.draw import Drawing
from turnout.models.fused import token_loss
from turnout.models.generated import Asked, Generated, Piece
from turnout.models.generation import generate
from turnout.models.head import LMLoss, head_loss
from turnout.models.jets import Jets
from turnout.models.lm import LM, Cache, FactoredConfig, LMConfig, LMOutput, MLAConfig, MoEConfig, QuantizedConfig
from turnout.models.pre_gate import PreGate
from turnout.models.sentence import SentenceEncoder

__all__ = [
    "C3PO",
    "LM",
    "Asked",
    "Cache",
    "Contrast",
    "Drawing",
    "FactoredConfig",
    "Generated",
    "Jets",
    "LMConfig",
    "LMLoss",
    "LMOutput",
    "MLAConfig",
    "MoEConfig",
    "Pathways",
    "Piece",
    "PreGate",
    "QuantizedConfig",
    "SentenceEncoder",
    "checkpoint",
    "generate",
    "head_loss",
    "token_loss",
]
