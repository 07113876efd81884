"""Bits per byte is one number: however rows are batched and padded, and whatever the tokenizer counts in."""

import math
import types

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from turnout.measure import bits_per_byte
from turnout.models import LM, LMConfig, MoEConfig
from turnout.train.data import Document, prepare, windows

OPTIONS = {
    "TopK": {"capacity_factor": 1.0, "priority": "position"},
    "ExpertChoice": {},
    "LossFree": {},
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    texts = [Document(str(n), f"text number {n} and so on " + "word " * (n % 7)) for n in range(24)]
    return prepare({"d": texts}, tmp_path_factory.mktemp("t"), vocab_size=265, held_out=0.5, quiet=True)


def model(router: str) -> LM:
    moe = MoEConfig(4, 2, 16, router=router, router_options=OPTIONS[router])
    return LM(LMConfig(vocab_size=265, width=16, layers=2, heads=2, max_seq=96, init_std=0.4, moe=moe)).eval()


@pytest.mark.parametrize("router", OPTIONS)
def test_the_batch_and_its_padding_do_not_matter(router: str, tokens) -> None:
    lm = model(router)

    def plain(id_BS):  # nothing tells that it could be told of padding
        return lm(id_BS)

    def left(split):
        for batch in windows(split, batch=5, seq=96):
            shift = [int(row.sum()) for row in batch.real_BS]
            rolled = [[row.roll(-n) for row, n in zip(part, shift, strict=True)] for part in
                      (batch.id_BS, batch.target_BS, batch.real_BS)]  # fmt: skip
            parts = dict(zip(("id_BS", "target_BS", "real_BS"), map(torch.stack, rolled), strict=True))
            yield types.SimpleNamespace(domain_B=batch.domain_B, **parts)

    def measure(forward, batches):
        found = bits_per_byte(forward, batches, tokens.byte_length_V, domains=tokens.domains)
        return found.bits_per_byte, found.load_LE, found.dropped

    split = tokens.held_out
    want = measure(lm, windows(split, batch=1, seq=96))
    many = [measure(lm, windows(split, batch=batch, seq=seq)) for batch, seq in ((4, 96), (30, 80))]
    many += [measure(nn.DataParallel(lm), windows(split, batch=30, seq=96)), measure(lm, left(split))]
    if router != "ExpertChoice":  # of a plain function it cannot be seen that tokens compete
        many.append(measure(plain, windows(split, batch=7, seq=90)))
    for found in many:
        assert found[0] == pytest.approx(want[0], rel=1e-5) and found[1:] == want[1:]


def test_rows_without_a_token_are_left_out(tokens) -> None:
    lm, id_BS = model("TopK"), torch.randint(1, 265, (3, 6), generator=torch.Generator().manual_seed(0))
    target_BS = id_BS.roll(-1, 1)
    target_BS[:, 5], target_BS[1] = -100, -100
    batch = types.SimpleNamespace(id_BS=id_BS, target_BS=target_BS, domain_B=None)
    found = bits_per_byte(lm, [batch], tokens.byte_length_V)
    assert found.tokens == 10 and sum(found.load_LE[0]) + round(found.dropped * 40) // 2 == 20


def test_bytes_of_a_tokenizer_from_elsewhere(tmp_path) -> None:
    """A model that knows nothing needs log2 V bits for each token; the bytes are counted by hand."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = ["naïve café 猫 🙂\n", "<|im_end|> déjà  vu\u00a0\r\n", "plain words, plain words"]
    tokenizer.train_from_iterator(texts * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    documents = [Document(str(n), text) for n, text in enumerate(texts)]
    tokens = prepare({"d": documents}, tmp_path / "t", tokenizer=tmp_path, held_out=1.0, quiet=True)
    tokenizer.encode_special_tokens = True
    count = sum(len(tokenizer.encode(text).ids) for text in texts)

    def uniform(id_BS):
        return types.SimpleNamespace(logits_BSV=torch.zeros(*id_BS.shape, tokens.vocab_size), routings=())

    found = bits_per_byte(uniform, windows(tokens.held_out, batch=2, seq=7), tokens.byte_length_V)
    size = sum(len(text.encode()) for text in texts)
    assert (found.bytes, found.tokens) == (size, count)
    assert found.bits_per_byte == pytest.approx(count * math.log2(tokens.vocab_size) / size)
