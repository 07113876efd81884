"""Text to tokens: readers of files, folders and rows, a byte-level tokenizer, memory-mapped token sets, and batches.

tokens = prepare({"code": "src", "prose": ["docs", "notes.jsonl"]}, "tokens", vocab_size=4096)
batch = Stream(tokens.train, batch=8, seq=256, seed=0).batch(0)
"""

from turnout.train.data.document import Document
from turnout.train.data.documents import read_documents
from turnout.train.data.prepare import prepare
from turnout.train.data.shards import Split, TokenSet
from turnout.train.data.stdlib import python_text
from turnout.train.data.stream import Batch, Stream, windows
from turnout.train.data.tokenizer import byte_lengths, load_tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Document",
    "Split",
    "Stream",
    "TokenSet",
    "byte_lengths",
    "load_tokenizer",
    "prepare",
    "python_text",
    "read_documents",
    "train_tokenizer",
    "windows",
]
