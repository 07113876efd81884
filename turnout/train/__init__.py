"""Training: losses on routings, streams of tokens, and the loop that turns them into a trained model."""

from turnout.train.balance import load_balance_loss, router_z_loss

__all__ = ["load_balance_loss", "router_z_loss"]
