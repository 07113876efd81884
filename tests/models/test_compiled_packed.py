"""The compiled step of models in few bits: what their modules compute from the weights written out."""

import dataclasses
import functools

import pytest
import torch
from variants import TINY, VARIANTS, ids

from turnout.models import LM, MLAConfig, MoEConfig
from turnout.models.decoding import Decoder
from turnout.models.decoding.path import why_plain
from turnout.models.decoding.plain import PlainSteps
from turnout.reshape import quantize

pytestmark = pytest.mark.usefixtures("compiled")

# Odd sizes, and rows of no whole number of blocks of 32.
ODD = {"width": 30, "heads": 3, "kv_heads": 1, "head_dim": 10, "hidden": 36}
EVEN = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 96, "window": 7, "window_layers": (1,)}
ALL = ("experts", "shared", "dense", "attention", "head")
SHARED = MoEConfig(num_experts=5, top_k=2, hidden=34, shared_hidden=18, shared_gate=True, layers=(1,))
LATENT = {
    "attention": "mla",
    "kv_heads": None,
    "width": 64,
    "mla": MLAConfig(kv_rank=64, rope_dim=6, nope_dim=10, v_dim=16, q_rank=32, interleaved=False),
    "moe": dataclasses.replace(SHARED, hidden=64, shared_hidden=32),
}
CASES = {
    "eight bits": (ODD | {"moe": SHARED}, {"bits": 8, "group": None, "parts": ALL, "scale": "float32"}),
    "eight bits, odd": (ODD | {"width": 33, "hidden": 35, "heads": 3, "head_dim": 11, "rope_layers": ()},
                        {"bits": 8, "group": None, "parts": ALL}),
    "eight bits in groups": (EVEN | {"moe": dataclasses.replace(SHARED, hidden=64, shared_hidden=32)},
                             {"bits": 8, "group": 32, "parts": ALL, "scale": "float16"}),
    "four bits": (ODD | {"moe": SHARED, "ff_bias": True, "qkv_bias": True, "out_bias": True},
                  {"bits": 4, "group": None, "parts": ALL}),
    "four bits in groups": (EVEN, {"bits": 4, "group": 32, "parts": ALL, "scale": "float16"}),
    "levels": (EVEN | {"moe": MoEConfig(6, 3, 64)}, {"bits": 4, "group": 32, "parts": ALL, "codes": "nf4"}),
    "levels in fp32": (EVEN | {"moe": dataclasses.replace(SHARED, hidden=64, shared_hidden=32)},
                       {"bits": 4, "group": 32, "codes": "float", "scale": "float32"}),
    "experts alone": (EVEN | {"moe": MoEConfig(6, 3, 96, router="GroupLimited",
                              router_options={"num_groups": 3, "top_groups": 2})},
                      {"bits": 4, "group": 32, "parts": ("experts",)}),
    "all but experts": (EVEN | {"moe": SHARED}, {"bits": 8, "group": 32, "parts": ("attention", "head")}),
    "latent, eight bits": (VARIANTS["latent"] | {"moe": SHARED, "window": 6, "window_layers": (0,)},
                           {"bits": 8, "group": None, "parts": ALL, "scale": "float32"}),
    "latent, levels": (LATENT, {"bits": 4, "group": 32, "codes": "nf4"}),
    "latent, four bits": (VARIANTS["latent"], {"bits": 4, "group": None, "parts": ("attention",)}),
    "gpt-oss": (VARIANTS["gpt-oss"] | EVEN | {"window": 6, "moe": dataclasses.replace(
        VARIANTS["gpt-oss"]["moe"], hidden=32)}, {"bits": 4, "group": 32, "codes": "float"}),
}  # fmt: skip


@functools.cache
def packed(name: str) -> LM:
    config, how = CASES[name]
    lm = LM(dataclasses.replace(TINY, **config, init_std=0.2)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in lm.named_parameters():
            if parameter.ndim == 1 or key.endswith("_bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return quantize(lm, **{"parts": ("experts", "shared", "attention"), **how}, batches=[ids(1, 8)])[0].eval()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 17])
@torch.no_grad()
def test_steps_are_those_of_the_weights_written_out(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, id_BS = packed(name), ids(batch, 18)
    length_B = 1 + torch.randperm(max(batch, 12), generator=torch.Generator().manual_seed(batch))[:batch] % 12
    decoder = Decoder(lm, batch, 4)
    assert decoder.why_plain is None
    got = [decoder.prefill(id_BS[:, :12], length_B).clone()] + [decoder.step(one).clone() for one in id_BS[:, 12:].T]
    monkeypatch.setenv("TURNOUT_COMPILED", "0")
    plain = PlainSteps(lm)
    want = [plain.prefill(id_BS[:, :12], length_B)] + [plain.step(one) for one in id_BS[:, 12:].T]
    # Both sum in fp32, each in its own order; logits are about 3.
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=0, atol=3e-5)


def test_groups_that_no_kernel_reads_are_named() -> None:
    config, how = CASES["all but experts"]
    lm = quantize(LM(dataclasses.replace(TINY, **config)), **how | {"group": 16}, batches=[ids(1, 8)])[0].eval()
    assert "blocks.0.attention.qkv.weight has groups of 16" in (why_plain(lm) or "")
