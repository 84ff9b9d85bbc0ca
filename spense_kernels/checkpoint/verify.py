# SPDX-License-Identifier: Apache-2.0
"""Deep check of a checkpoint folder, and an overview from headers and small tensors."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from spense_kernels.checkpoint.config import VERSION
from spense_kernels.checkpoint.reader import CheckpointReader
from spense_kernels.checkpoint.skeleton import build_skeleton, expected_tensors
from spense_kernels.checkpoint.storage import SUMS_FILE, file_digest
from spense_kernels.errors import CheckpointError
from spense_kernels.format import HybridWeight
from spense_kernels.format.validate import TENSORS
from spense_kernels.layout import TILE_TABLE_COLUMNS


@dataclass
class VerifyReport:
    """What `verify_checkpoint` found.

    Attributes:
        problems: what makes the checkpoint unusable or doubtful; each names file or tensor.
        notes: what is unusual but legal (files outside the checksums, other encodings).
        layers, tensors, bytes: how much was read and checked.
    """

    path: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: int = 0
    tensors: int = 0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify_checkpoint(path: str | os.PathLike) -> VerifyReport:
    """Checks every file and tensor: checksums, names, shapes, dtypes, nibbles, permutations, NaN.

    Also packs every layer and unpacks it again. Reads one layer at a time. Never raises for a bad
    checkpoint: all problems found are in the report.
    """
    report = VerifyReport(str(path))
    folder = Path(path)
    _check_sums(folder, report)
    try:
        reader = CheckpointReader(folder)
    except CheckpointError as fault:
        report.problems.append(str(fault))
        return report
    plain = _check_model(reader, report)
    if any(info.digest is None for info in reader.tensors.values()):
        report.notes.append("some tensors have no checksum")
    for name in reader.config.modules:
        _check_layer(reader, name, report)
    for name, like in plain.items():
        try:
            tensor = reader.plain(name, like)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                report.problems.append(f"{name}: has NaN or Inf")
        except CheckpointError as fault:
            report.problems.append(str(fault))
        report.tensors += 1
    report.bytes = sum(info.nbytes for info in reader.tensors.values())
    return report


def inspect_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Overview without reading payloads.

    Returns a dict: path, version, architecture, provenance, modules_to_not_convert; `layers`, a
    list of dicts with name, n, k, k_shards, bias, dense_fraction, widths (histogram: dense width
    -> tiles), dense_width (per tile), checkpoint_bytes (all its tensors), packed_bytes (tile
    stream), logical_bytes, padding_waste, bytes_per_token (every buffer a forward pass reads);
    `other_bytes` of tensors that are not converted.

    Raises CheckpointError as opening a checkpoint does, and for an illegal split.
    """
    reader = CheckpointReader(path)
    layers = [_inspect_layer(reader, name) for name in reader.config.modules]
    total = sum(info.nbytes for info in reader.tensors.values())
    return {
        "path": str(path),
        "version": VERSION,
        "architecture": (reader.model_config.get("architectures") or [None])[0],
        "provenance": reader.config.provenance,
        "modules_to_not_convert": reader.config.modules_to_not_convert,
        "layers": layers,
        "other_bytes": total - sum(layer["checkpoint_bytes"] for layer in layers),
    }


def _inspect_layer(reader: CheckpointReader, name: str) -> dict[str, Any]:
    entry = reader.config.modules[name]
    names = [f"{name}.{short}" for short in reader.layer_tensors(entry)]
    split = reader.split(name)
    reader.check_names(set(reader.tensors) | set(names))
    table = 4 * TILE_TABLE_COLUMNS * (split.tiles + 1)
    scales = 4 * entry.n * (2 if entry.bias else 1)
    return {
        "name": name,
        "n": entry.n,
        "k": entry.k,
        "k_shards": split.k_shards,
        "bias": entry.bias,
        "dense_fraction": split.dense_fraction,
        "widths": {str(width): tiles for width, tiles in sorted(Counter(split.widths).items())},
        "dense_width": split.widths,
        "checkpoint_bytes": sum(reader.tensors[key].nbytes for key in names),
        "packed_bytes": split.packed_bytes,
        "logical_bytes": split.logical_bytes,
        "padding_waste": split.padding_waste,
        "bytes_per_token": split.packed_bytes + table + 4 * entry.k + scales,
    }


def _check_sums(folder: Path, report: VerifyReport) -> None:
    sums = folder / SUMS_FILE
    if not sums.is_file():
        report.notes.append(f"{SUMS_FILE}: missing, so files are checked by their contents only")
        return
    listed = {SUMS_FILE}
    *lines, rest = sums.read_bytes().decode("utf-8", "replace").split("\n")
    if rest:
        report.problems.append(f"{SUMS_FILE}: the last line does not end")
    for line in lines:
        digest, _, name = line.partition("  ")
        file = folder / name
        if not name or folder.resolve() not in file.resolve().parents:
            report.problems.append(f"{SUMS_FILE}: expected 'digest  file', got {line!r}")
            continue
        listed.add(name)
        if not file.is_file():
            report.problems.append(f"{name}: listed in {SUMS_FILE}, but missing")
        elif file_digest(file) != digest:
            report.problems.append(f"{name}: its checksum differs from {SUMS_FILE}")
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if name not in listed:
            report.notes.append(f"{name}: not listed in {SUMS_FILE}")


def _check_model(reader: CheckpointReader, report: VerifyReport) -> dict[str, torch.Tensor]:
    """Checks names against the model; returns name -> placeholder of tensors not converted."""
    layer_names = {
        f"{name}.{short}"
        for name, entry in reader.config.modules.items()
        for short in reader.layer_tensors(entry)
    }
    try:
        expected = expected_tensors(build_skeleton(reader.folder, reader.config, None))
    except CheckpointError as fault:
        report.problems.append(str(fault))
        return {}
    report.problems += reader.name_problems(set(expected))
    return {n: t for n, t in expected.items() if n not in layer_names and n in reader.tensors}


def _check_layer(reader: CheckpointReader, name: str, report: VerifyReport) -> None:
    try:
        weight = reader.layer(name)
        packed = weight.pack()
        again = HybridWeight.from_packed(packed, weight.split, weight.w_scale, weight.bias)
        if not again.equal(weight):
            report.notes.append(f"{name}: legal, but not in the canonical encoding")
    except (CheckpointError, RuntimeError) as fault:
        report.problems.append(str(fault))
    report.layers += 1
    report.tensors += len(TENSORS) + int(reader.config.modules[name].bias)
