"""Text with padding is for reshapes what the text alone is."""

import pytest
import torch

from turnout.errors import DataError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.reshape import drop_experts, fisher_information, merge_experts
from turnout.reshape.calibrate import checked

MOE = MoEConfig(4, 2, 8)
CONFIG = LMConfig(32, width=8, layers=2, heads=2, max_seq=16, init_std=0.4, moe=MOE)


def batch() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, 32, (length,), generator=generator) for length in (5, 5, 9, 2)]
    id_BS, mask_BS = torch.zeros(5, 9, dtype=torch.long), torch.zeros(5, 9, dtype=torch.long)
    for row, text in enumerate(texts):
        at = slice(9 - len(text), None) if row % 2 else slice(len(text))
        id_BS[row, at], mask_BS[row, at] = text, 1
    return texts, {"input_ids": id_BS, "attention_mask": mask_BS}


def test_padding_is_left_out() -> None:
    texts, padded = batch()
    found = checked([padded], LM(CONFIG), "here")
    assert [part.shape for part in found] == [(2, 5), (1, 9), (1, 2)]
    assert torch.equal(torch.cat([part.flatten() for part in found]), torch.cat(texts))
    with pytest.raises(DataError, match="attention_mask"):
        checked([{"input_ids": padded["input_ids"]}], LM(CONFIG), "here")


@pytest.mark.parametrize("reshape", [drop_experts, merge_experts])
def test_experts_are_scored_on_tokens(reshape) -> None:
    lm, (texts, padded) = LM(CONFIG).eval(), batch()
    _, alone = reshape(lm, keep=3, batches=[text[None] for text in texts])
    _, report = reshape(lm, keep=3, batches=[padded])
    for key in ("scores", "kept"):
        if key in alone.values:
            for layer, found in alone[key].items():
                torch.testing.assert_close(torch.tensor(report[key][layer]), torch.tensor(found), atol=1e-6, rtol=1e-5)
    assert ("scores" in alone.values) == (reshape is drop_experts)
    assert report["relative_difference"] == pytest.approx(alone["relative_difference"], rel=0.5)
    assert report["compared_tokens"] == alone["compared_tokens"] == 21


def test_padding_is_no_example_of_fisher_information() -> None:
    torch.manual_seed(0)
    lm, (texts, padded) = LM(LMConfig(32, width=8, layers=1, heads=2, max_seq=16, init_std=0.4)), batch()

    def logits(model, some):
        return model(some["input_ids"], attention_mask=some["attention_mask"]).logits_BSV

    rows = {key: value[:4] for key, value in padded.items()}
    found = fisher_information(lm, [rows], logits=logits)
    alone = fisher_information(lm, [text[None] for text in texts])
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, atol=1e-8, rtol=1e-3)
