"""Generation: prompts in any form, ends, stops, streams, and that a row is what it is alone."""

import dataclasses
from typing import Any

import pytest
import torch
from test_pieces import byte_level
from torch import nn
from variants import make

import turnout
from turnout.errors import CheckpointError, ShapeError, UsageError
from turnout.models import LM, Generated, LMConfig, MoEConfig, Piece

TEXTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9]]


def generate(prompts: Any, lm: LM | None = None, tokens: int = 8, **settings: Any) -> Generated:
    return turnout.generate(make("moe") if lm is None else lm, prompts, tokens=tokens, **settings)


def greedy(prompts: Any, **settings: Any) -> Generated:
    return generate(prompts, temperature=0, **settings)


def test_prompts_come_in_many_forms() -> None:
    made = greedy(TEXTS, pad=7)
    assert made.start == 7 and made.id_BT.shape == (3, 15) and made.why_B == ("tokens",) * 3
    assert made.id_BT[1, :7].tolist() == [7] * 5 + [6, 5] and made.length_B.tolist() == [8] * 3
    left_BS, length_B = made.id_BT[:, :7], torch.tensor([7, 2, 4])
    right_BS = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in TEXTS], batch_first=True)
    real_BS = torch.arange(7) >= 7 - length_B[:, None]
    others = [
        greedy([torch.tensor(text) for text in TEXTS]),
        greedy(tuple(map(tuple, TEXTS))),
        greedy(left_BS, attention_mask=real_BS),
        greedy(left_BS.int(), attention_mask=real_BS.float()),
        greedy(right_BS, attention_mask=length_B),
        greedy(nn.functional.pad(left_BS, (20, 0)), attention_mask=nn.functional.pad(real_BS, (20, 0))),
    ]
    for other in others:
        assert other.rows == made.rows
    assert others[4].id_BT[:, 7:].tolist() == made.id_BT[:, 7:].tolist()
    assert others[4].id_BT[1, :7].tolist() == [0] * 5 + [6, 5]
    assert others[5].start == 27
    for row, text in enumerate(TEXTS):
        assert greedy([text]).rows[0] == made.rows[row]
        assert greedy(torch.tensor([text])).id_BT[0, -8:].tolist() == made.rows[row]


def test_padding_at_the_front_of_all_rows_takes_no_room() -> None:
    """As wide as the model's longest sequence, as a tokenizer pads to it."""
    lm = make("moe")
    id_BS = torch.zeros(1, lm.config.max_seq, dtype=torch.long)
    id_BS[0, -3:] = torch.tensor([3, 1, 4])
    assert greedy(id_BS, lm=lm, attention_mask=torch.arange(len(id_BS[0]))[None] >= len(id_BS[0]) - 3).rows == (
        greedy([[3, 1, 4]], lm=lm).rows
    )


def test_rows_end_at_their_own_ends() -> None:
    plain = greedy(TEXTS).rows
    ends = [plain[0][2], plain[2][5]]
    made = greedy(TEXTS, eos=ends, pad=60)
    for row, full in zip(made.rows, plain, strict=True):
        first = min((full.index(end) for end in ends if end in full), default=len(full) - 1)
        assert row == full[: first + 1]
    width = max(map(len, made.rows))
    assert made.id_BT.shape == (3, 7 + width) and made.length_B.tolist() == list(map(len, made.rows))
    for row, id_T in zip(made.rows, made.id_BT, strict=True):
        assert id_T[7 + len(row) :].tolist() == [60] * (width - len(row))
    assert made.why_B == tuple("eos" if row[-1] in ends else "tokens" for row in made.rows) and "eos" in made.why_B
    assert greedy(TEXTS, eos=ends[0]).rows == greedy(TEXTS, eos=[ends[0]]).rows
    assert int(greedy(TEXTS, eos=ends).id_BT[1, 0]) == ends[0]  # the padding when nothing else is asked for
    assert generate(TEXTS, tokens=0).why_B == ("tokens",) * 3


