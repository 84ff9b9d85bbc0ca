# SPDX-License-Identifier: Apache-2.0
"""How a linear layer of vLLM gets its hybrid weight, and what it computes with it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)

from spense_kernels import ops
from spense_kernels.checkpoint.config import ModuleEntry
from spense_kernels.errors import CheckpointError
from spense_kernels.format.validate import TENSORS
from spense_kernels.vllm.parts import LayerParts, Part, rows_of_rank, shards_of_rank


class SpenseLinearMethod(LinearMethodBase):
    """y = x @ W.T + bias with x quantised per row and W hybrid.

    vLLM's own loaders cut rectangles, the payload is ragged: so the layer collects whole tensors
    and cuts, joins and packs them as soon as the last one has come.

    Args:
        entries: name in the checkpoint -> ModuleEntry of each part, in the order of vLLM's rows.
    """

    def __init__(self, entries: Mapping[str, ModuleEntry]):
        self.entries = dict(entries)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Registers a place for each tensor of the checkpoint; they are empty for good."""
        layer.spense = _parts_of(
            layer, self.entries, input_size_per_partition, input_size, output_partition_sizes
        )
        # vLLM gives this to the bias, which it registers itself behind this call.
        layer.weight_loader = partial(_load, layer, "bias")
        for name in TENSORS:
            place = Parameter(torch.empty(0), requires_grad=False)
            place.weight_loader = partial(_load, layer, name)
            layer.register_parameter(name, place)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Fails unless the layer is complete; removes the places."""
        if getattr(layer, "w_packed", None) is None:
            _finish(layer)  # says what is missing
        for name in TENSORS:
            if name != "w_scale":
                delattr(layer, name)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        k = layer.spense_k
        rows = x.reshape(-1, k)
        x8, x_scale = ops.quantize_fp8(rows, layer.k_gather)
        y = ops.hybrid_gemm(
            x8,
            layer.w_packed,
            layer.w_tiles,
            x_scale,
            layer.w_scale,
            None if bias is None else layer.w_bias,
            n=layer.spense_n,
            k=k,
            out_dtype=x.dtype,
        )
        return y.view(*x.shape[:-1], layer.spense_n)


def _parts_of(
    layer: nn.Module,
    entries: Mapping[str, ModuleEntry],
    columns: int,
    all_columns: int,
    rows: list[int],
) -> LayerParts:
    """Which parts a vLLM layer has and what this rank holds of them."""
    ids: tuple = (None,)
    copies = [1] * len(entries)  # ranks that hold the same rows
    if isinstance(layer, QKVParallelLinear):
        ids = ("q", "k", "v")
        copies = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
    elif isinstance(layer, MergedColumnParallelLinear) or len(entries) > 1:
        ids = tuple(range(len(entries)))
    if not len(ids) == len(entries) == len(rows):
        raise CheckpointError(
            f"{layer.prefix}: vLLM computes {len(rows)} parts in a {type(layer).__name__}, "
            f"config.json has {', '.join(entries)}"
        )
    k_shards, parts = None, {}
    for i, (name, entry) in enumerate(entries.items()):
        if entry.k != all_columns:
            raise CheckpointError(
                f"{name}: vLLM expects k = {all_columns}, config.json says {entry.k}"
            )
        if entry.bias != layer.has_bias:
            raise CheckpointError(
                f"{name}: vLLM expects bias = {layer.has_bias}, config.json says {entry.bias}"
            )
        # A layer with all columns is whole or column-parallel; then the ranks share out the rows.
        ranks = all_columns // columns
        if ranks > 1:
            k_shards = shards_of_rank(name, entry.k_shards, layer.tp_rank, ranks)
            if entry.bias and layer.skip_bias_add:
                raise CheckpointError(
                    f"{name}: vLLM asks for its bias apart; that is not supported"
                )
            index, total = 0, rows[i]
        else:
            index, total = layer.tp_rank // copies[i], rows[i] * (layer.tp_size // copies[i])
            if rows[i] == entry.n:
                index, total = 0, entry.n
        if entry.n != total:
            raise CheckpointError(f"{name}: vLLM expects n = {total}, config.json says {entry.n}")
        parts[ids[i]] = Part(name, entry, rows_of_rank(entry, name, rows[i], index))
    return LayerParts(parts, k_shards)


def _load(
    layer: nn.Module,
    short: str,
    place: Parameter,
    loaded: Tensor,
    shard_id: str | int | None = None,
) -> None:
    """Weight loader of all tensors of a layer."""
    layer.spense.add(short, shard_id, loaded)
    if not layer.spense.missing():
        _finish(layer)


def _finish(layer: nn.Module) -> None:
    """Builds, packs and puts the weight where the places are."""
    device = layer.values.device
    weight = layer.spense.build()
    packed = weight.pack(device)
    order = torch.arange(weight.split.k, dtype=torch.int32)
    in_order = torch.equal(weight.split.gather(), order)
    tensors = {
        "w_packed": packed.w_packed,
        "w_tiles": packed.w_tiles,
        "k_gather": None if in_order else packed.gather,
        "w_scale": weight.w_scale.to(device),
        "w_bias": None if weight.bias is None else weight.bias.to(device),
    }
    for name, tensor in tensors.items():
        value = None if tensor is None else Parameter(tensor, requires_grad=False)
        layer.register_parameter(name, value)
    if weight.bias is not None and getattr(layer, "bias", None) is not None:
        layer.bias.data.copy_(weight.bias)  # for layers that leave adding it to their callers
    layer.spense_n, layer.spense_k = weight.split.n, weight.split.k
