"""A comparison of routers: each on the same seeds, in a process of its own, and which differences are real."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from turnout.decide import token
from turnout.errors import Interrupted, UsageError, nearest, word
from turnout.measure import hardware, read_run
from turnout.measure.differences import paired_differences
from turnout.measure.specialisation import layer_affinity, routing_kept, specialisation
from turnout.models import LM, MoEConfig, checkpoint
from turnout.recipes.execute import execute, tokens_for
from turnout.recipes.run import Run
from turnout.storage import write_whole
from turnout.train.data import TokenSet
from turnout.train.state import find, places, read
from turnout.types import Report, Routing

__all__ = ["DEFAULT_ARMS", "Arm", "arm_of", "study"]

_WHERE = "turnout compare"
_DONE = "measured.json"
_DENSE = "dense"  # among overrides: no experts
# Of each token one expert alone: twice as wide, so that as many products are made.
_SINGLE = ("Switch", "BASE", "StableMoE", "VQ")
# Routers that keep the load even by themselves, or want it as it comes.
_EVEN = (
    *("BASE", "ExpertChoice", "GroupLimited", "Hash", "LossFree", "MoEPlusPlus", "PatchChoice", "ReMoE", "Sinkhorn"),
    *("SparseTransport", "StableMoE", "VQ"),
)
_OPTIONS: Mapping[str, Sequence[str]] = {
    "MoEPlusPlus": ('zero_computation={"constant": 2, "copy": 1, "zero": 1}',),
    "TopP": ('router_options={"rate": 0.003}',),
}
DEFAULT_ARMS = (
    *("dense", "TopK", "Switch", "GShard", "NoisyTopK", "Hash", "BASE", "LossFree", "GroupLimited", "HyperRouter"),
    *(
        "MoEPlusPlus",
        "Prototyping",
        "ReMoE",
        "RMoE",
        "SAM",
        "Sinkhorn",
        "StableMoE",
        "TopP",
        "VQ",
        "XMoE",
        "ExpertChoice",
    ),
)
_QUANTITIES = (
    *("bits_per_byte", "experts_per_token", "max_vio", "dropped", "tokens_per_s", "peak_memory_bytes"),
    *("specialisation", "affinity", "kept", "flops", "params", "params_active"),
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train the recipe.

    Args:
        name: in the table, and of its folders.
        overrides: what of the recipe's fields is other than said, as texts ``field=value``; "dense" for no experts.

    >>> Arm("wide", ("top_k=4",)).name
    'wide'

    Source: none; plain bookkeeping.
    """

    name: str
    overrides: tuple[str, ...]


def arm_of(text: str, base: Run) -> Arm:
    """The arm of a router's name, of "dense", or of ``NAME:field=value;field=value``, which says all of it.

    A router by its name has as many active FLOPs as the recipe: one expert of twice the width where it takes one of
    two. Where it keeps the load even by itself there is no balance loss.

    Args:
        text: of the command line.
        base: the recipe, whose experts it has.

    Raises:
        UnknownNameError: there is no such router; the nearest is offered.
        UsageError: a router that feed-forward layers do not take, or an empty name.

    Source: Fedus et al., 2021, "Switch Transformers", for the comparison at equal active FLOPs.
    """
    name, colon, more = text.partition(":")
    if colon:
        if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."):
            fix = "write such as wide:top_k=4;moe.hidden=64"
            raise UsageError(word("ARM", got=repr(text), allowed="begin with a plain name", where=_WHERE, fix=fix))
        return Arm(name, tuple(part.strip() for part in more.split(";") if part.strip()))
    moe = _experts(base)
    if name == "dense":
        return Arm(name, (_DENSE, f"model.hidden={moe.top_k * moe.hidden + -(-moe.num_experts // 3)}"))
    if name not in token.__all__:
        raise nearest(name, ["dense", *token.__all__], kind="arm", where=_WHERE)
    found = [f"router={name}"]
    if name in _SINGLE and moe.top_k > 1:
        found += ["top_k=1", f"moe.hidden={moe.top_k * moe.hidden}"]
    found += _OPTIONS.get(name, ())
    found += ["aux_weight=0"] if name in _EVEN else []
    return Arm(name, tuple(found))


