"""A dense Llama of transformers becomes a Mixtral: eight experts, two a token, the same outputs to begin with.

On the command line the same is ``turnout convert llama --to moe --experts 8 --top-k 2 --out mixtral``, which also
checks the memory, goes on after a crash and lets transformers judge what was written.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from turnout.models.checkpoint import from_hf, to_hf
from turnout.reshape import upcycle

logging.disable_progress_bar()
torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LlamaForCausalLM(config).save_pretrained(folder / "llama")

dense = from_hf(folder / "llama")
sparse, report = upcycle(dense, num_experts=8, top_k=2)
print(f"{report['params_before']} parameters became {report['params_after']}")
to_hf(sparse, folder / "mixtral", like=folder / "llama")

# From here on turnout is not needed.
ids = torch.arange(64)[None]
llama, mixtral = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("llama", "mixtral"))
with torch.no_grad():
    apart = (mixtral(ids).logits - llama(ids).logits).abs().max().item()
print(f"{type(llama).__name__} is now {type(mixtral).__name__}; logits within 1e-5: {apart < 1e-5}")
