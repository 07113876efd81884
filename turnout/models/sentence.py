"""Texts as vectors: a sentence encoder of transformers, whose tokens are averaged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import CheckpointError, MissingExtraError, UsageError, word
from turnout.types.called import Called

__all__ = ["SentenceEncoder"]

_WHERE = "turnout.models.SentenceEncoder"


class SentenceEncoder(Called):
    """From B texts to unit vectors (B, Q): the mean of the last hidden states over each text's tokens, normalised.

    Padding is left out, so that a text's vector does not depend on the texts beside it. It says what adapters are for
    and what a request asks for, where a router compares the two: ``turnout.decide.token.Glider``.

    Args:
        model: an encoder of transformers (``AutoModel``), or any module that is called with ``input_ids`` and
            ``attention_mask`` and gives ``last_hidden_state`` (B, S, Q).
        tokenizer: its tokenizer.
        max_tokens: of a text; what is beyond is cut off.
        batch: texts at once.

    Raises:
        UsageError: max_tokens or batch is below 1.

    >>> class Letters(nn.Module):  # of each letter, its place in the alphabet and a one
    ...     def forward(self, input_ids, attention_mask):
    ...         return {"last_hidden_state": torch.stack((input_ids, torch.ones_like(input_ids)), 2).float()}
    >>> def spell(texts, padding, truncation, max_length, return_tensors):
    ...     ids = [torch.tensor([ord(letter) - 96 for letter in text]) for text in texts]
    ...     kept = [torch.ones_like(row) for row in ids]
    ...     pad = nn.utils.rnn.pad_sequence
    ...     return {"input_ids": pad(ids, batch_first=True), "attention_mask": pad(kept, batch_first=True)}
    >>> SentenceEncoder(Letters(), spell)(["a", "bg"]).mul(100).round().tolist()
    [[71.0, 71.0], [98.0, 22.0]]

    Source: Reimers and Gurevych, 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks".
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_tokens: int = 256, batch: int = 32) -> None:
        super().__init__()
        if max_tokens < 1 or batch < 1:
            got, fix = f"{max_tokens} and {batch}", "leave them at the defaults"
            raise UsageError(word("max_tokens and batch", got=got, allowed="be at least 1", where=_WHERE, fix=fix))
        self.model, self.tokenizer, self.max_tokens, self.batch = model, tokenizer, max_tokens, batch

    @classmethod
    def load(cls, path: str | Path, *, max_tokens: int = 256, batch: int = 32) -> "SentenceEncoder":
        """The encoder in a folder of transformers, in evaluation mode. Only safetensors are read, and no code.

        Args:
            path: the folder, with ``config.json``, the weights and the tokenizer. Nothing is downloaded.
            max_tokens: as above.
            batch: as above.

        Raises:
            CheckpointError: transformers cannot read the folder.
            MissingExtraError: transformers is not installed.
        """
        try:
            import transformers
        except ImportError as error:
            raise MissingExtraError(f"{_WHERE} needs transformers. Nearest fix: pip install 'turnout[hf]'.") from error
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            model = transformers.AutoModel.from_pretrained(str(path), local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as error:
            allowed, fix = "be a folder of transformers with safetensors", "name the folder of a sentence encoder"
            got = f"{path} ({str(error).splitlines()[0]})"
            raise CheckpointError(word("the encoder", got=got, allowed=allowed, where=_WHERE, fix=fix)) from error
        return cls(model.eval(), tokenizer, max_tokens=max_tokens, batch=batch)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """(B, Q) fp32, on the model's device; without gradient.

        Raises:
            UsageError: one text in place of a list of them, or none.
        """
        if isinstance(texts, str) or not texts:
            got, fix = repr(texts)[:40], "pass [text]"
            raise UsageError(word("texts", got=got, allowed="be a list of texts, one or more", where=_WHERE, fix=fix))
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        rows = []
        for start in range(0, len(texts), self.batch):
            some = list(texts[start : start + self.batch])
            asked = {"padding": True, "truncation": True, "max_length": self.max_tokens, "return_tensors": "pt"}
            inputs = {name: value.to(device) for name, value in self.tokenizer(some, **asked).items()}
            hidden_BSQ = self.model(**inputs)["last_hidden_state"].float()
            mask_BS1 = inputs["attention_mask"].unsqueeze(2).float()
            mean_BQ = (hidden_BSQ * mask_BS1).sum(1) / mask_BS1.sum(1).clamp(min=1)
            rows.append(nn.functional.normalize(mean_BQ, dim=1))
        return torch.cat(rows)
