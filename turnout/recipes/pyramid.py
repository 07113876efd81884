"""The pyramid-residual mixture of DeepSpeed-MoE, and its distilled student: minutes on two CPU cores."""

import dataclasses

from turnout.recipes.run import Run
from turnout.recipes.tiny import tiny

_COUNTS, _HIDDEN = (4, 4, 8, 8), 128


def pyramid() -> Run:
    """A pyramid-residual mixture: a fixed MLP and one expert for each token, 4 experts in early layers, 8 in later.

    A token meets as many feed-forward parameters as in ``tiny``, whose layers all have 8 experts of which it takes 2;
    in all there are fewer.

    >>> pyramid().model.moe.per_layer
    (4, 4, 8, 8)

    Source: Rajbhandari et al., 2022, "DeepSpeed-MoE": PR-MoE, which doubles the experts of the last layers. The fixed
    MLP is the shared expert here; the authors' code also learns how to weigh the two, which the paper does not say.
    """
    run = tiny()
    assert run.model.moe is not None
    moe = dataclasses.replace(run.model.moe, top_k=1, shared_hidden=_HIDDEN, per_layer=_COUNTS)
    return dataclasses.replace(run, recipe="pyramid", model=dataclasses.replace(run.model, moe=moe))


def pyramid_student() -> Run:
    """The student of ``pyramid``: a layer less, taught by it for the first 0.7 of the steps (--teacher MODEL).

    >>> pyramid_student().model.layers, pyramid_student().train.kd_weight
    (3, 1.0)

    Source: Rajbhandari et al., 2022, "DeepSpeed-MoE": Mixture-of-Students, staged distillation and less depth.
    """
    run = pyramid()
    assert run.model.moe is not None
    moe = dataclasses.replace(run.model.moe, per_layer=_COUNTS[1:])
    model = dataclasses.replace(run.model, layers=len(_COUNTS) - 1, moe=moe)
    train = dataclasses.replace(run.train, kd_weight=1.0)
    return dataclasses.replace(run, recipe="pyramid_student", model=model, train=train)
