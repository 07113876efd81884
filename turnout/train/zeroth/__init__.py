"""Training without gradients: losses at perturbed parameters, which cost the memory of inference."""

from turnout.train.zeroth.one_byte import OneByte, Sent, gather_bytes, perturbed
from turnout.train.zeroth.sparse import mezo, overlay, sensitive

__all__ = [
    "OneByte",
    "Sent",
    "gather_bytes",
    "mezo",
    "overlay",
    "perturbed",
    "sensitive",
]
