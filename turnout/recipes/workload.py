"""A model and a step of its training in the numbers that a planner knows: counted from its configuration alone."""

import dataclasses
from pathlib import Path

from torch import nn

from turnout.errors import CheckpointError, TurnoutError, word
from turnout.models.checkpoint.own import ORIGIN, describe, outline, read_json
from turnout.models.config import LMConfig, MoEConfig
from turnout.models.families.express import family_of
from turnout.recipes.run import Run
from turnout.types import BlockSize, Workload
from turnout.types.weights import GATED

__all__ = ["config_of", "workload_of"]

_WHERE = "turnout plan"
# Numbers that a block keeps of a token for its backward pass, counted on the CPU (docs/log.md): seven widths, of which
# two are the queries' and what the heads give; keys before and after they are turned, and values; of a feed-forward
# layer its product, which is twice as wide where it is gated, and what it becomes. Under bf16 norms stay in fp32.
# Norms after a part keep two widths more; capped scores are held whole, before and after their softmax, window or not.
# A gate on the shared expert keeps what that gave; behind the last block are the last norm, what it gives and its
# gradient. Autocast leaves what goes from block to block, and to experts elsewhere, in fp32.
_WIDTHS, _QUERIES, _KEYS, _DENSE, _EXPERT, _WIDE, _AFTER, _SCORES, _LAST = 5, 2, 3, 2, 1, 3, 2, 2, 3


