"""Claim: a pyramid of experts beside a fixed MLP needs fewer of them, and its student a teacher that leaves early."""

import dataclasses

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.trial import small, trial
from turnout.models import LM, LMConfig, MoEConfig

_STEPS, _WIDTH, _HIDDEN, _LAYERS = 100, 32, 32, 4
_COUNTS = (4, 4, 8, 8)
_TRAIN = {"lr": 5e-3, "min_lr": 5e-4, "aux_weight": 0.04, "z_weight": 0.001, "eval_tokens": 16_384}
_KD = 1.0


def pr_moe() -> Claim:
    """A pyramid-residual mixture against its even twin, against one expert of twice the size, and as a teacher.

    All have 4 layers of width 32 and see the same batches. "Even" has 8 experts everywhere, of which a token takes two;
    the pyramid has half as many in its first two layers, and each token takes one beside a fixed MLP of the same size:
    as many products. "Wide" is the pyramid without the fixed MLP, whose experts are twice the size instead: as many
    products again, and 1.7 times the weights. (One expert of that size alone has half of the products, and is no
    control.) The student has a layer less, and is taught for none, 0.7 or all of its steps.

    >>> pr_moe().off
    'experts of twice the size, no fixed MLP; no teacher'

    Source: Rajbhandari et al., 2022, "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power
    Next-Generation AI Scale", figures 2 to 4 and tables 4 and 5.
    """
    bits = "held-out bits per byte"
    why = "about half a percent of its bits"
    return Claim(
        name="pr_moe",
        statement="One expert beside a fixed MLP does as well as two experts, or one of twice the size, with fewer "
        "weights and fewer experts in early layers; a "
        "student with a layer less learns more from a teacher, which leaves before the end.",
        source="Rajbhandari et al., 2022, DeepSpeed-MoE (PR-MoE and Mixture-of-Students)",
        off="experts of twice the size, no fixed MLP; no teacher",
        switched={"pyramid": "wide", "staged": "untaught"},
        rows=(
            Row(bits, "no_worse", "pyramid", "wide", "one expert of twice the size, no fixed MLP", margin=0.02,
                why=why),
            Row(f"{bits}, student", "below", "staged", "untaught", "the same student, no teacher"),
            Row(bits, "no_worse", "pyramid", "even", "8 experts everywhere, 2 a token", margin=0.02, why=why,
                headline=True),
            Row(bits, "below", "pyramid", "inverted", "more experts in the first layers", headline=True),
            Row(f"{bits}, student", "below", "staged", "to the end", "a teacher to the end", headline=True),
        ),
        measure=_measure,
        seconds=25,
        note=f"{_LAYERS} layers, width {_WIDTH}, {_STEPS} steps of 1,024 tokens, measured on 16,384; experts of "
        f"{_COUNTS} and 8 a layer",
    )  # fmt: skip


def _measure(seed: int) -> Values:
    teacher = LM(_sizes(_COUNTS), seed=seed)
    found = {"pyramid": _trained(teacher, seed)}
    for name, config in (
        ("inverted", _sizes(_COUNTS[::-1])),
        ("wide", _sizes(_COUNTS, hidden=2 * _HIDDEN, fixed=False)),
        ("even", _sizes(None, top_k=2, fixed=False)),
    ):
        found[name] = _trained(config, seed)
    teacher.eval()
    for name, share in (("untaught", 0.0), ("staged", 0.7), ("to the end", 1.0)):
        taught = {"kd_weight": _KD, "kd_share": share} if share else {}
        found[name] = _trained(_sizes(_COUNTS[1:]), seed + 1000, teacher if share else None, **taught)
    return found


def _sizes(counts: tuple[int, ...] | None, *, top_k: int = 1, hidden: int = _HIDDEN, fixed: bool = True) -> LMConfig:
    options: dict[str, object] = {"renormalize": top_k > 1}
    moe = MoEConfig(8, top_k, hidden, router_options=options, shared_hidden=_HIDDEN if fixed else None)
    moe = dataclasses.replace(moe, per_layer=counts)
    layers = _LAYERS if counts is None else len(counts)
    return dataclasses.replace(small(None, hidden=_HIDDEN, width=_WIDTH), layers=layers, moe=moe)


def _trained(model: LMConfig | LM, seed: int, teacher: LM | None = None, **how: float) -> float:
    return trial(model, seed=seed, steps=_STEPS, teacher=teacher, **(_TRAIN | how)).bits_per_byte
