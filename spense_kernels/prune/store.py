# SPDX-License-Identifier: Apache-2.0
"""Finished layers on disk, so that a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from spense_kernels.errors import PruneError

_SAMPLE = 1 << 16  # values of each parameter that enter the fingerprint


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and an even sample of every parameter's values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        sample = tensor_digest(flat[::step])
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} {sample}\n".encode())
    return digest.hexdigest()


def write_atomic(path: Path, write) -> None:
    """Call write(file) on a new file beside `path`, then rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of text, in UTF-8."""
    write_atomic(path, lambda file: file.write(text.encode()))


class Store:
    """A folder of named results, bound to one fingerprint; a None folder keeps nothing.

    Raises PruneError when the folder holds the results of another run.
    """

    def __init__(self, folder: str | os.PathLike | None, fingerprint: str):
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        mark = self._folder / "fingerprint.json"
        if mark.exists():
            found = json.loads(mark.read_text(encoding="utf-8")).get("fingerprint")
            if found != fingerprint:
                raise PruneError(
                    f"prune_model: work_dir {self._folder} belongs to another model, calibration "
                    "or setting; name an empty folder"
                )
        elif any(not entry.name.startswith(".") for entry in self._folder.iterdir()):
            raise PruneError(f"prune_model: work_dir {self._folder} must be empty")
        else:
            write_text(mark, json.dumps({"fingerprint": fingerprint}))

    def get(self, name: str):
        """The stored result, or None. A damaged file counts as absent."""
        if self._folder is None:
            return None
        path = self._folder / f"{name}.pt"
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            path.unlink()
            return None

    def put(self, name: str, value) -> None:
        if self._folder is not None:
            write_atomic(self._folder / f"{name}.pt", lambda file: torch.save(value, file))
