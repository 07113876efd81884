"""How long an expert takes to come on this machine, and a layer to compute: measured with the model itself."""

import dataclasses
import random
import statistics
import time
from pathlib import Path

import torch

from turnout.errors import UsageError, word
from turnout.models import LM
from turnout.models.checkpoint import load_offloaded
from turnout.models.checkpoint.own import read_json
from turnout.models.decoding import Decoder
from turnout.recipes.certify import model_folder

__all__ = ["ExpertTimes", "expert_times"]

_WHERE = "turnout cache"
_FETCHES, _STEPS, _PROMPT = 64, 24, 8


@dataclasses.dataclass(frozen=True)
class ExpertTimes:
    """What was measured.

    Args:
        fetch_s: until one expert has come from the model's files, which the system has in its memory by then.
        compute_s: of a step through one layer with experts, all of them there; with what lies between such layers.
        expert_bytes: of one.
        layers: of the model that have experts.
        experts: the most that one of them has.

    >>> ExpertTimes(1e-3, 2e-3, 1024, layers=2, experts=8).fetch_s
    0.001

    Source: none; plain bookkeeping.
    """

    fetch_s: float
    compute_s: float
    expert_bytes: int
    layers: int
    experts: int


@torch.no_grad()
def expert_times(model: str | Path, *, streams: int = 1, seed: int = 0) -> ExpertTimes:
    """Reads experts of a model's files one by one, and decodes some tokens with at most half of them in memory.

    Args:
        model: a run, or a model's folder.
        streams: how many texts go on side by side.
        seed: of which experts and which tokens.

    Raises:
        TurnoutError: no model is there, one without experts, or one whose tokens take them all.

    Source: none; medians of the clock.
    """
    folder = model_folder(model, where=_WHERE)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    heads = read_json(folder / "config.json", _WHERE)
    # All of the folder's bytes over its layers are at least an expert's: half of them hold enough for any token.
    layers = heads.get("num_hidden_layers") or heads.get("layers") or 1
    lm = load_offloaded(folder, expert_memory=max(size // 2, size // max(1, int(layers))), threads=0)
    assert lm.experts is not None
    shape, made = lm.experts.shape, lm.experts.stats()
    if made.slots == made.experts:  # most of the files is something else: half of the experts by their own size
        lm.experts.close()
        lm = load_offloaded(folder, expert_memory=_half(lm, folder), threads=0)
        assert lm.experts is not None
    try:
        fetch_s = _fetch(lm, random.Random(seed))
        compute_s = _compute(lm, streams, torch.Generator().manual_seed(seed))
        return ExpertTimes(fetch_s, compute_s, made.expert_bytes, shape.layers, shape.experts)
    finally:
        lm.experts.close()


def _half(lm: LM, folder: Path) -> int:
    """Bytes of half of the experts of each layer, of as many as a token takes at least."""
    assert lm.experts is not None and lm.config.moe is not None
    shape, fix = lm.experts.shape, "pass --fetch-ms and --compute-ms, and --expert-bytes with --memory"
    slots = max(lm.config.moe.top_k, shape.experts // 2)
    if slots == shape.experts:
        got = f"{folder}, whose tokens take all {slots} experts of a layer"
        raise UsageError(word("--model", got=got, allowed="leave some experts out", where=_WHERE, fix=fix))
    return shape.layers * slots * lm.experts.stats().expert_bytes


def _fetch(lm: LM, draw: random.Random) -> float:
    """Seconds of the median expert that was not there, after one round that brings the files into memory."""
    cache = lm.experts
    assert cache is not None
    # All experts of layers whose slots do not hold them, or of all layers where they share the slots: what came first
    # has gone when its turn comes again.
    layers = [n for n, count in enumerate(cache.num_experts_L) if cache.shape.shared or count > cache.shape.slots]
    if not cache.shape.shared:
        layers = draw.sample(layers, min(len(layers), max(1, _FETCHES // cache.shape.experts)))
    some = [(layer, expert) for layer in layers for expert in range(cache.num_experts_L[layer])]
    spent: list[float] = []
    for number in range(4):
        for layer, expert in some:
            missed = cache.stats().misses
            with cache.turn():
                began_s = time.perf_counter()
                cache.take(layer, [expert])
                took_s = time.perf_counter() - began_s
            if number and cache.stats().misses > missed:
                spent.append(took_s)
    return statistics.median(spent)


def _compute(lm: LM, streams: int, generator: torch.Generator) -> float:
    """Seconds of a step without those spent waiting, over the layers with experts."""
    assert lm.experts is not None
    vocabulary, room = lm.config.vocab_size, min(lm.config.max_seq, _PROMPT + _STEPS)
    prompt = min(_PROMPT, max(1, room // 2))
    id_RS = torch.randint(vocabulary, (streams, room), generator=generator)
    decoder = Decoder(lm, streams, room)
    decoder.prefill(id_RS[:, :prompt])
    spent: list[float] = []
    for id_R in id_RS[:, prompt:].T:
        waited_s, began_s = lm.experts.stats().waits_s, time.perf_counter()
        decoder.step(id_R.contiguous())
        spent.append(time.perf_counter() - began_s - (lm.experts.stats().waits_s - waited_s))
    return max(1e-9, statistics.median(spent)) / lm.experts.shape.layers
