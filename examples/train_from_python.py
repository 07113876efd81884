"""Train a small mixture of experts on text of your own, from Python: tokens, model, training, a sample, the report.

On the command line the same is ``turnout train tiny --data text --out run``.
"""

import tempfile
from pathlib import Path

import torch

from turnout.models import LM, LMConfig, MoEConfig
from turnout.train import TrainConfig, train
from turnout.train.data import load_tokenizer, prepare

folder = Path(tempfile.mkdtemp())
text = folder / "text"  # any files of text, jsonl or parquet; here multiplication tables
text.mkdir()
for n in range(40):
    (text / f"{n}.txt").write_text("\n".join(f"{n} times {k} is {n * k}." for k in range(40)))

tokens = prepare({"tables": text}, folder / "tokens", vocab_size=300, held_out=0.1, quiet=True)
print(f"{tokens.train.num_tokens} tokens to train on, {tokens.held_out.num_tokens} held out")

moe = MoEConfig(num_experts=8, top_k=2, hidden=64)
model = LM(LMConfig(vocab_size=tokens.vocab_size, width=64, layers=2, heads=4, max_seq=64, moe=moe))
cost = model.cost()
print(f"{cost.params} parameters, of which a token uses {cost.params_active}")

config = TrainConfig(steps=60, batch=16, seq=64, lr=4e-3, warmup=6, eval_every=30)
result = train(model, tokens, config, folder / "run", quiet=True)
for line in result.evaluations:
    print(f"step {line['step']}: {line['bits_per_byte']:.2f} bits per byte, load MaxVio {line['max_vio']:.1f}")

tokenizer = load_tokenizer(folder / "tokens")
prompt = torch.tensor([tokenizer.encode("7 times 8").ids])
print("a sample:", tokenizer.decode(model.generate(prompt, tokens=1, temperature=0.0)[0].tolist()))
