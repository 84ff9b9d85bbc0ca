# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint folder: config, tensor table, tensors with their digests checked."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spense_kernels.checkpoint.config import ModuleEntry, SpenseConfig
from spense_kernels.checkpoint.save import CONFIG, INDEX, WEIGHTS
from spense_kernels.checkpoint.storage import (
    DIGEST_PREFIX,
    DTYPE_NAMES,
    DTYPES,
    tensor_bytes,
    tensor_digest,
)
from spense_kernels.errors import CheckpointError, FormatError
from spense_kernels.format import HybridWeight, Split
from spense_kernels.format.validate import DTYPES as LAYER_DTYPES
from spense_kernels.format.validate import TENSORS


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of a tensor: where it is and what it claims to be."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str | None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class CheckpointReader:
    """An opened checkpoint folder. Opening reads config.json and the headers of the weight files.

    Attributes:
        folder: the folder.
        config: SpenseConfig from config.json.
        model_config: all of config.json as a dict.
        tensors: name -> TensorInfo of everything stored.

    Raises CheckpointError, which names the file or the tensor, for anything that is not as
    docs/format.md says.
    """

    def __init__(self, path: str | os.PathLike):
        self.folder = Path(path)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder")
        self.model_config = _read_json(self.folder / CONFIG)
        if "quantization_config" not in self.model_config:
            raise CheckpointError(
                f"{self.folder / CONFIG}: has no quantization_config: not a spense checkpoint"
            )
        self.config = SpenseConfig.from_dict(self.model_config["quantization_config"])
        self._files: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file, names in self._weight_files().items():
            self._read_header(file, names)

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, after its digest was checked. May share memory with the file."""
        info = self._info(name)
        try:
            tensor = self._files[info.file].get_tensor(name)
        except (SafetensorError, RuntimeError, OSError) as fault:
            raise CheckpointError(f"{info.file}: {name}: cannot be read: {fault}") from fault
        if info.digest is not None:
            digest = tensor_digest(DTYPE_NAMES[info.dtype], info.shape, tensor_bytes(tensor))
            if digest != info.digest:
                raise CheckpointError(f"{info.file}: {name}: its checksum differs: damaged data")
        return tensor

    def layer(self, name: str) -> HybridWeight:
        """The weight of a converted layer, everything about it checked."""
        entry = self.config.modules[name]
        for short in self.layer_tensors(entry):
            info = self._info(f"{name}.{short}")
            if info.dtype != LAYER_DTYPES[short]:
                raise CheckpointError(
                    f"{info.file}: {name}.{short}: expected dtype "
                    f"{DTYPE_NAMES[LAYER_DTYPES[short]]}, got {DTYPE_NAMES[info.dtype]}"
                )
        state = {f"{name}.{s}": self.read(f"{name}.{s}") for s in self.layer_tensors(entry)}
        try:
            weight = HybridWeight.from_state_dict(state, f"{name}.", n=entry.n, k=entry.k)
        except FormatError as fault:
            raise CheckpointError(f"{self.folder}: {fault}") from fault
        if weight.split.k_shards != entry.k_shards:
            raise CheckpointError(
                f"{self.folder}: {name}.k_perm: expected k_shards = {entry.k_shards} rows as in "
                f"config.json, got {weight.split.k_shards}"
            )
        return weight

    def split(self, name: str) -> Split:
        """The split of a converted layer, from its small tensors."""
        entry = self.config.modules[name]
        try:
            return Split(
                entry.n, entry.k, self.read(f"{name}.k_perm"), self.read(f"{name}.dense_width")
            )
        except FormatError as fault:
            raise CheckpointError(f"{self.folder}: {name}: {fault}") from fault

    def plain(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the model's own, of the shape and kind (floating or not) of `like`."""
        info = self._info(name)
        if info.shape != tuple(like.shape):
            raise CheckpointError(
                f"{info.file}: {name}: expected shape {list(like.shape)}, got {list(info.shape)}"
            )
        floating = info.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        if floating != like.is_floating_point() or (not floating and info.dtype != like.dtype):
            wanted = "a floating dtype" if like.is_floating_point() else str(like.dtype)
            raise CheckpointError(f"{info.file}: {name}: expected {wanted}, got {info.dtype}")
        return self.read(name)

    def check_names(self, expected: set[str]) -> None:
        """Raises CheckpointError unless exactly these tensors are stored."""
        problems = self.name_problems(expected)
        if problems:
            raise CheckpointError(problems[0])

    def name_problems(self, expected: set[str]) -> list[str]:
        missing = sorted(expected - self.tensors.keys())
        unexpected = sorted(self.tensors.keys() - expected)
        return [f"{self.folder}: {name}: missing tensor" for name in missing] + [
            f"{self.tensors[name].file}: {name}: unexpected tensor" for name in unexpected
        ]

    @staticmethod
    def layer_tensors(entry: ModuleEntry) -> tuple[str, ...]:
        """Short names of the tensors a converted layer has."""
        return (*TENSORS, "bias") if entry.bias else TENSORS

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: {name}: missing tensor")
        return self.tensors[name]

    def _weight_files(self) -> dict[Path, list[str] | None]:
        """file -> names that the index puts there (None: whatever it holds)."""
        index, single = self.folder / INDEX, self.folder / WEIGHTS
        if index.exists() == single.exists():
            found = "both" if single.exists() else "neither"
            raise CheckpointError(f"{self.folder}: expected {WEIGHTS} or {INDEX}, found {found}")
        if single.exists():
            return {single: None}
        files: dict[Path, list[str] | None] = {}
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(f"{index}: expected an object weight_map")
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index}: {name}: expected a file name, got {file!r}")
            files.setdefault(self.folder / file, []).append(name)
        return files

    def _read_header(self, path: Path, names: list[str] | None) -> None:
        try:
            file = safe_open(path, framework="pt", device="cpu")
            stored = list(file.keys())
        except (SafetensorError, OSError) as fault:
            raise CheckpointError(f"{path}: cannot be read: {fault}") from fault
        if names is not None and set(names) != set(stored):
            odd = sorted(set(names) ^ set(stored))[0]
            raise CheckpointError(f"{path}: {odd}: index and file disagree about this tensor")
        self._files[path] = file
        metadata = file.metadata() or {}
        digests = {
            key.removeprefix(DIGEST_PREFIX): value
            for key, value in metadata.items()
            if key.startswith(DIGEST_PREFIX)
        }
        # Files that other tools wrote again have none at all; some without the rest is damage.
        # More than the file has is what transformers writes into every shard.
        if digests and not digests.keys() >= set(stored):
            odd = sorted(set(stored) - digests.keys())[0]
            raise CheckpointError(f"{path}: {odd}: checksum and tensor do not go together")
        for name in stored:
            view = file.get_slice(name)
            dtype = DTYPES.get(view.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{path}: {name}: unknown dtype {view.get_dtype()}")
            self.tensors[name] = TensorInfo(path, dtype, tuple(view.get_shape()), digests.get(name))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path}: cannot be read: {fault}") from fault
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data