def study(
    base: Run,
    arms: Sequence[Arm],
    out: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    against: str | None = None,
    jobs: int = 1,
    note: Callable[[str], None] | None = None,
) -> Report:
    """Trains every arm on every seed, measures each, and compares.

    Each run is one process with one thread, in ``out/runs/ARM-SEED``, and is skipped where it is finished; one that was
    interrupted goes on. All read the same text.

    Args:
        base: the recipe; its seed is not used.
        arms: two or more, of different names.
        out: a folder, which may hold some of the runs.
        seeds: one run each; a spread needs two.
        against: the arm that others are compared with; the first one unless said.
        jobs: processes at once.
        note: told a line for each run that ends.

    Returns:
        ``rows``, one for each arm, with ``mean`` and ``spread`` of each quantity; ``differences`` of bits per byte with
        interval and p-value; ``against``, ``seeds``.

    Raises:
        UsageError: no experts in the recipe, arms of one name, fewer than two arms or seeds, or another comparison in
            the folder.
        Interrupted: Ctrl-C; the same call goes on.

    Source: Fedus et al., 2021, "Switch Transformers", for the comparison at equal active FLOPs.
    """
    against = _checked(base, arms, seeds, against)
    out = Path(out)
    runs = {(arm.name, seed): _run_of(base, arm, seed) for arm in arms for seed in seeds}
    tokens_folder = out / "tokens"
    tokens_for(base, tokens_folder, quiet=note is None)
    for (name, seed), run in runs.items():
        _refuse_another(out / "runs" / f"{name}-{seed}", run)
    left = [key for key in runs if not (_folder(out, *key) / _DONE).exists()]
    _run_all({key: runs[key] for key in left}, out, jobs, note)
    return _report(base, arms, out, seeds, against)


def _checked(base: Run, arms: Sequence[Arm], seeds: Sequence[int], against: str | None) -> str:
    names = [arm.name for arm in arms]
    _experts(base)
    if len(set(names)) != len(names) or len(names) < 2:
        got, fix = ", ".join(names) or "none", "name two or more, each once; wide:top_k=4 gives one another name"
        raise UsageError(word("ARM", got=got, allowed="be two or more different ones", where=_WHERE, fix=fix))
    if len(set(seeds)) != len(seeds) or len(seeds) < 2 or min(seeds) < 0:
        got, fix = ", ".join(map(str, seeds)), "pass --seeds 0,1,2"
        raise UsageError(word("--seeds", got=got, allowed="be two or more different ones", where=_WHERE, fix=fix))
    against = names[0] if against is None else against
    if against not in names:
        raise nearest(against, names, kind="arm", where=f"{_WHERE} --against")
    return against


def _experts(base: Run) -> MoEConfig:
    if base.model.moe is None:
        got, fix = base.recipe, "name a recipe with experts: tiny"
        raise UsageError(word("--recipe", got=got, allowed="have experts", where=_WHERE, fix=fix))
    return base.model.moe


def _run_of(base: Run, arm: Arm, seed: int) -> Run:
    steps = base.train.steps
    # The checkpoint before the last one, at three quarters, says what routing still moves after it.
    more = [f"seed={seed}", f"checkpoint_every={max(1, -(-3 * steps // 4))}", "keep_checkpoints=2"]
    if _DENSE in arm.overrides:
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, moe=None))
    return base.override([*(one for one in arm.overrides if one != _DENSE), *more])


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"{name}-{seed}"


def _refuse_another(folder: Path, run: Run) -> None:
    if (folder / "run.json").exists() and Run.open(folder).to_json_dict() != run.to_json_dict():
        got, fix = f"{folder}, which holds another run", "choose another --out, or remove that folder"
        raise UsageError(word("--out", got=got, allowed="hold runs of this comparison", where=_WHERE, fix=fix))


