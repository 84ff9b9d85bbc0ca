# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint folder beside its place and renames it, so that it is whole or absent."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spense_kernels.checkpoint.config import ModuleEntry, SpenseConfig, check_json
from spense_kernels.checkpoint.storage import (
    DTYPE_NAMES,
    Entry,
    write_safetensors,
    write_sums,
)
from spense_kernels.env import versions
from spense_kernels.errors import CheckpointError
from spense_kernels.format.validate import DTYPES as LAYER_DTYPES
from spense_kernels.linear import SpenseLinear

MAX_SHARD_BYTES = 4 << 30
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Saves a transformers model whose linear layers (some or all) are SpenseLinear.

    Args:
        model: transformers model on any device.
        path: folder to make. It appears under this name only when it is complete.
        tokenizer: saved beside the weights when given.
        provenance: plain JSON: method, settings, calibration, seed. None keeps what the model was
            loaded with. Package versions are added under `versions` unless they are there.
        overwrite: replace an existing spense checkpoint (any other folder is refused).
        max_shard_bytes: largest weight file; a single layer or tensor may exceed it.

    Returns the folder. Raises CheckpointError when the folder exists, the model has nothing to
    save, or writing fails; then nothing is left behind.
    """
    path = Path(path).absolute()
    config = describe_model(model, provenance)
    _check_target(path, overwrite)
    units = _units(model)
    with _beside(path) as folder:
        _write_config(model, config, folder)
        _write_weights(units, folder, max_shard_bytes)
        _write_generation_config(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_sums(folder)
    return path


def describe_model(model: nn.Module, provenance: dict[str, Any] | None = None) -> SpenseConfig:
    """What a checkpoint of this model would say about itself; arguments as of save_checkpoint.

    Raises CheckpointError when the model has no SpenseLinear, or one without a weight.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SpenseLinear)}
    if not layers:
        raise CheckpointError("save_checkpoint: model: expected SpenseLinear layers, found none")
    for name, layer in layers.items():
        if layer.split is None:
            raise CheckpointError(f"save_checkpoint: model: layer {name} has no weight yet")
    if provenance is None:
        inherited = getattr(model.config, "quantization_config", None)
        if hasattr(inherited, "to_dict"):
            inherited = inherited.to_dict()
        provenance = inherited.get("provenance", {}) if isinstance(inherited, dict) else {}
    provenance = check_json(provenance, "save_checkpoint: provenance")
    provenance.setdefault("versions", versions("torch", "transformers"))
    return SpenseConfig(
        modules={
            name: ModuleEntry(m.out_features, m.in_features, m.split.k_shards, m.has_bias)
            for name, m in layers.items()
        },
        modules_to_not_convert=[n for n, m in model.named_modules() if isinstance(m, nn.Linear)],
        provenance=provenance,
    )


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"save_checkpoint: {path} exists; nothing was written")
    try:
        method = json.loads((path / CONFIG).read_text())["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):
        method = None
    if method != "spense":
        raise CheckpointError(
            f"save_checkpoint: {path} exists and is no spense checkpoint, so it is not overwritten"
        )


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path` that takes its place on success and vanishes on failure."""
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = _sibling(path, "tmp")
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            _sync(file)
        _sync(folder)
        _swap_in(folder, path)
        _sync(path.parent)
    except OSError as fault:
        raise CheckpointError(f"save_checkpoint: cannot write {path}: {fault}") from fault
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.{suffix}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap_in(folder: Path, path: Path) -> None:
    """Renames folder to path; what stood there goes only after the new one is in place."""
    if not path.exists():
        folder.rename(path)
        return
    old = _sibling(path, "old")
    path.rename(old)
    try:
        folder.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_config(model: nn.Module, config: SpenseConfig, folder: Path) -> None:
    saved = copy.deepcopy(model.config)
    if hasattr(saved, "quantization_config"):
        del saved.quantization_config
    saved.architectures = [type(model).__name__]
    saved.dtype = str(model.dtype).removeprefix("torch.")
    if getattr(saved, "tie_word_embeddings", False) and not _is_tied(model):
        saved.tie_word_embeddings = False
    saved.save_pretrained(folder)
    data = json.loads((folder / CONFIG).read_text())
    data["quantization_config"] = config.to_dict()
    (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n")


def _write_generation_config(model: nn.Module, folder: Path) -> None:
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.save_pretrained(folder)
    except ValueError as fault:
        # Sampling flags that contradict each other must not cost a pruned model.
        warnings.warn(f"generation_config was not saved: {fault}", stacklevel=3)


def _is_tied(model: nn.Module) -> bool:
    """Whether the output embedding shares its weight (or is a SpenseLinear, which shares none)."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return getattr(head, "weight", None) is getattr(table, "weight", None) or not isinstance(
        head, nn.Linear
    )


def _units(model: nn.Module) -> list[list[Entry]]:
    """Tensors to write, those of one module together; of shared tensors the first name only."""
    units, seen = [], set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, SpenseLinear):
            units.append(_layer_entries(module, prefix))
            continue
        own: dict[str, Tensor] = {}
        module._save_to_state_dict(own, prefix, keep_vars=False)
        unit = []
        for key, tensor in own.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"save_checkpoint: {key}: cannot store {tensor.dtype}")
            if tensor.is_meta:
                raise CheckpointError(f"save_checkpoint: {key} is on the meta device, has no data")
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and place in seen:
                continue
            seen.add(place)
            unit.append(Entry(key, tensor.dtype, tuple(tensor.shape), _constant(tensor)))
        if unit:
            units.append(unit)
    return units


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _layer_entries(layer: SpenseLinear, prefix: str) -> list[Entry]:
    """Entries of one layer. Payloads are unpacked when the first of them is asked for and let go
    with the last, so that only one layer's checkpoint form exists at a time."""
    split = layer.split
    sizes = dict(zip(("values", "indices", "dense"), split.payload_bytes(), strict=True))
    pending: dict[str, Tensor] = {}

    def payload(name: str) -> Tensor:
        if not pending:
            pending.update(layer.hybrid_weight().state_dict())
            for other in set(pending) - set(sizes):
                del pending[other]
        return pending.pop(name)

    def lazy(name: str) -> Callable[[], Tensor]:
        return lambda: payload(name)

    small = {"w_scale": layer.w_scale, "k_perm": split.k_perm, "dense_width": split.dense_width}
    if layer.bias is not None:
        small["bias"] = layer.bias
    entries = [Entry(prefix + n, LAYER_DTYPES[n], (sizes[n],), lazy(n)) for n in sizes]
    entries += [Entry(prefix + n, t.dtype, tuple(t.shape), _constant(t)) for n, t in small.items()]
    return entries


def _write_weights(units: list[list[Entry]], folder: Path, max_shard_bytes: int) -> None:
    shards: list[list[Entry]] = [[]]
    size = 0
    for unit in units:
        more = sum(entry.nbytes for entry in unit)
        if shards[-1] and size + more > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].extend(unit)
        size += more
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, shards[0])
        return
    places = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        places |= {entry.name: name for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
