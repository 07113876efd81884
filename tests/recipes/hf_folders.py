"""Tiny folders of transformers, with a tokenizer, and text for them."""

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from turnout.train.data import train_tokenizer

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
TEXT = "\n".join(f"line {n}: " + " ".join(str(n * k) for k in range(20)) for n in range(60))


@functools.cache
def transformers() -> Any:
    """The library, silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def make(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **keys: Any) -> Path:
    """A folder as transformers writes it, with a tokenizer and a generation configuration of its own."""
    library = transformers()
    torch.manual_seed(7)
    config = library.AutoConfig.for_model(kind, **(SIZES | keys))
    model = library.AutoModelForCausalLM.from_config(config).to(dtype)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.save_pretrained(folder, max_shard_size="20KB")
    train_tokenizer([TEXT], vocab_size=300).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """Of fixed tokens, by transformers' own model, with nothing missing or left over when it loads."""
    library = transformers()
    model, notes = library.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values()), notes
    id_BS = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(5))
    return model.eval()(id_BS).logits.float()