def config_of(path: str | Path) -> LMConfig:
    """The configuration of a model whose weights need not be there: a folder with a config.json, or the file itself.

    Args:
        path: a folder of transformers, a run's, one that ``checkpoint.save`` wrote, or a config.json.

    Raises:
        CheckpointError: there is none, or of an architecture that turnout does not know.

    Source: none; as ``turnout.models.checkpoint`` reads it.
    """
    path = Path(path)
    places = [path, path / "config.json", path / "model" / "config.json", path / ORIGIN / "config.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        got = str(path) if path.exists() else f"{path}, which does not exist"
        fix = "name a recipe (turnout train lists them), a folder with a config.json, or that file"
        raise CheckpointError(word("MODEL", got=got, allowed="be a recipe or a model", where=_WHERE, fix=fix))
    keys = read_json(file, _WHERE)
    if "model_type" not in keys and "architectures" not in keys:
        return describe(file.parent)[0]
    family = family_of(keys)
    if family is None:
        got, allowed = f"model_type {keys.get('model_type')!r}", "be of an architecture that turnout reads"
        fix = "see turnout doctor for these, or plan a recipe with its sizes: turnout plan tiny width=4096 ..."
        raise CheckpointError(word(str(file), got=got, allowed=allowed, where=_WHERE, fix=fix))
    try:
        return family.read(family.keys(keys))
    except TurnoutError as error:
        raise CheckpointError(f"{file}: {error}") from error


def workload_of(run: Run, *, batch: int | None = None, seq: int | None = None) -> Workload:
    """One optimizer step of a run.

    Weights and gradients are in fp32 as ``turnout train`` has them, with AdamW's two moments; computed in the run's
    dtype.

    Args:
        run: the model, and how it is trained.
        batch: sequences of a step; None for the run's.
        seq: tokens of a sequence; None for the run's.

    Source: none; parameters are counted, operations are two for each of a product.
    """
    config, seq = run.model, seq or run.train.seq
    lm = outline(dataclasses.replace(config, max_seq=max(seq, config.max_seq)))
    half = run.train.dtype == "bf16"
    blocks = tuple(_block(config, block, layer, seq, half) for layer, block in enumerate(lm.blocks))
    whole = sum(p.numel() for p in lm.parameters())
    table = config.vocab_size * config.width
    head = 0 if config.tie_embeddings else table
    cpu, gate = run.train.device in ("auto", "cpu"), lm.pre_gate
    return Workload(
        blocks,
        width=config.width,
        seq=seq,
        batch=batch or run.train.batch * run.train.accumulate,
        embedding_params=whole - head - sum(block.total for block in blocks),
        head_params=head,
        vocab=config.vocab_size,
        logits_kept=0.0 if cpu else 3.0,
        number_bytes=2.0 if half else 4.0,
        param_bytes=4.0,
        grad_bytes=4.0,
        optimizer_bytes=8.0,
        wire_bytes=4.0,
        first_flops=0.0 if gate is None else 2.0 * gate.products(seq // 2),  # of half the pairs, as in blocks
        first_kept=0.0 if gate is None else _gate_kept(gate.config, seq, half),
        last_kept=(_LAST + half) * config.width,
        last_kept_once=float(table * (cpu + half)),  # the output layer's gradient there, and its weights in bf16
    )


def _block(config: LMConfig, block: nn.Module, layer: int, seq: int, half: bool) -> BlockSize:
    sizes = {name: p.numel() for name, p in block.named_parameters()}
    bank = sum(size for name, size in sizes.items() if ".bank." in f".{name}")
    moe = config.moe if config.is_routed(layer) else None
    held = 0 if moe is None else config.experts_held(layer) or config.experts_of(layer)
    taken = 0.0 if moe is None else min(_taken(moe), float(held))  # of merged experts a token takes one once
    params = sum(sizes.values()) - bank
    if config.mla is None:
        wide = value = config.head_width
    else:
        wide, value = config.mla.rope_dim + config.mla.nope_dim, config.mla.v_dim
    kept = _attention_kept(config, seq, half)
    flops = 2.0 * params + 2.0 * config.heads * (wide + value) * _looked(seq, config.window_of(layer))
    expert_kept = 0.0
    if moe is None:
        kept += _feed_forward(config.dense_hidden, config.activation) * _DENSE
    else:
        kept += _feed_forward(moe.shared_hidden or 0, moe.activation) * _DENSE + 4 * config.experts_of(layer) * (
            1 + half
        )
        kept += config.width * ((1 + half) * moe.shared_gate + half * (moe.shared_hidden is not None))
        expert_kept = _feed_forward(moe.hidden, moe.activation) * _EXPERT
        # Experts that share a factor use it once for a token; biases are no products.
        spent = block.ff.bank.cost(1, taken).flops or 0.0  # pyrefly: ignore[missing-attribute]
        flops += spent - 2.0 * taken * (bank // held)
    window = config.window_of(layer)
    masked = window is not None and window < seq and config.attention_softcap is None
    return BlockSize(
        params=params,
        flops=flops,
        kept=kept,
        experts=held,
        top_k=taken,
        expert_params=bank // held if held else 0,
        expert_kept=expert_kept,
        kept_once=float(seq * seq * masked) + (float(params) if half else 0.0),
    )


def _attention_kept(config: LMConfig, seq: int, half: bool) -> float:
    """Numbers that a block keeps of a token without its feed-forward layer; under bf16 one of fp32 counts twice."""
    if config.mla is None:
        queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    else:
        queries = keys = config.heads * (config.mla.rope_dim + config.mla.nope_dim)
    kept = (_WIDTHS + _WIDE * half) * config.width + _QUERIES * queries + _KEYS * keys
    kept += (_AFTER + _WIDE * half) * config.width if config.norm_place == "both" else 0
    kept += 3 * (queries + keys) * half if config.qk_norm != "none" else 0
    return kept + (0 if config.attention_softcap is None else _SCORES * (1 + half) * config.heads * seq)


def _gate_kept(config: LMConfig, seq: int, half: bool) -> float:
    """Of a router of all layers, which is a small decoder."""
    each = _attention_kept(config, seq, half) + _feed_forward(config.dense_hidden, config.activation) * _DENSE
    return config.layers * each + (_LAST + half) * config.width


def _taken(moe: MoEConfig) -> float:
    """Experts of a token: of a router that grows sparse the most, of experts that choose tokens their mean number."""
    if moe.router == "DenseToSparse":
        return float(moe.num_experts)
    factor = moe.router_options.get("capacity_factor")
    return float(factor) if moe.router == "ExpertChoice" and isinstance(factor, int | float) else float(moe.top_k)


def _looked(seq: int, window: int | None) -> float:
    """Positions that a token of a sequence sees on average: half of all, or those of its window where it has them."""
    near = min(seq, window or seq)
    return near - near * near / (2 * seq)


def _feed_forward(hidden: int, activation: str) -> float:
    return hidden * (2.0 if activation in GATED else 1.0)


def as_text(workload: Workload) -> str:
    """The sizes in a line, for people."""
    routed = [block for block in workload.blocks if block.experts]
    active = sum(block.params + block.top_k * block.expert_params for block in workload.blocks)
    active += workload.embedding_params + workload.head_params
    what = f"{workload.params / 1e9:.4g} B parameters in {len(workload.blocks)} blocks"
    if routed:
        what += f", {active / 1e9:.4g} B of them for a token ({routed[0].experts} experts, top {routed[0].top_k:g})"
    return f"{what}; a step of {workload.batch} sequences of {workload.seq} tokens"