@pytest.mark.parametrize("name", ["moe", "dense", "latent", "window"])
def test_a_row_is_drawn_as_alone(name: str) -> None:
    lm = make(name)
    ask = {"lm": lm, "seed": 11, "temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
    together = generate([*TEXTS, TEXTS[0]], **ask)
    ends = [together.rows[0][3]]
    for row, text in enumerate(TEXTS):
        assert generate([text], **ask).rows[0] == together.rows[row], f"seed 11, row {row}"
    assert together.rows[3] != together.rows[0]  # a second copy of a prompt is a second sample
    assert generate([TEXTS[0]] * 2, **ask).rows[1] == together.rows[3]
    shorter = generate([*TEXTS, TEXTS[0]], eos=ends, **ask)
    for row, full in zip(shorter.rows, together.rows, strict=True):  # whoever else has ended
        assert row == (full[: full.index(ends[0]) + 1] if ends[0] in full else full)
    assert generate(TEXTS, lm=lm, seed=1).rows == generate(TEXTS, lm=lm, seed=1).rows != generate(TEXTS, seed=2).rows


def test_what_was_drawn_is_penalised_and_tokens_are_biased() -> None:
    plain = greedy(TEXTS).rows
    often = [max(row, key=row.count) for row in plain]
    rows = greedy(TEXTS, frequency_penalty=1e6).rows
    assert all(len(set(row)) == len(row) for row in rows), "the prompt does not count, and nothing comes twice"
    assert [row[0] for row in rows] == [row[0] for row in plain]
    for text, row in zip(TEXTS, rows, strict=True):
        assert greedy([text], frequency_penalty=1e6).rows[0] == row, "counted by itself"
    assert greedy(TEXTS, logit_bias={7: 1e6}).rows == ([7] * len(plain[0]),) * 3
    assert all(often[0] not in row for row in greedy(TEXTS, logit_bias={often[0]: -1e6}).rows)
    assert greedy(TEXTS, logit_bias={7: 1e6}, presence_penalty=2e6).rows[0].count(7) == 1
    with pytest.raises(UsageError, match=r"logit_bias must be of tokens from 0 to .*got the token 100000"):
        greedy(TEXTS, logit_bias={100_000: 1.0})


def test_a_generator_draws_for_the_batch() -> None:
    def drawn(seed: int) -> tuple[list[int], ...]:
        return generate(TEXTS, generator=torch.Generator().manual_seed(seed)).rows

    assert drawn(0) == drawn(0) != drawn(1)
    torch.manual_seed(5)
    first = generate(TEXTS).rows
    assert generate(TEXTS).rows != first
    torch.manual_seed(5)
    assert generate(TEXTS).rows == first


@torch.no_grad()
def test_logprobs_are_the_models_own() -> None:
    lm, ends = make("moe"), [greedy(TEXTS).rows[1][3]]
    made = generate(TEXTS, lm=lm, temperature=0.5, top_k=3, seed=2, logprobs=True, eos=ends, repetition_penalty=1.3)
    assert made.logprob_BN is not None and made.logprob_BN.shape == made.id_BT[:, 7:].shape
    for text, row, logprob_N in zip(TEXTS, made.rows, made.logprob_BN, strict=True):
        whole = torch.tensor([*text, *row])
        want = lm(whole[None, :-1]).logits_BSV[0, len(text) - 1 :].log_softmax(1).gather(1, whole[len(text) :, None])
        torch.testing.assert_close(logprob_N[: len(row)], want[:, 0], atol=1e-5, rtol=1e-5)
        assert not logprob_N[len(row) :].any()
    assert generate(TEXTS).logprob_BN is None


def test_the_mode_of_the_model_comes_back() -> None:
    lm = make("moe").train()
    want = greedy(TEXTS, lm=lm).rows
    assert lm.training and greedy(TEXTS, lm=torch.compile(lm, backend="eager")).rows == want

    def fails(piece: Piece) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        greedy(TEXTS, lm=lm, stream=fails)
    assert lm.training


def speaking() -> LM:
    """A model of bytes."""
    moe = MoEConfig(num_experts=4, top_k=2, hidden=8)
    return LM(LMConfig(vocab_size=300, width=16, layers=2, heads=2, max_seq=64, moe=moe, init_std=0.4), seed=1).eval()


def test_text_stops_and_streams() -> None:
    lm, tokenizer = speaking(), byte_level()
    texts = [tokenizer.encode(text).ids for text in ("the cat", "a", "dogs and")]
    ask = {"lm": lm, "tokens": 24, "tokenizer": tokenizer, "seed": 4, "temperature": 1.5}
    plain = generate(texts, **ask)
    assert plain.text_B is not None
    for text, row, said in zip(texts, plain.rows, plain.text_B, strict=True):
        assert tokenizer.decode(text) + said == tokenizer.decode([*text, *row])
    stop = plain.text_B[0][7:10]
    pieces: list[Piece] = []
    made = generate(texts, **ask, stop=[stop, "no such text"], stream=pieces.append)
    assert made.text_B is not None and made.why_B[0] == "stop"
    at = plain.text_B[0].index(stop)
    assert made.text_B[0] == plain.text_B[0][:at]
    kept = generate(texts, **ask, stop=stop, keep_stop=True).text_B
    assert kept is not None and kept[0] == plain.text_B[0][: at + len(stop)]
    assert made.rows[0] == plain.rows[0][: len(made.rows[0])]
    assert stop not in tokenizer.decode(made.rows[0][:-1]) and stop in tokenizer.decode(made.rows[0])
    assert [piece.step for piece in pieces] == list(range(max(map(len, made.rows))))
    for row, said in enumerate(made.text_B):
        assert "".join(piece.text_B[row] for piece in pieces) == said
        assert [piece.id_B[row] for piece in pieces if piece.id_B[row] is not None] == made.rows[row]
        assert pieces[-1].why_B[row] == made.why_B[row]
        assert pieces[0].why_B[row] is None
    silent: list[Piece] = []
    generate(texts, lm=lm, tokens=3, stream=silent.append)
    assert silent[0].text_B == ("", "", "") and generate(texts, lm=lm, tokens=3).text_B is None


def test_the_end_says_why() -> None:
    """An end at the same token as a stop, and both at the last token."""
    lm, tokenizer = speaking(), byte_level()
    texts = [tokenizer.encode("the cat").ids]
    plain = greedy(texts, lm=lm, tokens=5, tokenizer=tokenizer)
    assert plain.text_B is not None
    last = tokenizer.decode(plain.rows[0][-1:])
    if plain.text_B[0].index(last) == len(plain.text_B[0]) - len(last):
        assert greedy(texts, lm=lm, tokens=5, tokenizer=tokenizer, stop=last).why_B == ("stop",)
    ended = greedy(texts, lm=lm, tokens=5, eos=plain.rows[0][-1], tokenizer=tokenizer)
    assert ended.why_B == ("eos",)
    assert ended.text_B == (tokenizer.decode(ended.rows[0][:-1]),)  # what it ended with is none of it


def test_the_model_says_how_texts_end(tmp_path) -> None:
    lm = make("moe")
    want = greedy(TEXTS).rows
    lm.origin = tmp_path
    assert greedy(TEXTS, lm=lm).rows == want
    (tmp_path / "config.json").write_text(f'{{"eos_token_id": {want[0][4]}}}')
    assert greedy(TEXTS, lm=lm).why_B[0] == "eos"
    assert greedy(TEXTS, lm=lm, eos=None).rows == want == greedy(TEXTS, lm=lm, eos=[]).rows
    assert lm.generate(torch.tensor(TEXTS[:1]), tokens=8, temperature=0).shape == (1, 15)
    assert lm.generate(TEXTS[:1], tokens=8, temperature=0, eos="model").shape[1] < 15
    (tmp_path / "generation_config.json").write_text("{}")  # which transformers then takes alone
    assert greedy(TEXTS, lm=lm).rows == want
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(CheckpointError, match=r"eos_token_id must be a token id.*generation_config\.json; got 'end'"):
        greedy(TEXTS, lm=lm)


def broken(lm: LM) -> LM:
    with torch.no_grad():
        lm.embedding[4] = torch.nan
    return lm


MISTAKES: list[tuple[Any, dict[str, Any], type, str]] = [
    ([], {}, ShapeError, r"be a list of prompts.*got \[\]"),
    ([[3], []], {}, ShapeError, "every prompt must have at least one token .*got no token in prompt 1.*opens a text"),
    (torch.zeros(1, 0, dtype=torch.long), {}, ShapeError, "pass a prompt of a token or more"),
    (torch.zeros(0, 4, dtype=torch.long), {}, ShapeError, "B and S > 0"),
    (torch.ones(1, 4), {}, ShapeError, "be whole numbers.*torch.float32.*as integers"),
    (torch.tensor([1, 2]), {}, ShapeError, r"pass id\[None\]"),
    (torch.ones(1, 2), {}, ShapeError, "whole numbers"),
    ([1, 2, 3], {}, ShapeError, r"got int as prompt 0.*\[ids\] for one prompt"),
    ("the cat", {}, ShapeError, r"'the cat'.*tokenizer\.encode"),
    (["the cat"], {}, ShapeError, r"got str as prompt 0.*tokenizer\.encode"),
    ([[1, 2.5]], {}, ShapeError, "got list as prompt 0"),
    ([[True, False]], {}, ShapeError, "got list as prompt 0"),
    ([[[1], [2]]], {}, ShapeError, "got list as prompt 0"),
    ([[1], [1, 61]], {}, UsageError, "token ids must be from 0 to 60 .*got 0 to 61"),
    ([[-1]], {}, UsageError, "got -1 to -1"),
    ([[1] * 40], {"tokens": 9}, ShapeError, r"max_seq=48.*got 40 tokens in the prompt, and tokens=9.*pass tokens=8"),
    ([[1], [1] * 60], {"tokens": 1}, ShapeError, "60 tokens in prompt 1.*shorten it to at most 47 tokens"),
    (torch.ones(2, 3, dtype=torch.long), {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, UsageError,
     "end each row with a token.*padding after a prompt.*on the left"),
    (torch.ones(2, 3, dtype=torch.long), {"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, ShapeError,
     "got no token in prompt 0"),
    (torch.ones(2, 3, dtype=torch.long), {"attention_mask": torch.tensor([0, 3])}, ShapeError, "no token in prompt 0"),
    (torch.ones(2, 3, dtype=torch.long), {"attention_mask": torch.tensor([4, 3])}, UsageError, "attention_mask"),
    ([[1]], {"attention_mask": torch.ones(1, 1)}, UsageError, "a list says how long each prompt is"),
    ([[1]], {"tokens": -1}, UsageError, "tokens must be a whole number of at least 0"),
    ([[1]], {"tokens": 2.0}, UsageError, "tokens"),
    ([[1]], {"temperature": -1}, UsageError, "temperature"),
    ([[1]], {"top_p": 7}, UsageError, "top_p"),
    ([[1]], {"eos": 61}, UsageError, "eos must be token ids from 0 to 60, 'model' or None .*got 61"),
    ([[1]], {"eos": ["</s>"]}, UsageError, "got </s>"),
    ([[1]], {"eos": True}, UsageError, "eos"),
    ([[1]], {"pad": 61}, UsageError, "pad must be a token id from 0 to 60"),
    ([[1]], {"seed": 1.5}, UsageError, "seed must be a whole number"),
    ([[1]], {"seed": 1, "generator": torch.Generator()}, UsageError, "without a generator"),
    ([[1]], {"stop": "x"}, UsageError, "stop must come with the tokenizer.*pass tokenizer="),
    ([[1]], {"stop": ["x", ""], "tokenizer": byte_level()}, UsageError, "texts of at least one character"),
    ([[1]], {"stop": [3], "tokenizer": byte_level()}, UsageError, "stop must be texts"),
    ([[1]], {"tokenizer": "gpt2"}, UsageError, r"tokenizer must have decode\(ids\).*got a str"),
    ([[1]], {"stream": "yes"}, UsageError, "stream must be a function of a Piece"),
]  # fmt: skip


@pytest.mark.parametrize(("prompts", "settings", "kind", "said"), MISTAKES)
def test_mistakes_are_told_before_any_work(prompts: Any, settings: dict, kind: type, said: str) -> None:
    lm = make("moe")
    lm.forward = lm.hidden = None  # type: ignore[assignment] - nothing is computed
    with pytest.raises(kind, match=said) as caught:
        generate(prompts, lm=lm, **settings)
    assert "turnout.generate" in str(caught.value) or "in LM" in str(caught.value)
    assert "Nearest fix: " in str(caught.value)


def test_scores_that_are_no_numbers_are_told() -> None:
    with pytest.raises(UsageError, match=r"scores must be finite numbers .*no number at new token 0"):
        generate([[1, 4]], lm=broken(make("dense")))


def test_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        greedy(TEXTS).start = 3  # type: ignore[misc] - it is frozen, which is what is tested
