"""Claim: a gate whose falling temperature makes many experts few learns more than one that switches at once."""

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.trial import small, trial
from turnout.models.lm import MoEConfig

_STEPS, _HIDDEN, _EXPERTS = 160, 96, 8
# Name -> options of the annealed gate; None for Switch.
_ARMS: dict[str, dict[str, object] | None] = {
    "noise": {"noise": 1.0},
    "annealed": {"noise": 0.0},
    "constant": {"noise": 0.0, "start": 2.0, "end": 2.0},
    "switch": None,
}


def dense_to_sparse() -> Claim:
    """Annealed over the first half of the steps, a gate against one of constant temperature, and against one expert.

    The gate of constant temperature takes all experts in the first half of the steps and one in the second, without
    anything between; Switch takes one from the start.

    >>> dense_to_sparse().off
    'a constant temperature, then one expert at once'

    Source: Nie et al., 2021, "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate";
    the control of the headline is Fedus et al., 2021, "Switch Transformers".
    """
    bits, switch = "held-out bits per byte", "Switch, one expert from the start"
    return Claim(
        name="dense_to_sparse",
        statement="A gate annealed from all experts to one ends with fewer bits per byte than one that changes "
        "from all to one at once, and than a gate of one expert.",
        source="Nie et al., 2021, EvoMoE",
        off="a constant temperature, then one expert at once",
        switched={"annealed": "constant", "noise": "constant"},
        rows=(
            Row(f"{bits}, no noise", "below", "annealed", "constant", "temperature constant, one expert from half on"),
            Row(f"{bits}, no noise", "below", "annealed", "switch", switch, headline=True),
            Row(f"{bits}, with Gumbel noise", "below", "noise", "switch", switch, headline=True),
            Row(f"{bits}, with Gumbel noise", "below", "noise", "annealed", "without noise", headline=True),
        ),
        measure=_measure,
        seconds=28,
        note=f"2 layers, width 64, {_EXPERTS} experts of {_HIDDEN}, {_STEPS} steps of 1,024 tokens, one expert a token "
        f"in the last {_STEPS // 2} and when measured; before that up to all, which costs more FLOPs than Switch",
    )


def _measure(seed: int) -> Values:
    found = {}
    for name, options in _ARMS.items():
        gate = {} if options is None else {"steps": _STEPS // 2, **options}
        moe = MoEConfig(_EXPERTS, 1, _HIDDEN, router="DenseToSparse" if gate else "Switch", router_options=gate)
        found[name] = trial(small(moe, hidden=_HIDDEN), seed=seed, steps=_STEPS, z_weight=0.0).bits_per_byte
    return found
