"""GPT2LMHeadModel: learned positions, layer norms, biases everywhere, and matrices stored (in, out)."""

from torch import Tensor

from turnout.models.attention import Attention
from turnout.models.config import LMConfig
from turnout.models.families.family import Family, Keys, Names, read_activation
from turnout.models.lm import LM, Block
from turnout.models.norm import LayerNorm
from turnout.models.rope import attention_scale
from turnout.paths import FeedForward
from turnout.types.weights import Activation

_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _read(keys: Keys) -> LMConfig:
    keys.fixed(is_causal=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width, inner = keys["n_embd"], keys.get("n_inner")
    return LMConfig(
        vocab_size=keys["vocab_size"],
        width=width,
        layers=keys["n_layer"],
        heads=keys["n_head"],
        hidden=4 * width if inner is None else inner,
        max_seq=keys["n_positions"],
        rope_layers=(),
        learned_positions=True,
        norm="layer",
        norm_eps=keys["layer_norm_epsilon"],
        tie_embeddings=bool(keys.get("tie_word_embeddings")),
        qkv_bias=True,
        out_bias=True,
        ff_bias=True,
        activation=read_activation(keys, "activation_function", _ACTIVATIONS),
        attention_scale=None if keys.get("scale_attn_weights") else 1.0,
        init_std=float(keys.get("initializer_range") or 0.02),
    )


def _write(config: LMConfig) -> dict[str, object]:
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.dense_hidden,
        "n_positions": config.max_seq,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "activation_function": names.get(config.activation, "gelu_new"),
        "scale_attn_weights": attention_scale(config) != 1,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "initializer_range": config.init_std,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _views(lm: LM, root: str) -> dict[str, Tensor]:
    """Every tensor of a folder, as a view of ours: names begin with ``root``, but for the output layer's."""
    assert lm.positions is not None and isinstance(lm.norm, LayerNorm)
    found = {"wte.weight": lm.embedding, "wpe.weight": lm.positions}
    found |= {"ln_f.weight": lm.norm.weight, "ln_f.bias": lm.norm.bias}
    for layer, block in enumerate(lm.blocks):
        assert isinstance(block, Block) and isinstance(block.ff, FeedForward)
        assert isinstance(block.attention, Attention)
        for name, norm in (("ln_1", block.attention_norm), ("ln_2", block.ff_norm)):
            assert isinstance(norm, LayerNorm)
            found |= {f"h.{layer}.{name}.weight": norm.weight, f"h.{layer}.{name}.bias": norm.bias}
        attention, ff = block.attention, block.ff
        maps = {
            "attn.c_attn": (attention.qkv.weight, attention.qkv.bias),
            "attn.c_proj": (attention.out.weight, attention.out.bias),
            "mlp.c_fc": (ff.up, ff.up_bias),
            "mlp.c_proj": (ff.down, ff.down_bias),
        }
        for name, (weight, bias) in maps.items():
            assert bias is not None
            found |= {f"h.{layer}.{name}.weight": weight.t(), f"h.{layer}.{name}.bias": bias}
    head = {} if lm.head is None else {"lm_head.weight": lm.head.weight}
    return {f"{root}{name}": tensor for name, tensor in found.items()} | head


FAMILY = Family(
    "gpt2",
    "GPT2LMHeadModel",
    routed=False,
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=_write,
    # The published folders were saved without the output layer, and so without the prefix.
    layouts=(Names(root="transformer.", views=_views), Names(root="", views=_views)),
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)
