"""The models that benchmarks.decoding runs: random weights from a seed, written once for all that read them.

Each is a folder of transformers in fp32 and one in bf16, and GGUF files written from the first; beside them the logits
that everyone must come to.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["BITS", "KINDS", "LOADS", "SHAPES", "Sizes", "forced", "prepare"]

SEED = 0
BITS = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}  # -> of GGUF
KINDS = tuple(BITS)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How many times wider than the other weights' the routers' are: near ties would let roundings choose experts.
_ROUTER = 5.0
# Of the check: streams, tokens that are read at once, steps after them.
CHECK = (3, 24, 4)
# What of all tokens each layer's experts take, a list of lists; measured on so many.
LOADS, _COUNTED = "loads.json", 512


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One model: what transformers calls it, and its configuration.

    Args:
        says: what it is.
        family: before ``Config`` and ``ForCausalLM``.
        keys: of the configuration.
        has_experts: whether there are any.
    """

    says: str
    family: str
    keys: dict[str, Any]

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture."""
        return "num_experts" in self.keys

    def cache_bytes(self, positions: int, itemsize: int) -> int:
        """Keys and values of so many positions."""
        keys = self.keys
        head = keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]
        return 2 * keys["num_hidden_layers"] * keys["num_key_value_heads"] * head * positions * itemsize


_ENDS = {"max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
         "tie_word_embeddings": False}  # fmt: skip
SHAPES = {
    "moe": Sizes("Qwen3-MoE of width 512, 8 layers, top 4 of 32 experts of 512", "Qwen3Moe", {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "intermediate_size": 512, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4,
        "norm_topk_prob": True, "vocab_size": 8192,
    }),
    "olmoe": Sizes("OLMoE of width 1024, 4 layers, top 8 of 64 experts of 256", "Olmoe", {
        "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 8192,
    }),
    "dense": Sizes("Llama of width 512, 8 layers of 2048: as much as the first has active", "Llama", {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "intermediate_size": 2048, "vocab_size": 8192,
    }),
    # For tests, and what a process holds before it has a model.
    "tiny": Sizes("Qwen3-MoE of width 32, 2 layers, top 2 of 4 experts of 32", "Qwen3Moe", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 32, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "vocab_size": 64,
    }),
    "tiny dense": Sizes("Llama of width 32, 2 layers of 64", "Llama", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 64, "vocab_size": 64,
    }),
}  # fmt: skip


def forced(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the check: (B, S) prompts, and (N, B) those that follow one at a time."""
    streams, prompt, steps = CHECK
    drawn = np.random.default_rng(SEED).integers(0, vocabulary, (streams, prompt + steps))
    return drawn[:, :prompt], drawn[:, prompt:].T


