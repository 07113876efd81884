"""Training without gradients: losses at perturbed parameters, which cost the memory of inference."""

from turnout.train.zeroth.fedzo import Federation, fedzo
from turnout.train.zeroth.fzoos import FZooS, fzoos
from turnout.train.zeroth.one_byte import OneByte, Sent, gather_bytes, perturbed
from turnout.train.zeroth.sparse import mezo, overlay, sensitive
from turnout.train.zeroth.surrogate import Features, Surrogate, features, surrogate

__all__ = [
    "FZooS",
    "Features",
    "Federation",
    "OneByte",
    "Sent",
    "Surrogate",
    "features",
    "fedzo",
    "fzoos",
    "gather_bytes",
    "mezo",
    "overlay",
    "perturbed",
    "sensitive",
    "surrogate",
]
