"""Run the experts of a transformers model you have loaded through turnout's executors, and put everything back.

The same classes, the same parameters under the same names, the same generate, Trainer and save_pretrained. How much
faster it is depends on the model: docs/performance.md has measurements.
"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import turnout

torch.manual_seed(0)
model = Qwen3MoeForCausalLM(  # yours: AutoModelForCausalLM.from_pretrained(...)
    Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        decoder_sparse_step=1,
    )
).eval()
ids = torch.randint(128, (2, 32))
names = list(model.state_dict())
with torch.no_grad():
    before = model(ids).logits

model, report = turnout.adopt(model)
print(report)
with torch.no_grad():
    after = model(ids).logits
print("logits agree to 1e-5:", torch.allclose(before, after, rtol=0, atol=1e-5))
print("the same parameters:", list(model.state_dict()) == names)

model, report = turnout.release(model)
with torch.no_grad():
    print("released, to the bit:", torch.equal(model(ids).logits, before))