def _run_all(runs: Mapping[tuple[str, int], Run], out: Path, jobs: int, note: Callable[[str], None] | None) -> None:
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_alone, run, _folder(out, *key), out / "tokens"): key for key, run in runs.items()}
        try:
            for number, done in enumerate(concurrent.futures.as_completed(waiting), 1):
                bits = done.result()
                if note is not None:
                    name, seed = waiting[done]
                    left = (time.monotonic() - began) / number * (len(waiting) - number) / 60
                    told = f"{name}, seed {seed}: {bits:.4f} bits per byte"
                    note(f"{told} ({number}/{len(waiting)}, about {left:.0f} min left)")
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted. The same command goes on with what is in {out}.") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _alone(run: Run, folder: Path, tokens_folder: Path) -> float:
    """One run in a process of its own, so that its memory and its threads are its own."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_one, run, folder, tokens_folder).result()


def _one(run: Run, folder: Path, tokens_folder: Path) -> float:
    """One run from beginning to end, and what is measured of it."""
    torch.set_num_threads(1)
    started = (folder / "checkpoints").exists()
    execute(run, folder, resume="latest" if started else None, tokens_folder=tokens_folder, quiet=True)
    found = read_run(folder)
    values = _measured(run, folder, TokenSet.open(tokens_folder, verify=False))
    result = dict(found.result)
    values |= {name: result.get(name) for name in ("bits_per_byte", "max_vio", "dropped", "peak_memory_bytes")}
    values["tokens_per_s"], values["flops"] = found.tokens_per_s, found.cost.flops
    values["params"], values["params_active"] = found.cost.params, found.cost.params_active
    if found.num_experts and len(found.load_by_domain) > 1:
        values["specialisation"] = specialisation(found.load_by_domain)
    write_whole(folder / _DONE, json.dumps(values, indent=1) + "\n")
    return float(result["bits_per_byte"])


def _measured(run: Run, folder: Path, tokens: TokenSet) -> dict[str, Any]:
    """What the routings of 4,096 held-out tokens say, now and three quarters of the way."""
    if run.model.moe is None:
        return {}
    count = min(4096 // run.train.seq, (len(tokens.held_out.token_T) - 1) // run.train.seq)
    id_BS = torch.from_numpy(tokens.held_out.token_T[: count * run.train.seq].astype("int64")).view(count, -1)
    now = _routed(checkpoint.load(folder / "model"), id_BS)
    entries = statistics.fmean(one.num_entries / one.num_tokens for one in now)
    values: dict[str, Any] = {"experts_per_token": entries}
    if len(now) > 1:
        values["affinity"] = layer_affinity(now)
    steps = find(folder / "checkpoints")
    if len(steps) > 1:
        before = LM(run.model, seed=0)
        before.load_state_dict({name: read(place) for name, place in places(steps[-2], "model").items()})
        values["kept"] = routing_kept(_routed(before, id_BS), now)
    return values


@torch.no_grad()
def _routed(lm: LM, id_BS: torch.Tensor) -> list[Routing]:
    return [one.detach() for one in lm.eval()(id_BS).routings]


def _report(base: Run, arms: Sequence[Arm], out: Path, seeds: Sequence[int], against: str) -> Report:
    found = {
        arm.name: [json.loads((_folder(out, arm.name, seed) / _DONE).read_text(encoding="utf-8")) for seed in seeds]
        for arm in arms
    }
    bits = {name: [one["bits_per_byte"] for one in rows] for name, rows in found.items()}
    differences = [
        dataclasses.asdict(one) | {"is_real": one.is_real} for one in paired_differences(bits, against=against)
    ]
    values = {
        "recipe": base.recipe,
        "steps": base.train.steps,
        "tokens": base.train.steps * base.train.batch * base.train.seq * base.train.accumulate,
        "seeds": list(seeds),
        "against": against,
        "rows": [_row(arm, found[arm.name]) for arm in arms],
        "differences": differences,
        "hardware": hardware(),
    }
    return Report("compare", values, tuple(_notes(arms, differences)))


def _row(arm: Arm, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mean, spread = {}, {}
    for name in _QUANTITIES:
        seen = [float(one[name]) for one in rows if one.get(name) is not None]
        if len(seen) == len(rows):
            mean[name], spread[name] = statistics.fmean(seen), statistics.stdev(seen)
    return {"arm": arm.name, "overrides": list(arm.overrides), "mean": mean, "spread": spread}


def _notes(arms: Sequence[Arm], differences: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    seen = {arm.name: getattr(getattr(token, arm.name, None), "sees_later_tokens", False) for arm in arms}
    if leaks := [name for name, sees in seen.items() if sees is True]:
        yield f"{', '.join(leaks)}: later tokens have a say in evaluation too; no text can be made by these bits."
    if half := [name for name, sees in seen.items() if sees == "training"]:
        yield f"{', '.join(half)}: later tokens have a say in training alone."
    real = sum(bool(one["is_real"]) for one in differences)
    how = "Holm, 5 %; the noise is taken to be one for all"
    yield f"{real} of {len(differences)} differences in bits per byte are real ({how})."
