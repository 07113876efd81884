"""LongRoPE of Phi-3: a batch of longer texts has other frequencies, as transformers has it; no cache mixes them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_huggingface import LONG, theirs, transformers

import turnout
from turnout.errors import CheckpointError, UsageError
from turnout.models import LM, Cache, LMConfig, checkpoint

BEFORE = 16
OURS = LMConfig(
    vocab_size=67,
    width=32,
    layers=2,
    heads=4,
    max_seq=64,
    rope_scaling={
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.5, 2.0],
        "long_factor": [1.0, 2.5, 7.0, 8.0],
        "original_max_position_embeddings": BEFORE,
        "attention_factor": 1.3,
    },
)


@pytest.fixture
def both(tmp_path: Path) -> tuple[Any, LM, Path]:
    hf = theirs("phi3 long")
    hf.save_pretrained(tmp_path / "a")
    return hf, checkpoint.from_hf(tmp_path / "a"), tmp_path / "a"


@pytest.fixture(scope="module")
def wild() -> tuple[Any, LM]:
    """Weights so large that other angles mean other tokens."""
    hf = theirs("phi3 long")
    with torch.no_grad():
        for tensor in hf.parameters():
            if tensor.ndim == 2:
                tensor.mul_(4)
    return hf, checkpoint.from_live(hf)


def change(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | keys).items() if v is not ...}))


@torch.no_grad()
def test_the_length_of_the_batch_decides(both: tuple[Any, LM, Path]) -> None:
    hf, lm, _ = both
    id_BS = torch.randint(67, (2, 40), generator=torch.Generator().manual_seed(1))
    for length in (1, BEFORE, BEFORE + 1, 40):
        got, want = lm(id_BS[:, :length]).logits_BSV, hf(id_BS[:, :length]).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert not torch.allclose(lm(id_BS[:, :BEFORE]).logits_BSV, lm(id_BS).logits_BSV[:, :BEFORE], atol=1e-3)


def alone(hf: Any, prompts: list[torch.Tensor], count: int) -> list[list[int]]:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count}
    return [hf.generate(prompt[None], **options)[0, len(prompt) :].tolist() for prompt in prompts]


@pytest.mark.parametrize("lengths", [(12, 12), (16, 3), (30, 1, 16, 15)])
@pytest.mark.parametrize("fallback", [False, True])
def test_generation_across_the_change(lengths: tuple[int, ...], fallback: bool, wild: tuple[Any, LM]) -> None:
    """transformers throws the cache away there; each row goes on as it does there alone, whatever is beside it."""
    hf, lm = wild
    id_BS = torch.randint(3, 67, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    prompts = [id_S[:length] for id_S, length in zip(id_BS, lengths, strict=True)]
    want = alone(hf, prompts, 20)
    if not fallback:
        assert list(turnout.generate(lm, prompts, tokens=20, temperature=0, eos=None).rows) == want
        return
    hook = hf.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hook"):
        made = turnout.generate(hf, prompts, tokens=20, temperature=0, eos=None, fallback=True)
    hook.remove()
    assert list(made.rows) == want


def test_a_row_that_ends_changes_nothing_for_the_others(wild: tuple[Any, LM]) -> None:
    """Whose frequencies it set, where one length stood for all."""
    hf, lm = wild
    id_BS = torch.randint(3, 67, (2, 24), generator=torch.Generator().manual_seed(4))
    prompts = [id_BS[0], id_BS[1, :5]]
    want = alone(hf, prompts, 30)
    end = next(token for token in want[0] if token not in want[1])
    made = turnout.generate(lm, prompts, tokens=30, temperature=0, eos=end)
    assert made.why_B == ("eos", "tokens") and made.rows[1] == want[1]


@torch.no_grad()
def test_padded_batches_are_as_long_as_their_longest_text(both: tuple[Any, LM, Path]) -> None:
    hf, lm, _ = both
    for lengths in ((20, 9), (16, 9), (17, 9)):
        id_BS = torch.randint(3, 67, (2, 20), generator=torch.Generator().manual_seed(3))
        mask_BS = (torch.arange(20) >= 20 - torch.tensor(lengths)[:, None]).long()
        places_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
        want = hf(id_BS, attention_mask=mask_BS, position_ids=places_BS).logits
        got, at = lm(id_BS, attention_mask=mask_BS).logits_BSV, mask_BS.bool()
        torch.testing.assert_close(got[at], want[at], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_cache_does_not_outlive_its_frequencies() -> None:
    lm, id_BS = LM(OURS).eval(), torch.arange(40)[None]
    cache = Cache()
    for piece in id_BS[:, :BEFORE].split((10, 6), 1):
        lm(piece, cache=cache)
    with pytest.raises(UsageError, match="start a new Cache with all the tokens"):
        lm(id_BS[:, BEFORE : BEFORE + 1], cache=cache)
    cache = Cache()
    parts = [lm(piece, cache=cache).logits_BSV for piece in id_BS.split((BEFORE + 1, 3, 20), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), lm(id_BS).logits_BSV, rtol=0, atol=1e-5)


@torch.no_grad()
def test_its_frequencies_stay_in_fp32_and_go_along() -> None:
    lm = LM(OURS).to(torch.bfloat16)
    assert lm.rope.long_P is not None and lm.rope.long_P.dtype == lm.rope.frequency_P.dtype == torch.float32
    assert torch.equal(lm.rope.long_P, LM(OURS).rope.long_P) and "rope.long_P" not in lm.state_dict()


@pytest.mark.parametrize(
    ("told", "magnitude"),
    [
        ({}, math.sqrt(1 + math.log(4) / math.log(16))),
        ({"factor": 32.0}, math.sqrt(1 + math.log(32) / math.log(16))),
        ({"factor": 0.5}, 1.0),
        ({"factor": 32.0, "attention_factor": 1.7}, 1.7),
        # The key beside the scaling wins over the one in it.
        ({"original_max_position_embeddings": 8}, math.sqrt(1 + math.log(4) / math.log(16))),
    ],
)
@pytest.mark.parametrize("called", ["longrope", "su"])
@torch.no_grad()
def test_what_its_keys_mean(told: dict, magnitude: float, called: str, both: tuple[Any, LM, Path]) -> None:
    hf, _, folder = both
    names = ("short_factor", "long_factor")
    scaling = {"type": called} | {name: LONG[name] for name in names} | told
    old = {"rope_parameters": ..., "rope_theta": 1e4, "partial_rotary_factor": 0.75, "rope_scaling": scaling}
    change(folder, **old)  # as transformers 4 wrote it
    lm = checkpoint.from_hf(folder)
    assert lm.config.rope_scaling is not None
    assert lm.config.rope_scaling["attention_factor"] == pytest.approx(magnitude, rel=1e-12)
    change(folder, rope_scaling=scaling | {"type": "longrope"})  # transformers 5 fails over the first name, "su"
    hf = transformers().AutoModelForCausalLM.from_pretrained(folder).eval()
    id_BS = torch.randint(67, (2, 40), generator=torch.Generator().manual_seed(1))
    for length in (BEFORE, 40):
        got, want = lm(id_BS[:, :length]).logits_BSV, hf(id_BS[:, :length]).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    # A model of other sizes is described anew: with three keys where they say it all.
    wider = LM(dataclasses.replace(lm.config, layers=1))
    checkpoint.to_hf(wider, folder.parent / "b", like=folder)
    written = json.loads((folder.parent / "b" / "config.json").read_text())["rope_scaling"]
    extra = {"attention_factor"} if "factor" in told else set()
    assert set(written) == {"type", *names, *extra}
    assert checkpoint.from_hf(folder.parent / "b").config.rope_scaling == lm.config.rope_scaling


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"short_factor": [1.0, 1.1]}, r"rope_scaling\.short_factor must be a number above 0 for each of the 3 pairs"),
        ({"long_factor": [1.0, 1.1, 0.0]}, r"rope_scaling\.long_factor"),
        ({"long_factor": None}, r"rope_scaling\.long_factor"),
        ({"long_factor": [1.0, "a", 2.0]}, "long_factor"),
        ({"attention_factor": -1.0}, "attention_factor"),
        ({"rope_type": "linear", "factor": 2.0}, "transformers takes 'longrope' alone in a Phi-3"),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict, match: str, both: tuple[Any, LM, Path]) -> None:
    change(both[2], rope_parameters=LONG | keys)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.from_hf(both[2])


def test_no_other_architecture_has_it(tmp_path: Path) -> None:
    """Theirs go on with keys that no longer hold when they generate."""
    with pytest.raises(UsageError, match="'longrope'"):
        checkpoint.to_hf(LM(OURS), tmp_path / "a", architecture="LlamaForCausalLM")
