"""A tiny model and a tiny text for the tests of the loop, and the program that their child processes run."""

import json
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

from turnout.train.config import TrainConfig
from turnout.train.data.shards import Split
from turnout.train.loop import train
from turnout.types import Routing

VOCAB, WIDTH, EXPERTS = 32, 16, 4
# What a line says of the machine and its clock: the same run says something else each time.
CLOCKED = ("tokens_per_s", "seconds", "peak_memory_bytes", "pass_s", "hidden")


class Router(nn.Module):
    """Noisy softmax top-1 with a bias that learns from the load: draws, keeps a buffer, gives scores."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH) * 0.1)
        self.register_buffer("bias_E", torch.zeros(EXPERTS))
        self.loads = []

    def forward(self, x_TD, *, generator=None):
        logit_TE = x_TD.float() @ self.weight.t()
        noise = torch.rand(logit_TE.shape, generator=generator) * 0.1 if self.training else 0.0
        score_TE = logit_TE.softmax(1)
        index_TK = (score_TE + noise + self.bias_E).argmax(1, keepdim=True)
        weight_TK = score_TE.gather(1, index_TK)
        return Routing.from_topk(index_TK, weight_TK, num_experts=EXPERTS, score_TE=score_TE, logit_TE=logit_TE)

    def after_step(self, load_E):
        self.loads.append(load_E.tolist())
        load_E = load_E.float()
        self.bias_E += 0.01 * torch.sign(load_E.mean() - load_E)


class Tiny(nn.Module):
    """An embedding, dropout, one routed layer of rank-one experts, and a tied head."""

    def __init__(self, *, moe=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.router = Router() if moe else None
        self.expert_ED = nn.Parameter(torch.ones(EXPERTS, WIDTH)) if moe else None
        self.routers = [self.router] if moe else []

    def forward(self, id_BS, *, generator=None):
        x_BSD = self.drop(self.norm(self.embed(id_BS)))
        routings = ()
        if self.router is not None:
            x_TD = x_BSD.flatten(0, 1)
            routing = self.router(x_TD, generator=generator)
            y_TD = x_TD * (routing.dense() @ self.expert_ED)
            x_BSD, routings = x_BSD + y_TD.view_as(x_BSD), (routing,)
        return types.SimpleNamespace(logits_BSV=self.head(x_BSD), routings=routings)


def split(documents, length, seed):
    random = np.random.default_rng(seed)
    token_T = (np.cumsum(random.integers(0, 3, documents * length)) % VOCAB).astype(np.uint16)
    offset_N = np.arange(documents + 1) * length
    return Split("tiny", token_T, offset_N, np.arange(documents) % 2)


def tiny_tokens():
    return types.SimpleNamespace(
        train=split(20, 100, 0),
        held_out=split(4, 50, 1),
        domains=("even", "odd"),
        byte_length_V=np.ones(VOCAB, dtype=np.int64),
        digest="stand-in",
        tokenizer=None,
    )


def tiny_config(**fields):
    sizes = {"steps": 12, "batch": 2, "seq": 16, "accumulate": 2, "lr": 0.01, "min_lr": 0.001}
    sizes["warmup"] = min(2, fields.get("steps", 12))
    every = {"eval_every": 5, "eval_tokens": 64, "checkpoint_every": 4, "log_every": 3}
    return TrainConfig(**{**sizes, **every, **fields})


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def exact(out):
    """The lines of metrics.jsonl without what a clock decides."""
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines(out)]


def run(out, *, resume=False, **fields):
    return train(Tiny(), tiny_tokens(), tiny_config(**fields), out, resume=resume, run_json={}, quiet=True)


# ---- what the child processes of the tests do; python stand_in.py JOB ARGUMENTS


def sweep(folder):
    """Kills a forked run at every one of its disk operations in turn, resumes it, and prints what differs."""
    folder = Path(folder)
    run(folder / "whole")
    expected, count = exact(folder / "whole"), 0
    while True:
        out = folder / f"killed-{count}"
        if not _in_child(lambda out=out, count=count: _run_until(out, count)):
            break
        if not (out / "run.json").exists():
            _in_child(lambda out=out: run(out))
        else:
            _in_child(lambda out=out: run(out, resume=True))
        if exact(out) != expected:
            print(f"killed at disk operation {count}: other metrics")
        if list((out / "checkpoints").glob("*.part")):
            print(f"killed at disk operation {count}: a .part was left")
        count += 1
    print(f"operations {count}")


def _in_child(action):
    """Whether the action, in a process of its own, was killed."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WIFSIGNALED(status)


def _run_until(out, operation):
    """Runs, and kills this process just before its disk operation of that number."""
    done = 0

    def counting(function):
        def counted(*arguments, **options):
            nonlocal done
            if done == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return function(*arguments, **options)

        return counted

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, counting(getattr(os, name)))
    run(out)


def whole(out):
    """A run that nothing disturbs."""
    run(Path(out), steps=40, checkpoint_every=5)


def slow(out, resume, step_ms):
    """A run whose steps take their time, for signals from outside; prints a line a step."""
    import time

    from turnout.train import step as stepping

    whole = stepping.Step.run

    def run_slowly(self, step, lr):
        print(f"step {step}", flush=True)
        time.sleep(int(step_ms) / 1000)
        whole(self, step, lr)

    stepping.Step.run = run_slowly
    run(Path(out), resume=resume == "resume", steps=40, checkpoint_every=5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"sweep": sweep, "slow": slow, "whole": whole}[sys.argv[1]](*sys.argv[2:])
