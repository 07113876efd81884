"""Padded batches, judged by transformers: the same logits at every token, and the same texts generated."""

from pathlib import Path

import pytest
import torch
from test_huggingface import theirs

from turnout.models import LM, Cache, checkpoint

CASES = ["llama", "mistral windowed", "mixtral windowed", "qwen3_moe", "deepseek_v3 yarn", "gpt_oss"]
CASES += ["gemma", "gemma2", "gemma3", "gpt2"]
CASES += ["granite", "smollm3 windowed", "smollm3 other windows", "phi3 windowed, partly turned", "olmo2"]
LENGTHS = (4, 17, 11)


def both(name: str, folder: Path) -> tuple[torch.nn.Module, LM]:
    hf = theirs(name)
    hf.save_pretrained(folder)
    return hf, checkpoint.from_hf(folder)


def padded(vocab_size: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    id_BS = torch.randint(3, vocab_size, (3, 19), generator=torch.Generator().manual_seed(0))
    at_S, length_B = torch.arange(19), torch.tensor(LENGTHS)
    mask_BS = (at_S < length_B[:, None]) if side == "right" else (at_S >= 19 - length_B[:, None])
    return id_BS, mask_BS.long()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_of_padded_batches(name: str, tmp_path: Path) -> None:
    hf, lm = both(name, tmp_path)
    for side in ("left", "right"):
        id_BS, mask_BS = padded(lm.config.vocab_size, side)
        places_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)  # as generate passes them
        at = mask_BS.bool()
        got = lm(id_BS, attention_mask=mask_BS).logits_BSV
        # Untold, GPT-2's learned positions would begin at the padding.
        untold = [] if lm.config.learned_positions and side == "left" else [{}]
        for told in (*untold, {"position_ids": places_BS}):
            want = hf(id_BS, attention_mask=mask_BS, **told).logits
            torch.testing.assert_close(got[at], want[at], rtol=0, atol=1e-4)
        cache = Cache()
        pieces = zip(id_BS.split((9, 6, 4), 1), mask_BS.split((9, 6, 4), 1), strict=True)
        got = torch.cat([lm(ids, attention_mask=mask, cache=cache).logits_BSV for ids, mask in pieces], 1)
        torch.testing.assert_close(got[at], want[at], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_generation_from_padded_prompts(name: str, tmp_path: Path) -> None:
    hf, lm = both(name, tmp_path)
    id_BS, mask_BS = padded(lm.config.vocab_size, "left")
    want = hf.generate(
        id_BS, attention_mask=mask_BS, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert lm.generate(id_BS, tokens=9, temperature=0, attention_mask=mask_BS).tolist() == want.tolist()
