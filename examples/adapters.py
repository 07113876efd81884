"""Several LoRA adapters of PEFT on one model at once, a router choosing among them for every token and linear map.

Arrow needs no training. docs/guides/adapters.md trains adapters and compares routers; here they are random.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from turnout.reshape import attach, detach

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval()
for name, rank in (("math", 8), ("code", 4), ("law", 2)):
    # Yours are trained by PEFT; init_lora_weights=False gives random ones instead of none.
    lora = LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(str(folder / name))
    adapted.unload()

ids = torch.randint(128, (2, 24))
with torch.no_grad():
    alone = model(ids).logits
    model, report = attach(model, [folder / name for name in ("math", "code", "law")], router="arrow")
    print(report)
    print("adapters change the output:", not torch.equal(model(ids).logits, alone))
    detach(model)
    print("detached, to the bit:", torch.equal(model(ids).logits, alone))