def prepare(name: str, folder: Path, kinds: tuple[str, ...], *, gguf: bool) -> None:
    """Writes what is not there yet: ``fp32/``, ``bf16/``, ``int4/``, ``<kind>.gguf``, loads of experts, and the logits.

    ``<kind>.npy`` are those of the model before its weights were put in few bits, ``<kind>.own.npy`` those of the
    weights that turnout put in few bits, written out again; both by transformers in fp32.

    Args:
        name: of ``SHAPES``.
        folder: where to.
        kinds: of ``KINDS``.
        gguf: whether llama.cpp takes part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [kind for kind in kinds if not (folder / f"{kind}.npy").exists()]
    if missing or not (folder / "fp32").exists():
        model = _made(SHAPES[name])
        for kind, dtype in _DTYPES.items():
            if not (folder / kind).exists():
                model.to(dtype).save_pretrained(folder / kind)  # in bf16 for good: it is the last
        del model
        for kind in missing:
            np.save(folder / f"{kind}.npy", _expected(SHAPES[name], folder / ("bf16" if kind == "bf16" else "fp32")))
    if not (folder / LOADS).exists():
        (folder / LOADS).write_text(json.dumps(_loads(SHAPES[name], folder / "fp32")), encoding="utf-8")
    for kind in kinds:
        if kind not in _DTYPES and not (folder / f"{kind}.own.npy").exists():
            _write_few_bits(SHAPES[name], folder, kind)
    if gguf:
        _write_gguf(folder, kinds)


@torch.no_grad()
def _made(sizes: Sizes) -> Any:
    import transformers

    torch.manual_seed(SEED)
    config = getattr(transformers, f"{sizes.family}Config")(**_ENDS | sizes.keys)
    model = getattr(transformers, f"{sizes.family}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("mlp.gate.weight"):
            parameter.mul_(_ROUTER)
    return model


@torch.no_grad()
def _expected(sizes: Sizes, folder: Path) -> np.ndarray:
    """(1 + N, B, V) what transformers computes in fp32, with its eager experts, from whole texts."""
    import transformers

    how = {"experts_implementation": "eager"} if sizes.has_experts else {}
    model = getattr(transformers, f"{sizes.family}ForCausalLM").from_pretrained(folder, dtype=torch.float32, **how)
    prompt_BS, step_NB = forced(sizes.keys["vocab_size"])
    id_BS = torch.from_numpy(np.concatenate((prompt_BS, step_NB.T), 1))
    logits_BSV = model.eval()(id_BS).logits[:, prompt_BS.shape[1] - 1 :]
    return logits_BSV.transpose(0, 1).contiguous().numpy()


@torch.no_grad()
def _loads(sizes: Sizes, folder: Path) -> list[list[float]]:
    """(L, E) the share of random tokens that take each expert."""
    import transformers

    if not sizes.has_experts:
        return []
    model = getattr(transformers, f"{sizes.family}ForCausalLM").from_pretrained(folder, dtype=torch.float32).eval()
    id_BS = torch.randint(sizes.keys["vocab_size"], (4, _COUNTED // 4), generator=torch.Generator().manual_seed(SEED))
    scores = model.model(id_BS, output_router_logits=True).router_logits
    top_k = sizes.keys["num_experts_per_tok"]
    counts = [score_TE.topk(top_k).indices.flatten().bincount(minlength=score_TE.shape[1]) for score_TE in scores]
    return [(count_E / _COUNTED).tolist() for count_E in counts]


def _write_few_bits(sizes: Sizes, folder: Path, kind: str) -> None:
    """The model in bf16 with its maps in few bits, in llama.cpp's groups of 32; and what it computes."""
    from turnout.models import checkpoint
    from turnout.reshape import densify, quantize

    bits = {"int8": 8, "int4": 4}[kind]
    # llama.cpp holds its output layer in eight bits in both kinds; ours has one number of bits for all that it packs.
    parts = ("experts", "shared", "dense", "attention", *(("head",) if bits == 8 else ()))
    text = [torch.zeros(1, 8, dtype=torch.int64)]  # what it changes is not asked here
    lm = checkpoint.from_hf(folder / "bf16")
    lm = quantize(lm, bits=bits, group=32, parts=parts, scale="float16", batches=text)[0]
    if not (folder / kind).exists():
        checkpoint.save(folder / kind, lm)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        whole = Path(place, "whole")
        checkpoint.to_hf(densify(lm, batches=text)[0], whole, architecture=f"{sizes.family}ForCausalLM")
        np.save(folder / f"{kind}.own.npy", _expected(sizes, whole))


def _write_gguf(folder: Path, kinds: tuple[str, ...]) -> None:
    from turnout.models import checkpoint
    from turnout.models.gguf import to_gguf

    missing = [kind for kind in kinds if not (folder / f"{kind}.gguf").exists()]
    if missing:
        lm = checkpoint.from_hf(folder / "fp32")
        for kind in missing:
            done = to_gguf(lm, folder / f"{kind}.gguf", kind=BITS[kind], tokenizer=False)  # pyrefly: ignore
            (folder / f"{kind}.gguf.json").write_text(json.dumps(dict(done.tensors)), encoding="utf-8")
