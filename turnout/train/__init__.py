"""Training: losses on routings, streams of tokens, and the loop that turns them into a trained model."""

from turnout.train.balance import load_balance_loss, router_z_loss
from turnout.train.config import TrainConfig, TrainResult
from turnout.train.heldout import HeldOutBatch, held_out_batches
from turnout.train.loop import train
from turnout.train.schedule import cosine, wsd

__all__ = [
    "HeldOutBatch",
    "TrainConfig",
    "TrainResult",
    "cosine",
    "held_out_batches",
    "load_balance_loss",
    "router_z_loss",
    "train",
    "wsd",
]
