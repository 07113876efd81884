"""What a configuration asks for against what the headers of the weights hold: arithmetic, before a model is built."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from turnout.errors import CheckpointError, word
from turnout.models.config import LMConfig

__all__ = ["check_sizes"]


def check_sizes(path: Path, config: LMConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuses a configuration of many more layers, experts or tokens than there are numbers in the weights.

    Building the outline of a model takes time and memory for every layer and expert, even without its weights. What is
    counted here is less than what a model of the configuration has: that the tensors are the right ones is for
    ``check_names`` and ``check_shape`` to say.

    Args:
        path: the folder.
        config: what its config.json says.
        shapes: of every tensor, by name.

    Raises:
        CheckpointError: says which part of the model is larger than everything that is there.

    >>> config = LMConfig(vocab_size=8, width=8, layers=1000, heads=2)
    >>> check_sizes(Path("model"), config, {"embedding": (8, 8)})
    Traceback (most recent call last):
    turnout.errors.CheckpointError: config.json must be of these weights in model; got feed-forward layers of...

    Source: none; arithmetic.
    """
    there = sum(prod(shape) for shape in shapes.values())
    # Of maps in four bits, half as many bytes are there as the model has numbers.
    there *= 1 if config.quantized is None else 8 // config.quantized.bits
    width, moe = config.width, config.moe
    head = config.head_width if config.mla is None else config.mla.v_dim
    needs = {
        f"{config.vocab_size:,} tokens": config.vocab_size * width,
        f"{config.layers:,} layers": config.layers * 2 * width,
        f"{config.heads:,} heads": config.heads * head * width,
    }
    if config.learned_positions:
        needs |= {f"{config.max_seq:,} positions": config.max_seq * width}
    if config.mla is not None:
        latents = config.mla.kv_rank + (config.mla.q_rank or 0) + config.mla.rope_dim
        needs |= {f"latents of width {latents:,}": latents * width}
    if moe is not None:
        routed = config.layers if moe.layers == "all" else len(moe.layers)
        held = sum(moe.distinct or moe.per_layer or (moe.num_experts * routed,))
        each = 2 * moe.hidden * width if moe.factored is None else 1
        needs |= {f"{moe.num_experts:,} experts of width {moe.hidden:,} in {routed:,} layers": held * each}
        needs |= {f"a shared expert of width {moe.shared_hidden or 0:,}": 2 * (moe.shared_hidden or 0) * width}
    if moe is None or moe.layers != "all":
        dense = config.layers - (0 if moe is None else len(moe.layers))
        needs |= {f"feed-forward layers of width {config.dense_hidden:,}": 2 * dense * config.dense_hidden * width}
    what, most = max(needs.items(), key=lambda item: item[1])
    if most > there:
        got = f"{what}, which take {most:,} numbers or more, and {there:,} in the weights"
        fix = "use the config.json that belongs to these weights"
        raise CheckpointError(word("config.json", got=got, allowed="be of these weights", where=str(path), fix=fix))
