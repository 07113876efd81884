"""Every claim's mechanism is broken in one line of code, and what it gave is gone: its arm is like the off arm."""

import dataclasses
import importlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from broken import Case, family
from torch.nn import functional as F

from house import ROOT
from turnout import claims
from turnout.claims import taught, trial
from turnout.claims.claim import Result
from turnout.decide.token import DenseToSparse, Glider, LossFree, TopK
from turnout.decide.token import fedins as fedins_router
from turnout.decide.token.smear import SMEAR
from turnout.models.jets import Jets
from turnout.paths import LoRA
from turnout.reshape.adapters import routers
from turnout.reshape.many_to_one.soup import Soup
from turnout.run import sort
from turnout.types import Report, Routing


@pytest.fixture(scope="module", autouse=True)
def little_text():
    """Less of the text, and little of it to measure on; nobody else is to find it."""
    with pytest.MonkeyPatch.context() as small:
        small.setattr(trial, "BYTES", 300_000)
        small.setattr(trial, "HELD_OUT", 2048)
        small.setattr(taught, "SCORED", 2048)
        trial.text.cache_clear()
        yield
    trial.text.cache_clear()


def room(name: str, of: str = "claims"):
    """The module of that name in a room, on whichever floor."""
    places = sorted((ROOT / "turnout" / of.replace(".", "/")).rglob(f"{name}.py"))
    assert len(places) == 1, places
    return importlib.import_module(".".join(places[0].relative_to(ROOT).with_suffix("").parts))


def patched(name: str, what: str, make: Callable, of: str = "reshape") -> Callable[[pytest.MonkeyPatch], None]:
    """Puts ``make(what is there)`` in the place of a function."""

    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        module = room(name, of)
        monkeypatch.setattr(module, what, make(getattr(module, what)))

    return broken


def swapped(x_TD, routing, bank):
    order = list(range(bank.num_experts))
    order[:2] = order[:2][::-1]
    return sort(x_TD, routing, dataclasses.replace(bank, up_EDH=bank.up_EDH[order], down_EFD=bank.down_EFD[order]))


def uniform(self, x_TD, *, given, token_id_T=None, generator=None):
    weight_BE = torch.full((given.num_sequences, self.num_experts), 1 / self.num_experts)
    return dataclasses.replace(Routing.from_dense(weight_BE), logit_TE=weight_BE)


def other_layers(find):
    def others(*arguments, **options):
        values = dict(find(*arguments, **options).values)
        left = [layer for layer in values["by_layer"] if layer not in values["stragglers"]]
        return Report("stragglers", values | {"stragglers": left})

    return others


def only_the_last(monkeypatch):
    add = Soup.add
    monkeypatch.setattr(Soup, "add", lambda self, shard, model: add(Soup.start(model), shard, model))
    monkeypatch.setattr(Soup, "remove", lambda self, shard, model: self)


def no_parts(build):
    return lambda site: build(dataclasses.replace(site, options={**site.options, "parts": 1}))


def one_expert(width, experts, *, capacity_factor, generator):
    return TopK(width, experts, top_k=2, capacity_factor=1.0, generator=generator)


def random_directions(monkeypatch):
    monkeypatch.setattr(
        LoRA, "directions", lambda self: F.normalize(torch.randn(len(self.scale_N), self.down.shape[1]), dim=1)
    )


def random_rows(scores):
    return lambda lm, thin, text, by, seed: scores(lm, thin, text, "random", 0)


def of_length_one(entry_outputs):
    return lambda bank, x_TD, routing: x_TD.new_ones(routing.num_entries, 1)


def the_first_for_all(monkeypatch):
    monkeypatch.setattr(fedins_router, "largest", lambda near_BE, k: torch.zeros(len(near_BE), k, dtype=torch.long))


def the_first_expert(monkeypatch):
    """For whoever takes one; training takes two."""
    assign = Jets.assign
    first = torch.zeros(1, dtype=torch.long)
    monkeypatch.setattr(Jets, "assign", lambda self, x, keep: first if keep == 1 else assign(self, x, keep))


