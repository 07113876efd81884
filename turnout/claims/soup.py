"""Claim: models trained on shards of the data, averaged, beat each of them; and a shard goes by averaging again."""

import copy
import statistics

import numpy as np
import torch
from torch import Tensor, nn

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.trial import SEQ, small, text
from turnout.measure import bits_per_byte
from turnout.models import LM, token_loss
from turnout.reshape.many_to_one.soup import Soup
from turnout.train.data import windows

_START_STEPS, _STEPS, _BATCH, _ROW = 200, 80, 8, 64


def soup() -> Claim:
    """A soup of one language model a domain needs fewer bits for all domains than those models do on average.

    Without one domain's model, the soup needs more bits for that domain. The paper's main result is a soup below one
    model that was trained on all domains, for all their steps.

    >>> soup().off
    'the models of the shards, one at a time'

    Source: Biggs et al., 2024, "Diffusion Soup: Model Merging for Text-to-Image Diffusion Models".
    """
    bits, union = "held-out bits per byte, mean of the domains", "one model trained on all domains for all steps"
    return Claim(
        name="soup",
        statement="The mean of models trained on one domain each beats them on all domains, and one model trained on "
        "all; removing one costs its domain.",
        source="Biggs et al., 2024, Diffusion Soup",
        off="the models of the shards, one at a time",
        switched={"soup": "single"},
        rows=(
            Row(bits, "below", "soup", "single", "the single models' mean"),
            Row(bits, "below", "soup", "best", "the best single model"),
            Row(bits, "below", "soup", "start", "the start that all were tuned from"),
            Row("bits per byte of a domain", "below", "soup", "removed", "its shard removed"),
            Row(bits, "below", "soup", "union", union, headline=True),
        ),
        measure=_measure,
        seconds=8,
        note=f"language models: 2 layers, width 64; {_START_STEPS} steps on all domains, then {_STEPS} on each, of "
        f"{_BATCH * _ROW:,} tokens; equal counts",
    )


def _measure(seed: int) -> Values:
    start, union, shards = _trained(seed)
    pot = Soup.start(next(iter(shards.values())))
    for name, model in shards.items():
        pot = pot.add(name, model)
    alone = [_mean(model) for model in shards.values()]
    without = {name: _bits(pot.remove(name, model).model()[0]) for name, model in shards.items()}
    return {
        "soup": _mean(pot.model()[0]),
        "single": statistics.fmean(alone),
        "best": min(alone),
        "start": _mean(start),
        "union": _mean(union),
        "removed": statistics.fmean(without[name][name] for name in shards),
    }


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


def _mean(lm: nn.Module) -> float:
    return statistics.fmean(_bits(lm).values())
