"""ExpertFlow: paths predicted before the pass, corrected within it, and requests regrouped by them."""

import numpy as np

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.serve.own_rate import own_rate
from turnout.claims.serve.planted_paths import planted_paths
from turnout.decide.device import regroup
from turnout.decide.device.cache import LRU, ExpertFlow, learn_routes
from turnout.measure.cache import replay
from turnout.types import Accesses, CacheShape

__all__ = ["expert_flow"]

_SLOTS, _BATCH = 10, 4
_SPARING = 2  # of 32 experts, where a token takes one: 93.75 % of their memory is saved, the paper's utmost


def _measure(seed: int) -> Values:
    known, told = planted_paths(seed, 2 * seed), planted_paths(seed, 2 * seed + 1, texts=12)
    sizes, predictor = CacheShape(told.layers, told.experts, _SLOTS), learn_routes(known, seed=seed)
    flow = ExpertFlow(predictor)
    arms = {"flow": flow, "uncorrected": ExpertFlow(predictor, correct=False), "lru": LRU()}
    arms["own rate"] = own_rate(predictor)
    values = {}
    for name, policy in arms.items():
        found = replay(told, policy, sizes)
        values[f"{name} waits"] = 1 - found.hit_rate
        values[f"{name} time"] = found.timing(fetch_s=1.0, compute_s=1.0).seconds
    values = {name: value / (values["lru time"] if name.endswith("time") else 1) for name, value in values.items()}
    return values | _awake(told, flow) | {"sparing time": _sparing(seed)}


def _sparing(seed: int) -> float:
    """The time of decoding over LRU's where tokens take one expert, and a sixteenth of them is held."""
    known, told = (planted_paths(seed, 2 * seed + n, texts=texts, uses=1) for n, texts in ((0, 24), (1, 12)))
    sizes, seconds = CacheShape(told.layers, told.experts, _SPARING), []
    for policy in (ExpertFlow.learn(known, seed=seed), LRU()):
        seconds.append(replay(told, policy, sizes).timing(fetch_s=1.0, compute_s=1.0).seconds)
    return seconds[0] / seconds[1]


def _awake(told: Accesses, flow: ExpertFlow) -> dict[str, float]:
    """Experts of all layers that a batch of texts wakes in a pass, over all there are."""
    used_SLE, text_S = told.used(), told.sequence_S()
    used_NSLE = np.stack([used_SLE[text_S == text] for text in np.unique(text_S)])
    order = np.random.default_rng(0).permutation(len(used_NSLE))  # texts of a topic do not arrive together
    used_NSLE = used_NSLE[order]
    count = {"arrival": [], "regrouped": []}  # type: dict[str, list[float]]
    for step in range(8, used_NSLE.shape[1], 8):
        rate_NP = used_NSLE[:, :step].mean(1).reshape(len(used_NSLE), -1)
        before_NP = used_NSLE[:, step - 1].reshape(len(used_NSLE), -1)
        path_NLE = np.stack([flow.predictor.paths(b, r) for b, r in zip(before_NP, rate_NP, strict=True)])
        arrival = [tuple(range(n, n + _BATCH)) for n in range(0, len(path_NLE), _BATCH)]
        for name, batches in (("arrival", arrival), ("regrouped", regroup(path_NLE, size=_BATCH))):
            count[name] += [float(used_NSLE[list(batch), step].any(0).mean()) for batch in batches]
    return {name: float(np.mean(each)) for name, each in count.items()}


def expert_flow() -> Claim:
    """Predictor, correction and regrouping, each against itself switched off.

    >>> expert_flow().off
    "a text's own rates, no predictor, no correction, requests as they arrive"

    Source: He et al., 2024, "ExpertFlow: Optimized Expert Activation and Token Allocation for Efficient
    Mixture-of-Experts Inference".
    """
    waits = "experts waited for, of those asked for"
    return Claim(
        name="expert_flow",
        statement="Whole paths predicted, and corrected within the pass, wait for fewer experts than the same cache by "
        "a text's own rates, and than LRU; and batches of requests with like paths wake fewer experts.",
        source='He et al., 2024, "ExpertFlow: Optimized Expert Activation and Token Allocation"',
        off="a text's own rates, no predictor, no correction, requests as they arrive",
        switched={"flow waits": "own rate waits", "regrouped": "arrival"},
        rows=(
            Row(waits, "below", "flow waits", "own rate waits", "a text's own rates, nothing predicted or corrected"),
            Row(waits, "below", "flow waits", "uncorrected waits", "no correction"),
            Row("experts awake in a batch, of all", "below", "regrouped", "arrival", "as they arrive"),
            Row(waits, "below", "flow waits", "lru waits", "LRU", headline=True),
            Row(f"{waits}, the predictor alone", "below", "uncorrected waits", "own rate waits", "a text's own rates",
                headline=True),
            Row("time of decoding over LRU's", "within", "flow time", "lru time", "LRU; the paper has 1/2 to 1/10 of "
                "its baselines'", bound=0.5, headline=True),
            Row("the same in a sixteenth of the memory", "within", "sparing time", "lru time", "LRU; the paper saves "
                "up to 93.72 % of memory", bound=0.5, headline=True),
        ),
        measure=_measure,
        seconds=20,
        note="planted texts, 6 layers of 32 experts, 3 taken, 10 slots a layer; an expert comes in the time of a "
        "layer's pass; LRU waits for {lru waits:.3f}, by a text's own rates {own rate waits:.3f}, with the "
        "predictor {uncorrected waits:.3f}, corrected {flow waits:.3f}; time {flow time:.2f} of LRU's, "
        "{sparing time:.2f} with two slots of 32 where one expert is taken; "
        "{regrouped:.3f} of experts awake, {arrival:.3f} ungrouped",
        simulated=True,
    )  # fmt: skip
