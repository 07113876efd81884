"""Keys of config.json that the code of an architecture passes over, and its cache in transformers does not."""

from turnout.models.config import LMConfig
from turnout.models.families.family import WHOLE, WINDOWED, Family, Keys, refusal

__all__ = ["refuse_foreign_windows"]


def refuse_foreign_windows(family: Family, keys: Keys, config: LMConfig) -> None:
    """Refuses windows that are asked of an architecture without such a key.

    Its layers would look at everything, but caches of transformers, and other engines, go by these keys whatever the
    architecture: a Llama that was once a Mistral, and still says so, generates other texts with a cache than without.

    Args:
        family: the architecture.
        keys: of config.json.
        config: ours, as it was read.

    Raises:
        CheckpointError: names the key.
    """
    own, longest = family.write(config), config.max_seq
    if "layer_types" in own:  # which transformers looks at first
        return
    for name in ("sliding_window", "attention_chunk_size"):
        got = keys.get(name)
        if name not in own and got is not None and got < longest:
            allowed = f"be null, or no shorter than the {longest} tokens that the model takes: {family.architecture}"
            allowed += " has none, while caches of transformers go by it"
            raise refusal(
                f"the key {name!r}", repr(got), allowed, f"remove {name!r}, or use the model it was meant for"
            )
    kinds = keys.get("layer_types")
    wanted = [WHOLE if config.window_of(layer) is None else WINDOWED for layer in range(config.layers)]
    if kinds and list(kinds) != wanted:
        allowed = f"be left out, or name {wanted[0]!r} for each of the {config.layers} layers of {family.architecture}"
        fix = "remove 'layer_types', or use the model it was meant for"
        raise refusal("the key 'layer_types'", repr(kinds)[:200], allowed, fix)
