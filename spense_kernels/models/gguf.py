# SPDX-License-Identifier: Apache-2.0
"""Read one GGUF file through transformers without parsing it four times over."""

from __future__ import annotations

import functools
import re
from contextlib import contextmanager

from spense_kernels.errors import UserError

GGUF_MAGIC = b"GGUF"
SAMPLE = 512  # vocabulary words that check_tokenizer tries
MIN_WORDS = 32  # fewer tell nothing
MIN_WHOLE = 0.9  # a few words of a sound vocabulary are out of its merges' reach


def check_gguf(path) -> None:
    """Raise UserError unless the file starts like a GGUF file."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != GGUF_MAGIC:
        raise UserError(f"load_dense: {path} is no GGUF file (it starts with {magic!r})")


def check_tokenizer(tokenizer, path) -> None:
    """Raise UserError unless words of the vocabulary come back as the one token they are.

    A GGUF file of a sentencepiece model lists no merges, so a reader has to rebuild them. Rebuilt
    in a wrong order they still round-trip any text, but cut words into other pieces than the model
    was trained on, which nothing but its perplexity shows.
    """
    vocabulary = tokenizer.get_vocab()
    words = sorted(w for w in vocabulary if re.fullmatch("[\u2581\u0120][A-Za-z]{3,12}", w))
    words = words[:: max(1, len(words) // SAMPLE)]
    if len(words) < MIN_WORDS:
        return
    ids = [[vocabulary[word]] for word in words]
    encoded = tokenizer([tokenizer.decode(i) for i in ids], add_special_tokens=False).input_ids
    whole = sum(a == b for a, b in zip(ids, encoded, strict=True))
    if whole < MIN_WHOLE * len(words):
        import transformers

        raise UserError(
            f"load_dense: the tokenizer that transformers {transformers.__version__} makes of "
            f"{path} cuts {len(words) - whole} of {len(words)} words of its own vocabulary; "
            "transformers >= 5.20.2 is known to read it right"
        )


@contextmanager
def shared_reader():
    """Inside the block `gguf.GGUFReader(path)` parses a file once and answers repeats from memory.

    transformers builds a reader for the configuration, one for the tensors and two for the
    tokenizer. With a vocabulary of 262,144 entries each takes 15 to 20 s, nearly all of it spent
    on slicing a numpy memmap, which costs ten times what slicing a plain array view does.
    """
    import gguf
    import numpy as np

    original = gguf.GGUFReader

    class ViewReader(original):
        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, value):
            self._data = value.view(np.ndarray)

    @functools.lru_cache(maxsize=1)
    def reader(path, mode="r"):
        return ViewReader(path, mode)

    gguf.GGUFReader = reader
    try:
        yield
    finally:
        gguf.GGUFReader = original
        reader.cache_clear()
