# SPDX-License-Identifier: Apache-2.0
"""Prose for the quality figures: three Debian packages, fetched with apt, checked by SHA-256.

anarchism (An Anarchist FAQ) and debian-handbook give calibration and test text, jargon-text is out
of domain. Windows are BOS + 511 tokens of one work each, calibration and test from different
sections (FAQ A-E / H-J) and pages (half of the handbook each, drawn with seed 0).
"""

from __future__ import annotations

import gzip
import hashlib
import html
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PACKAGES = {
    "anarchism": "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    "debian-handbook": "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    "jargon-text": "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
}
VERSIONS = {
    "anarchism": "15.3-3",
    "debian-handbook": "11.20220922",
    "jargon-text": "4.4.7-4.1",
}
CALIBRATION_SEED, TEST_SEED, VALIDATION_SEED = 1, 2, 999
RESERVE = 24  # windows of the handbook that no calibration set takes
_BLOCK = re.compile(r"</(p|div|li|h\d|tr|pre|blockquote|dt|dd|title)>|<br */?>", re.IGNORECASE)
_DROP = re.compile(r"<(script|style|head)\b.*?</\1>", re.IGNORECASE | re.DOTALL)


@dataclass
class Prose:
    """Token windows int64 [S, L].

    Attributes:
        calibration, test: the two books in turn.
        outside: the Jargon File.
        vocabulary: int64 [V], the tokens that occur anywhere in the three works, sorted.
        hashes: SHA-256 of the packages and of the windows.
        pools: "faq" and "book", all windows of the calibration side.
    """

    calibration: Tensor
    test: Tensor
    outside: Tensor
    vocabulary: Tensor
    hashes: dict[str, str]
    pools: dict[str, Tensor]


