# SPDX-License-Identifier: Apache-2.0
"""What the SpenseLinear layers of a model hold: sizes, densities, maps of the dense columns."""

from __future__ import annotations

import re

import torch

from spense_kernels.layout import TILE_ROWS

MAP_BINS = 64


def spense_layers(model) -> dict:
    """name -> SpenseLinear, in the model's order."""
    from spense_kernels.linear import SpenseLinear

    return {name: m for name, m in model.named_modules() if isinstance(m, SpenseLinear)}


def totals(model) -> dict:
    """Sizes of all SpenseLinear layers together.

    Returns a dict: layers; weights (n * k); dense_fraction and kept_fraction (logical: dense
    weights count 1, sparse ones 1/2); packed_bytes (the tile streams); logical_bytes (without
    padding); linear_bytes_per_token (every buffer a forward pass reads, scales and tables too).
    """
    layers = spense_layers(model).values()
    splits = [layer.split for layer in layers]
    weights = sum(s.n * s.k for s in splits)
    dense = sum(s.n * s.k * s.dense_fraction for s in splits) / weights
    return {
        "layers": len(splits),
        "weights": weights,
        "dense_fraction": dense,
        "kept_fraction": (1 + dense) / 2,
        "packed_bytes": sum(s.packed_bytes for s in splits),
        "logical_bytes": sum(s.logical_bytes for s in splits),
        "linear_bytes_per_token": sum(b.nbytes for layer in layers for b in layer.buffers()),
    }


def dense_map(split, bins: int = MAP_BINS) -> list[float]:
    """Share of each input column's weights that stay dense, averaged over `bins` equal ranges."""
    rows = torch.full((split.tiles,), float(TILE_ROWS))
    rows[-1] = split.n - TILE_ROWS * (split.tiles - 1)
    share = torch.zeros(split.k_shards, split.shard_columns)
    position = torch.arange(split.shard_columns)
    for width, count in zip(split.widths, rows.tolist(), strict=True):
        share += (position >= split.shard_columns - width).float() * (count / split.n)
    columns = torch.empty(split.k_shards, split.shard_columns)
    columns.scatter_(1, split.k_perm.long(), share)
    pooled = torch.nn.functional.adaptive_avg_pool1d(columns.reshape(1, 1, -1), bins)
    return [round(v, 3) for v in pooled.flatten().tolist()]


def layer_records(model, errors: dict[str, float]) -> list[dict]:
    """One record a layer for the report; `errors` is name -> relative output error."""
    records = []
    for name, layer in spense_layers(model).items():
        split = layer.split
        records.append(
            {
                "name": name,
                "kind": name.rsplit(".", 1)[-1],
                "index": int(next(iter(re.findall(r"\.(\d+)\.", name)), 0)),
                "n": split.n,
                "k": split.k,
                "k_shards": split.k_shards,
                "rel_error": errors[name],
                "dense_fraction": round(split.dense_fraction, 6),
                "widths": sorted(set(split.widths)),
                "packed_bytes": split.packed_bytes,
                "dense_map": dense_map(split),
            }
        )
    return records
