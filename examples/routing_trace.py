"""Record which experts every token of some text took, and ask the trace which domain uses which expert.

For a model on disk: ``turnout eval runs/x --trace trace``.
"""

import tempfile
from pathlib import Path

import torch

from turnout.models import LM, LMConfig, MoEConfig
from turnout.types import Trace, TraceWriter

texts = {"letters": b"the quick brown fox jumps over the lazy dog " * 3, "digits": b"31415926535897932384626433" * 5}
moe = MoEConfig(num_experts=4, top_k=1, hidden=32)
model = LM(LMConfig(vocab_size=256, width=32, layers=2, heads=4, moe=moe)).eval()

folder = Path(tempfile.mkdtemp()) / "trace"
with TraceWriter(folder, num_experts_L=[4, 4], domains=list(texts)) as writer:
    for number, text in enumerate(texts.values()):
        with torch.no_grad():
            routings = model(torch.tensor([list(text)])).routings
        writer.add(routings, document_tokens=[len(text)], document_domains=[number])

trace = Trace.open(folder)  # columns mapped from disk: a trace of billions of tokens opens as this one does
print(f"{trace.num_tokens} tokens, {trace.num_layers} routed layers")
for layer in range(trace.num_layers):
    for domain in trace.domains:
        load_E = trace.load(layer, domain=domain)
        print(f"layer {layer}, {domain:<7}: tokens by expert {load_E.tolist()}")

first = trace.routing(0, start=0, stop=9)  # a Routing again, to run, compare or draw
print("the experts of 'the quick':", first.dense().argmax(1).tolist())