def as_they_lie(matching):
    return lambda leader_FX, member_FX: torch.arange(len(leader_FX))


def scales_as_they_start(train):
    return lambda layer, data, *, adapters, **how: train(layer, data, adapters=True, **how) if adapters else None


def shuffled(planes):
    """As many streams, of bytes from anywhere."""

    def mixed(byte_N, width):
        return np.split(np.random.default_rng(0).permutation(byte_N), width)

    return mixed


def at_random(cluster):
    return lambda lm, experts, seed, *, at_random: cluster(lm, experts, seed, at_random=True)


first = patched(
    "topk", "picked", lambda _: lambda score_TE, k, rank: torch.arange(k).expand(len(score_TE), k), "decide.token"
)
# A threshold that nearly even gates come close to, as they do not in so few steps to the usual one.
BARELY: dict[str, object] = {
    "noise": {"noise": 1.0},
    "annealed": {"noise": 0.0, "threshold": 0.12},
    "constant": {"noise": 0.0, "threshold": 0.12, "start": 2.0, "end": 2.0},
    "switch": None,
}
plain = {"shards": 1, "private": 0, "dissociate": False}

CASES = {
    "arrow": Case(random_directions, "lost"),
    "backends": Case(
        lambda m: m.setattr(
            room("backends"), "_ARMS", {n: (swapped, d) for n, (_, d) in room("backends")._ARMS.items()}
        ),
        "lost",
    ),
    "compress_experts": Case(
        patched("compress_experts", "_scores", random_rows),
        taught=20,
    ),
    "dense_to_sparse": Case(
        lambda m: m.setattr(DenseToSparse, "_tau", lambda self: torch.tensor(2.0)),
        pairs={"annealed": "constant"},
        small={"_STEPS": 12, "_ARMS": BARELY},
    ),
    "drop_experts": Case(
        patched("drop_experts", "entry_outputs", of_length_one),
        taught=20,
    ),
    "evo_moe": Case(
        patched("diversify", "_masked", lambda f: lambda lm, layers, masked, seed: f(lm, layers, 0.0, seed)),
        small={"_ONE": 6, "_MANY": 8},
    ),
    "expert_choice": Case(
        lambda m: m.setattr(room("expert_choice"), "ExpertChoice", one_expert),
        pairs={"experts choose": "tokens choose"},
        small={"_STEPS": 20, "_BALANCE": 0.0},
    ),
    "fedins": Case(
        the_first_for_all,
        small={"_TOP_K": 1, "_ROUNDS": 3, "_SPREAD": 0.0},
    ),
    "fedjets": Case(the_first_expert, "lost"),
    "fisher": Case(
        patched(
            "fisher",
            "fisher_information",
            lambda f: lambda *a: {name: torch.ones_like(value) for name, value in f(*a).items()},
            "claims",
        ),
        small={"_STEPS": 100},
    ),
    "glider": Case(
        lambda m: m.setattr(Glider, "guidance", lambda self, given: given.need("query_BQ", "")[:, :4] * 0), "near"
    ),
    "k_bits": Case(
        patched("k_bits", "_rounded", lambda f: lambda lm, bits, codes, block: f(lm, bits, "even", None), "claims"),
        small={"_STEPS": 12, "_WIDTHS": (32, 64), "_SCORED": 2048},
    ),
    "latent_experts": Case(
        patched("latent_experts", "_shared", lambda f: lambda matrix_EFD, rank, drawn: f(matrix_EFD, rank, drawn or 0)),
        "lost",
        pairs={"gap": "gap random"},
        taught=20,
    ),
    "loss_free": Case(lambda m: m.setattr(LossFree, "after_step", lambda self, load_E: None), small={"_STEPS": 12}),
    "merge_aligned": Case(patched("merge_experts", "_matching", as_they_lie), taught=20),
    "merge_experts": Case(
        patched("merge_experts", "_drawn", lambda f: lambda load_LE, by, seed: f(load_LE, "random", seed)),
        small={"_DRAWS": 1},
        taught=20,
    ),
    "mhr": Case(
        lambda m: m.setitem(routers.ROUTERS, "poly", no_parts(routers.ROUTERS["poly"])),
        small={"_STEPS": 30, "_FEW_STEPS": 5},
    ),
    "mhr_mu": Case(lambda m: m.setitem(room("mhr")._ARMS, "mhr", room("mhr")._ARMS["one"]), "near"),
    "moe_beats_dense": Case(first, "near", small={"_STEPS": 15}),
    "mos": Case(
        patched("mos", "attach_shards", lambda f: lambda net, names, **how: f(net, names, **(how | plain)), "claims"),
        small={"_STEPS": 20, "_TAUGHT": 20},
    ),
    "phatgoose": Case(patched("routers", "_gates", lambda f: lambda site, router: f(site, router).roll(1, 0)), "lost"),
    "read_me": Case(
        patched(
            "read_me",
            "train_rounds",
            lambda f: lambda student, text, how: f(student, text, dataclasses.replace(how, router_steps=0)),
        ),
        small={"_ROUNDS": {"rounds": 1, "router_steps": 10, "backbone_steps": 3, "lr": 1e-3}},
        taught=20,
    ),
    "scalearn": Case(
        patched(
            "scalearn",
            "train_routers",
            scales_as_they_start,
            "claims",
        ),
        "lost",
    ),
    "smear": Case(lambda m: m.setattr(SMEAR, "forward", uniform), "lost", small={"_STEPS": 200}),
    "soup": Case(only_the_last, pairs={"removed": "soup"}, small={"_START_STEPS": 20, "_STEPS": 10}),
    "split": Case(
        patched("split", "cluster", at_random),
        pairs={"cluster": "random"},
        small={"_AFTER": 2},
        taught=20,
    ),
    "stragglers": Case(patched("stragglers", "find", other_layers, "claims"), "lost"),
    "zipnn": Case(patched("planes", "planes", shuffled, "models.zipnn"), "near", taught=20),
    "upcycle": Case(
        patched("upcycle", "_experts", lambda f: lambda *a: tuple(0.02 * torch.randn(part.shape) for part in f(*a))),
        "lost",
        small={"_AFTER": 10},
        taught=40,
    ),
}

