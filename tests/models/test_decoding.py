"""The decoder: prompts and steps give what the whole text gives, each row as it does alone."""

import dataclasses

import pytest
import torch
from variants import TINY, every_variant, ids, make

from turnout.errors import ShapeError, UsageError
from turnout.models import LM
from turnout.models.decoding import Decoder

LENGTHS = (9, 1, 14, 6)


def whole(lm, id_BS: torch.Tensor, lengths: tuple[int, ...], steps: int) -> torch.Tensor:
    """(B, steps + 1, V) what each row's own text gives after its prompt, and after each further token."""
    found = []
    for row, length in zip(id_BS, lengths, strict=True):
        logits_SV = lm(torch.cat((row[:length], row[-steps:]))[None]).logits_BSV[0]
        found.append(logits_SV[-steps - 1 :])
    return torch.stack(found)


def longrope() -> LM:
    """A model whose texts of more than 16 tokens have other frequencies."""
    rope = {"rope_type": "longrope", "short_factor": (1.0, 1.2, 1.5, 2.0), "long_factor": (4.0, 5.0, 6.0, 7.0)}
    rope |= {"attention_factor": 1.2, "original_max_position_embeddings": 16}
    return LM(dataclasses.replace(TINY, rope_scaling=rope, init_std=0.2)).eval()


@every_variant
@torch.no_grad()
def test_steps_are_the_whole_text(name: str) -> None:
    lm, steps = make(name), 24
    id_BS = ids(len(LENGTHS), max(LENGTHS) + 2 + steps)
    decoder = Decoder(lm, batch=len(LENGTHS), room=16)
    logits = [decoder.prefill(id_BS[:, : max(LENGTHS) + 2], torch.tensor(LENGTHS)).clone()]
    logits += [decoder.step(id_B).clone() for id_B in id_BS[:, -steps:].T]
    torch.testing.assert_close(torch.stack(logits, 1), whole(lm, id_BS, LENGTHS, steps), rtol=0, atol=2e-5)
    assert decoder.length_B.tolist() == [length + steps for length in LENGTHS]


@every_variant
@torch.no_grad()
def test_rows_that_are_kept_go_on(name: str) -> None:
    lm, id_BS, kept = make(name), ids(4, 30), torch.tensor([2, 0])
    decoder = Decoder(lm, batch=4, room=8)
    decoder.prefill(id_BS[:, :16], torch.tensor(LENGTHS))
    decoder.step(id_BS[:, 16])
    decoder.keep(kept)
    got = decoder.step(id_BS[kept, 17]).clone()
    want = torch.cat([lm(torch.cat((id_BS[r, : LENGTHS[r]], id_BS[r, 16:18]))[None]).logits_BSV[:, -1] for r in kept])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    again = decoder.prefill(id_BS[:2, :5]).clone()  # a decoder may begin anew
    torch.testing.assert_close(again, lm(id_BS[:2, :5]).logits_BSV[:, -1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [[2, 0], [1, 3, 0, 2], [3, 2, 1]])
@torch.no_grad()
def test_rows_on_both_sides_of_longrope_go_on_in_any_order(
    rows: list[int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setenv("TURNOUT_COMPILED", "0")
    lm, id_BS, kept = longrope(), ids(4, 20), torch.tensor(rows)
    for lengths in ([9, 5, 4, 7], [9, 17, 4, 14], [16, 15, 14, 14]):
        decoder = Decoder(lm, batch=4, room=8)
        decoder.prefill(id_BS[:, :17], torch.tensor(lengths))
        decoder.keep(kept)
        for end in (18, 19, 20):
            got = decoder.step(id_BS[kept, end - 1])
            want = [lm(torch.cat((id_BS[r, : lengths[r]], id_BS[r, 17:end]))[None]).logits_BSV[0, -1] for r in rows]
            torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=3e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make_lm", [longrope, lambda: make("moe")])
@torch.no_grad()
def test_what_is_refused_changes_nothing(make_lm, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setenv("TURNOUT_COMPILED", "0")
    lm, id_BS, lengths = make_lm(), ids(3, 20), torch.tensor([17, 16, 9])  # beyond the border, on it, before it
    wrong = torch.tensor([1, 1, TINY.vocab_size])
    decoder, other = Decoder(lm, batch=3, room=8), Decoder(lm, batch=3, room=8)
    for one in (decoder, other):
        one.prefill(id_BS[:, :17], lengths)
    for end in (17, 18):
        for bad in (wrong, -wrong, wrong.float()):
            with pytest.raises((UsageError, ShapeError), match=r"be from 0 to|be whole numbers"):
                decoder.step(bad)
        with pytest.raises(UsageError, match="be from 0 to"):
            decoder.prefill(wrong[:, None].expand(3, 17))
        got, want = decoder.step(id_BS[:, end]), other.step(id_BS[:, end])
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert decoder.length_B.tolist() == other.length_B.tolist()


def test_bad_calls_are_refused() -> None:
    lm, id_BS = make("moe"), ids(2, 10)
    decoder = Decoder(lm, batch=2, room=4)
    with pytest.raises(UsageError, match="step must follow prefill"):
        decoder.step(id_BS[:, 0])
    with pytest.raises(ShapeError, match="a row for each of the batch"):
        decoder.prefill(ids(3, 10))
    for lengths in ([0, 3], [3, 11], [3]):
        with pytest.raises(UsageError, match=r"lengths must be 2 whole numbers from 1 to 10"):
            decoder.prefill(id_BS, torch.tensor(lengths))
    with pytest.raises(ShapeError, match=f"max_seq={TINY.max_seq}"):
        decoder.prefill(ids(2, TINY.max_seq + 1))
    decoder.prefill(ids(2, TINY.max_seq))
    with pytest.raises(ShapeError, match=f"end within max_seq={TINY.max_seq}"):
        decoder.step(id_BS[:, 0])
    decoder.prefill(id_BS)
    with pytest.raises(ShapeError, match="a token for each row"):
        decoder.step(id_BS[:1, 0])
    with pytest.raises(UsageError, match=f"be from 0 to {TINY.vocab_size - 1}"):
        decoder.step(torch.tensor([0, TINY.vocab_size]))
    for rows in ([], [0, 0], [2]):
        with pytest.raises(UsageError, match="different rows from 0 to 1"):
            decoder.keep(torch.tensor(rows, dtype=torch.long))
    for batch, room in ((0, 4), (1, 0)):
        with pytest.raises(UsageError, match="be at least 1"):
            Decoder(lm, batch=batch, room=room)
    with pytest.raises(UsageError, match="be evaluated"):
        Decoder(lm.train(), batch=1, room=1)
