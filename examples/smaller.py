"""Sparse to smaller: drop, merge or compress experts, scored on text, and see what each costs.

On the command line: ``turnout convert mixtral --drop-experts 25% --calibration text --out smaller``.
"""

import torch

from turnout.models import LM, LMConfig, MoEConfig
from turnout.reshape import compress_experts, drop_experts, merge_experts

moe = MoEConfig(num_experts=8, top_k=2, hidden=64, router_options={"renormalize": True})
model = LM(LMConfig(vocab_size=128, width=32, layers=2, heads=4, moe=moe, init_std=0.1)).eval()
text = [torch.randint(128, (4, 64), generator=torch.Generator().manual_seed(0))]  # yours: real text, in token ids

kinds = {
    "drop 2 of 8 (REAP)": drop_experts(model, keep=6, batches=text),
    "merge to 6 (M-SMoE)": merge_experts(model, keep=6, batches=text),
    "low rank 8, and rows (MC-SMoE)": compress_experts(model, rank=8, batches=text),
}
print(f"before: {model.cost().params} parameters")
for name, (smaller, report) in kinds.items():
    print(f"{name}: {smaller.cost().params} parameters, logits {report['relative_difference']:.2f} apart")
