"""Does model B compute what model A does? If not, where do they part? Here two experts have changed places.

On the command line: ``turnout certify A B``, for folders of transformers, of turnout, and runs.
"""

import copy

import torch

from turnout.measure import certify
from turnout.models import LM, LMConfig, MoEConfig

moe = MoEConfig(num_experts=8, top_k=2, hidden=32)
right = LM(LMConfig(vocab_size=256, width=32, layers=3, heads=4, moe=moe, init_std=0.2)).eval()
ids = torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(0))

certificate = certify(right, copy.deepcopy(right), ids)
print("a copy:", certificate.verdict)

wrong = copy.deepcopy(right)
weights = wrong.state_dict()
for name in ("blocks.1.ff.bank.up", "blocks.1.ff.bank.down"):
    weights[name][[2, 5]] = weights[name][[5, 2]]

certificate = certify(right, wrong, ids)
print("two experts swapped:", certificate.verdict)
parted = certificate.parted
if parted is not None:
    print(f"they part in {parted.layer}, in its {parted.part}: {list(parted.experts)}")
