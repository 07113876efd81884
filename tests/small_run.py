"""The fields of a very small run with experts, which trains in a second."""

SMALL = (
    "width=16 model.layers=2 heads=2 kv_heads=1 model.hidden=16 model.moe.hidden=8 num_experts=4 vocab_size=300 "
    "max_seq=32 seq=32 batch=4 steps=2 warmup=1 eval_every=2 checkpoint_every=2 log_every=1 eval_tokens=512"
).split()
