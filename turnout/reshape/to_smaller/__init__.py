"""Sparse to smaller: experts dropped, merged or compressed, and written out whole again."""

from turnout.reshape.to_smaller.compress_experts import compress_experts
from turnout.reshape.to_smaller.densify import densify
from turnout.reshape.to_smaller.drop_experts import drop_experts
from turnout.reshape.to_smaller.latent_experts import latent_experts
from turnout.reshape.to_smaller.merge_experts import merge_experts

__all__ = [
    "compress_experts",
    "densify",
    "drop_experts",
    "latent_experts",
    "merge_experts",
]
