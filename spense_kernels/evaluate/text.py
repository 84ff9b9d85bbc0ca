# SPDX-License-Identifier: Apache-2.0
"""English text for calibration and test: Python's own documentation, or the user's files."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spense_kernels.errors import UserError

TEST_SHARE = 4  # one part in four is held out


@dataclass(frozen=True)
class Corpus:
    """Documents for calibration and, apart from them, for the test.

    No paragraph occurs twice in it, so none is in both parts.
    """

    name: str
    calibration: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in (self.calibration, self.test):
            for document in part:
                digest.update(document.encode("utf-8") + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()


def python_docs() -> Corpus:
    """The language reference that every CPython carries (`pydoc_data.topics`).

    Topics are taken longest first. Long topics quote shorter ones in full, so a paragraph stays
    only where it comes first; of the topics that are left every fourth is test text.
    """
    from pydoc_data.topics import topics

    order = sorted(topics, key=lambda name: (-len(topics[name]), name))
    seen: set[str] = set()
    kept = [text for name in order if (text := _fresh_text(topics[name], seen))]
    kept.sort(key=lambda text: (-len(text), text))
    test = tuple(text for i, text in enumerate(kept) if i % TEST_SHARE == 1)
    calibration = tuple(text for i, text in enumerate(kept) if i % TEST_SHARE != 1)
    version = platform.python_version()
    return Corpus(f"pydoc_data.topics of Python {version}", calibration, test)


def files(paths: Sequence, test_share: float = 1 / TEST_SHARE) -> Corpus:
    """The user's UTF-8 text files: the last quarter of each file's paragraphs is test text.

    Raises UserError for a file that is missing, unreadable, not UTF-8 or empty.
    """
    if not paths:
        raise UserError("files: expected at least one text file, got none")
    seen: set[str] = set()
    calibration, test = [], []
    for path in map(Path, paths):
        paragraphs = _fresh(read_text(path), seen)
        if not paragraphs:
            raise UserError(f"text file {path}: nothing new in it (a copy of an earlier file?)")
        cut = _cut(paragraphs, 1 - test_share)
        calibration.append("\n\n".join(paragraphs[:cut]))
        test.append("\n\n".join(paragraphs[cut:]))
    names = ", ".join(Path(p).name for p in paths)
    return Corpus(names, tuple(t for t in calibration if t), tuple(t for t in test if t))


def read_text(path) -> str:
    """Read a UTF-8 text file, or raise UserError with one clear line."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"text file {path}: not found") from None
    except OSError as error:
        raise UserError(f"text file {path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"text file {path}: expected UTF-8, got byte 0x{data[error.start]:02x} "
            f"at offset {error.start}"
        ) from None
    if "\0" in text:
        raise UserError(f"text file {path}: expected text, got NUL bytes (a binary file?)")
    if not text.strip():
        raise UserError(f"text file {path}: empty")
    return text


def windows(tokenizer, documents: Iterable[str], length: int = 512) -> Tensor:
    """Cut documents into windows of BOS and length - 1 tokens.

    The documents' tokens stand one after another; the tail that fills no window is dropped.
    A tokenizer without BOS gives windows of `length` text tokens.

    Returns int64 [windows, length]; zero windows when the text is too short.
    """
    if length < 2:
        raise UserError(f"windows: length must be at least 2, got {length}")
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    body = length - (bos is not None)
    count = len(tokens) // body
    out = torch.tensor(tokens[: count * body], dtype=torch.int64).reshape(count, body)
    if bos is not None:
        out = torch.cat([torch.full((count, 1), bos, dtype=torch.int64), out], dim=1)
    return out


def pick(pool: Tensor, count: int, seed: int | None = None) -> Tensor:
    """`count` windows of the pool (all when it has fewer): evenly spread, or at random by seed."""
    total = pool.shape[0]
    if count >= total:
        return pool
    if seed is None:
        index = torch.arange(count) * total // count
    else:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(total, generator=generator)[:count].sort().values
    return pool[index]


def _fresh(text: str, seen: set[str]) -> list[str]:
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph.strip("\n"))
    return kept


def _fresh_text(text: str, seen: set[str]) -> str:
    return "\n\n".join(_fresh(text, seen))


def _cut(paragraphs: list[str], share: float) -> int:
    """How many leading paragraphs hold `share` of the characters."""
    target, size = share * sum(map(len, paragraphs)), 0
    for index, paragraph in enumerate(paragraphs):
        if size >= target:
            return index
        size += len(paragraph)
    return len(paragraphs)