for each in claims.FAMILIES:
    CASES |= family(each)


def test_every_claim_is_broken_here():
    assert sorted(CASES) == sorted(claims.__all__)


def check(claim, values):
    """Numbers of one seed: all there, in range, and no verdict yet."""
    low, high = claim.limits
    assert not {each: value for each, value in values.items() if not (math.isfinite(value) and low <= value <= high)}
    result = Result(claim, (0,), (values,))
    assert len(result.to_json_dict()["evidence"]) == len(claim.rows) and "no verdict" in claims.show(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_with_its_mechanism_broken_a_claim_sees_the_off_arm(name, monkeypatch):
    case, claim = CASES[name], claims.find(name)()
    for constant, value in case.small.items():
        monkeypatch.setattr(room(name), constant, value)
    if case.taught:
        monkeypatch.setattr(taught, "STEPS", case.taught)
    try:
        taught._taught.cache_clear()
        whole = claim.measure_one(0)
        check(claim, whole)
        case.broken(monkeypatch)
        values = claim.measure_one(0)
    finally:
        taught._taught.cache_clear()  # nobody else is to find those models
    for measured, off in (case.pairs or claim.switched).items():
        said = f"{measured}: whole {whole[measured]} ({whole[off]}), broken {values[measured]} ({values[off]})"
        assert whole[measured] != values[measured], f"nothing was broken; {said}"
        if case.seen == "lost":
            assert whole[measured] < whole[off], said
            assert values[off] - values[measured] <= (whole[off] - whole[measured]) / 2, said
        else:
            assert values[measured] == pytest.approx(values[off], rel=1e-5 if case.seen == "equal" else 0.05), said
