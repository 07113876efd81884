"""Whole networks: a decoder language model, dense or sparse, and its files on disk."""

from turnout.models import checkpoint
from turnout.models.fused import token_loss
from turnout.models.lm import LM, Cache, LMConfig, LMOutput, MLAConfig, MoEConfig

__all__ = ["LM", "Cache", "LMConfig", "LMOutput", "MLAConfig", "MoEConfig", "checkpoint", "token_loss"]