def fetch(folder: Path) -> dict[str, Path]:
    """Unpacked package folders; downloads with apt what is missing. No root needed."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, expected in PACKAGES.items():
        deb = folder / f"{name}_{VERSIONS[name]}_all.deb"
        if not deb.exists():
            wanted = f"{name}={VERSIONS[name]}"
            subprocess.run(["apt-get", "download", "-q", wanted], cwd=folder, check=True)
        digest = hashlib.sha256(deb.read_bytes()).hexdigest()
        if digest != expected:
            raise SystemExit(f"{deb}: SHA-256 {digest}, expected {expected}")
        target = folder / name
        if not target.exists():
            subprocess.run(["dpkg-deb", "-x", str(deb), str(target)], check=True)
        found[name] = target / "usr/share/doc" / name
    return found


def page_text(source: str) -> str:
    """Readable text of an HTML page: one paragraph a line."""
    source = _DROP.sub(" ", source)
    source = re.sub(r"\s+", " ", source)
    source = _BLOCK.sub("\n", source)
    text = html.unescape(re.sub(r"<[^>]+>", "", source))
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if len(line) > 40 or line.endswith((".", ":", "?")))


def _faq(folder: Path, sections: str) -> list[str]:
    pages = sorted((folder / "html").glob(f"sec[{sections}]*.html"))
    return [page_text(p.read_text(encoding="utf-8", errors="replace")) for p in pages]


def _handbook(folder: Path) -> tuple[list[str], list[str]]:
    pages = sorted((folder / "html/en-US").glob("*.html"))
    pages = [p for p in pages if p.stem not in ("ix01", "index")]
    random.Random(0).shuffle(pages)
    texts = [page_text(p.read_text(encoding="utf-8", errors="replace")) for p in pages]
    half = len(texts) // 2
    return texts[:half], texts[half:]


def _jargon(folder: Path) -> list[str]:
    with gzip.open(folder / "jargon.txt.gz", "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    paragraphs = [re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", text)]
    kept = []
    for paragraph, following in zip(paragraphs, [*paragraphs[1:], ""], strict=True):
        in_list = len(paragraph) <= 40 and len(following) <= 40  # tables of contents
        if paragraph and not in_list and "│" not in paragraph:
            kept.append(paragraph)
    return ["\n".join(kept)]


def _windows(tokenizer, texts: list[str], length: int) -> Tensor:
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text + "\n\n", add_special_tokens=False).input_ids
    count = len(tokens) // (length - 1)
    body = torch.tensor(tokens[: count * (length - 1)]).view(count, length - 1)
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), body], dim=1)


def _sample(pool: Tensor, count: int, seed: int) -> Tensor:
    if count > pool.shape[0]:
        raise SystemExit(f"corpus: {count} windows asked for, {pool.shape[0]} there")
    generator = torch.Generator().manual_seed(seed)
    return pool[torch.randperm(pool.shape[0], generator=generator)[:count]]


def _alternate(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], dim=1).flatten(0, 1)


def draw_calibration(pools: dict[str, Tensor], count: int, seed: int) -> Tensor:
    """int64 [count, L]: both books in equal shares, in turn.

    The handbook has fewer windows; beyond that the FAQ fills up and each of the handbook's counts
    as often as it takes. RESERVE of its windows stay out, for validation.
    """
    faq, book = pools["faq"], pools["book"]
    drawn = CALIBRATION_SEED + 1000 * seed
    half = min(count // 2, book.shape[0] - RESERVE)
    first, second = _sample(faq, count - half, drawn), _sample(book, half, drawn)
    if first.shape[0] == half:
        return _alternate(first, second)
    both = torch.cat([first, second])
    return both[torch.randperm(count, generator=torch.Generator().manual_seed(drawn))]


def draw_validation(pools: dict[str, Tensor], seen: Tensor, count: int) -> Tensor:
    """int64 [count, L] of the calibration side that are not in `seen`, half of each book."""
    known = {tuple(row.tolist()) for row in seen}
    out = []
    for pool in pools.values():
        shuffled = _sample(pool, pool.shape[0], VALIDATION_SEED)
        rows = [row for row in shuffled if tuple(row.tolist()) not in known]
        if len(rows) < count // 2:
            raise SystemExit(f"corpus: {len(rows)} windows left for validation of {count // 2}")
        out.append(torch.stack(rows[: count // 2]))
    return torch.cat(out)


def hold_out(pools: dict[str, Tensor], count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Pools without their last pages, and int64 [count, L] windows of those, half of each book.

    Windows from between others (draw_validation) share pages with the text of a fine-tune, and get
    better with it long after those of other pages have stopped.
    """
    kept = {name: pool[: len(pool) - count // 2] for name, pool in pools.items()}
    return kept, torch.cat([pool[len(pool) - count // 2 :] for pool in pools.values()])


def training_windows(pools: dict[str, Tensor]) -> Tensor:
    """All text of the calibration side for a fine-tune: each book cut at several offsets."""
    out = []
    for name, cuts in (("faq", 4), ("book", 8)):
        pool = pools[name]
        length = pool.shape[1] - 1
        stream = pool[:, 1:].flatten()
        for cut in range(cuts):
            part = stream[cut * length // cuts :]
            rows = part[: len(part) // length * length].view(-1, length)
            out.append(torch.cat([pool[:1, :1].expand(len(rows), 1), rows], dim=1))
    return torch.cat(out)


def training_texts(packages: dict[str, Path]) -> list[str]:
    """Texts of the calibration side, for a tokenizer or a model made of them."""
    return _faq(packages["anarchism"], "A-E") + _handbook(packages["debian-handbook"])[0]


def load_prose(
    tokenizer, folder: Path, calibration: int, test: int, outside: int = 16, length: int = 512,
    seed: int = 0,
) -> Prose:  # fmt: skip
    """Windows of the packages; both books in equal shares, in turn.

    Args:
        seed: draws other calibration windows; the test windows never change.
    """
    packages = fetch(folder)
    faq_a = _windows(tokenizer, _faq(packages["anarchism"], "A-E"), length)
    faq_b = _windows(tokenizer, _faq(packages["anarchism"], "H-J"), length)
    book_a, book_b = _handbook(packages["debian-handbook"])
    book_a, book_b = (_windows(tokenizer, texts, length) for texts in (book_a, book_b))
    jargon = _windows(tokenizer, _jargon(packages["jargon-text"]), length)
    # 64 a book are always drawn, so that fewer test windows are a part of more.
    tests = _alternate(_sample(faq_b, 64, TEST_SEED), _sample(book_b, 64, TEST_SEED))
    pools = {"faq": faq_a, "book": book_a}
    calibrations = draw_calibration(pools, calibration, seed)
    vocabulary = torch.cat([faq_a, faq_b, book_a, book_b, jargon]).unique()
    outsides = _sample(jargon, outside, TEST_SEED)
    prose = Prose(calibrations, tests[:test], outsides, vocabulary, dict(PACKAGES), pools)
    for name in ("calibration", "test", "outside"):
        data = getattr(prose, name).numpy().tobytes()
        prose.hashes[name] = hashlib.sha256(data).hexdigest()
    return prose
