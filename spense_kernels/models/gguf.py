# SPDX-License-Identifier: Apache-2.0
"""Read one GGUF file through transformers without parsing it four times over."""

from __future__ import annotations

import functools
from contextlib import contextmanager

from spense_kernels.errors import UserError

GGUF_MAGIC = b"GGUF"


def check_gguf(path) -> None:
    """Raise UserError unless the file starts like a GGUF file."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != GGUF_MAGIC:
        raise UserError(f"load_dense: {path} is no GGUF file (it starts with {magic!r})")


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
