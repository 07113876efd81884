"""Claim: models trained on shards of the data, averaged, beat each of them; and a shard goes by averaging again."""

import copy
import statistics
import time

import numpy as np
import torch
from torch import Tensor, nn

from turnout.claims.claim import Claim, Evidence
from turnout.claims.trial import SEEDS, SEQ, Note, small, text
from turnout.measure import bits_per_byte
from turnout.models import LM, token_loss
from turnout.reshape.soup import Soup
from turnout.train.data import windows

_START_STEPS, _STEPS, _BATCH, _ROW = 200, 80, 8, 64


def soup(*, note: Note = None) -> Claim:
    """A soup of one language model a domain needs fewer bits for all domains than those models do on average.

    Without one domain's model, the soup needs more bits for that domain, and not more for the others.

    >>> soup.__name__  # the run itself takes a minute: turnout verify soup
    'soup'

    Source: Biggs et al., 2024, "Diffusion Soup: Model Merging for Text-to-Image Diffusion Models".
    """
    began = time.perf_counter()
    rows: dict[str, list[float]] = {
        name: [] for name in ("soup", "single", "best", "start", "union", "gone", "rest", "rest with")
    }
    for seed in SEEDS:
        start, union, shards = _trained(seed)
        pot = Soup.start(next(iter(shards.values())))
        for name, model in shards.items():
            pot = pot.add(name, model)
        whole = _bits(pot.model()[0])
        alone = [statistics.fmean(_bits(model).values()) for model in shards.values()]
        without = {name: _bits(pot.remove(name, model).model()[0]) for name, model in shards.items()}
        rows["soup"].append(statistics.fmean(whole.values()))
        rows["single"].append(statistics.fmean(alone))
        rows["best"].append(min(alone))
        rows["start"].append(statistics.fmean(_bits(start).values()))
        rows["union"].append(statistics.fmean(_bits(union).values()))
        rows["gone"].append(statistics.fmean(without[name][name] for name in shards))
        rows["rest"].append(_others(without))
        rows["rest with"].append(_others(dict.fromkeys(shards, whole)))
        if note:
            note(f"seed {seed}: " + ", ".join(f"{values[-1]:.4f} {name}" for name, values in rows.items()))
    found = {name: tuple(values) for name, values in rows.items()}
    metric = "held-out bits per byte, mean of the domains"
    return Claim(
        name="soup",
        statement="The mean of models trained on one domain each beats them on all domains; removing one costs its "
        "domain alone.",
        source="Biggs et al., 2024, Diffusion Soup",
        evidence=(
            Evidence(metric, "below", found["soup"], found["single"], "the single models' mean"),
            Evidence(metric, "below", found["soup"], found["best"], "the best single model"),
            Evidence(metric, "below", found["soup"], found["start"], "the start that all were tuned from"),
            Evidence("bits per byte of a domain", "below", found["soup"], found["gone"], "its shard removed"),
            Evidence("other domains, a shard removed", "not_above", found["rest"], found["rest with"], "not removed"),
        ),
        seconds=time.perf_counter() - began,
        note=f"language models: 2 layers, width 64; {_START_STEPS} steps on all domains, then {_STEPS} on each, of "
        f"{_BATCH * _ROW:,} tokens; equal counts. The paper's soup also beats one model trained on all shards, for all "
        f"their steps: here that one has {statistics.fmean(found['union']):.3f} bits per byte",
    )


def _others(bits: dict[str, dict[str, float]]) -> float:
    """The mean over shards of the mean over the domains that are not theirs."""
    return statistics.fmean(value for gone, each in bits.items() for name, value in each.items() if name != gone)


def _trained(seed: int) -> tuple[LM, LM, dict[str, LM]]:
    """A start that saw a little of each domain, and tuned from it: one model on all of them, and one on each."""
    start = LM(small(None, hidden=192), seed=seed)
    names = text().domains
    rows = [_rows(domain) for domain in range(len(names))]
    _tune(start, rows, _START_STEPS, 3e-3, torch.Generator().manual_seed(seed))
    shards = {name: copy.deepcopy(start) for name in names}
    for domain, model in enumerate(shards.values()):
        _tune(model, [rows[domain]], _STEPS, 1e-3, torch.Generator().manual_seed(seed + 1))
    union = copy.deepcopy(start)
    _tune(union, rows, _STEPS * len(names), 1e-3, torch.Generator().manual_seed(seed + 1))
    return start, union, shards


def _rows(domain: int) -> Tensor:
    """(N, S + 1) the training text of one domain, cut into rows."""
    split = text().train
    inside = np.repeat(split.domain_N == domain, np.diff(split.document_N))
    token_T = torch.from_numpy(split.token_T[inside].astype("int64"))
    return token_T[: len(token_T) // (_ROW + 1) * (_ROW + 1)].view(-1, _ROW + 1)


def _tune(lm: LM, rows: list[Tensor], steps: int, rate: float, generator: torch.Generator) -> None:
    """AdamW, the rate warmed up and brought down to zero; rows of all the domains given, at even chance."""
    lm.train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / (steps / 10)) * (1 - step / steps)
        which = torch.randint(len(rows), (_BATCH,), generator=generator).tolist()
        picked = [rows[w][torch.randint(len(rows[w]), (), generator=generator)] for w in which]
        id_BS = torch.stack(picked)
        loss = token_loss(lm(id_BS[:, :-1]).logits_BSV, id_BS[:, 1:]) / id_BS[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
    lm.eval()


def _bits(lm: nn.Module) -> dict[str, float]:
    """Domain -> held-out bits per byte."""
    tokens = text()
    held_out = windows(tokens.held_out, batch=8, seq=SEQ, limit=8192)
    found = bits_per_byte(lm, held_out, torch.from_numpy(tokens.byte_length_V), domains=tokens.domains)
    return dict(found.by_domain)
