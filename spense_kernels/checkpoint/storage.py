# SPDX-License-Identifier: Apache-2.0
"""Safetensors files with a digest per tensor, and the folder-wide SHA256SUMS."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
DIGEST_PREFIX = "sha256."  # metadata key: prefix + tensor name
SUMS_FILE = "SHA256SUMS"
PIECE = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: what the header says, and a function that makes it (any device)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, little endian and row-major, without a copy where it lies so already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def tensor_digest(dtype_name: str, shape: Iterable[int], data: memoryview) -> str:
    """sha256 in hex over the line `DTYPE d0,d1,...\\n` and then the tensor's bytes."""
    head = f"{dtype_name} {','.join(map(str, shape))}\n"
    digest = hashlib.sha256(head.encode())
    digest.update(data)
    return digest.hexdigest()


def write_safetensors(path: Path, entries: Sequence[Entry]) -> None:
    """Writes one file, making one tensor at a time; the digests go into the header at the end.

    Larger elements come first (so that every tensor is aligned), then names in order.
    """
    ordered = sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name))
    digests = {entry.name: "0" * 64 for entry in ordered}
    with open(path, "wb") as file:
        file.write(_header(ordered, digests))
        for entry in ordered:
            tensor = entry.make()
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise AssertionError(f"{entry.name}: {tensor.dtype} {tensor.shape}, not {entry}")
            data = tensor_bytes(tensor)
            digests[entry.name] = tensor_digest(DTYPE_NAMES[entry.dtype], entry.shape, data)
            for start in range(0, len(data), PIECE):
                file.write(data[start : start + PIECE])
        file.seek(0)
        file.write(_header(ordered, digests))


def _header(entries: Sequence[Entry], digests: dict[str, str]) -> bytes:
    metadata = {"format": "pt", "spense_version": "1"}
    metadata |= {DIGEST_PREFIX + name: value for name, value in digests.items()}
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def write_sums(folder: Path) -> None:
    """SHA256SUMS over every other file below the folder, in the format of `sha256sum`."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in files if name != SUMS_FILE]
    (folder / SUMS_FILE).write_text("".join(lines))
