# SPDX-License-Identifier: Apache-2.0
"""Checks of a layer's checkpoint form. Every fault is a FormatError that names the tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spense_kernels.errors import FormatError
from spense_kernels.format.blocks import blocks
from spense_kernels.format.groups import illegal_indices, nan_bytes
from spense_kernels.format.split import Split
from spense_kernels.layout import EMPTY_NIBBLE, GROUP, groups_of, row_bytes

PAYLOAD = ("values", "indices", "dense")
TENSORS = (*PAYLOAD, "w_scale", "k_perm", "dense_width")  # of every layer; `bias` may follow
DTYPES = {
    "values": torch.float8_e4m3fn,
    "indices": torch.uint8,
    "dense": torch.float8_e4m3fn,
    "w_scale": torch.float32,
    "k_perm": torch.int32,
    "dense_width": torch.int32,
    "bias": torch.float32,
}
DIMS = {"k_perm": 2}


def check_arrays(split: Split, tensors: Mapping[str, Tensor | None]) -> None:
    """Sizes, dtypes, devices and contiguity of a HybridWeight's tensors against its split."""
    expected = dict(zip(PAYLOAD, split.payload_bytes(), strict=True))
    for name in (*PAYLOAD, "w_scale", "bias"):
        tensor = tensors[name]
        if tensor is None and name == "bias":
            continue
        dtype = torch.uint8 if name in PAYLOAD else torch.float32
        shape = [expected.get(name, split.n)]
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or list(tensor.shape) != shape:
            got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else tensor
            raise FormatError(f"HybridWeight: {name} must be {dtype} of shape {shape}, got {got}")
        if not tensor.is_contiguous():
            raise FormatError(f"HybridWeight: {name} must be contiguous")
        if tensor.device != tensors["values"].device:
            raise FormatError(
                f"HybridWeight: {name} must be on {tensors['values'].device} like values, "
                f"got {tensor.device}"
            )


def check_contents(split: Split, tensors: Mapping[str, Tensor | None], prefix: str = "") -> None:
    """Nibbles, NaN bytes, padding, scales and bias; `prefix` goes before tensor names."""
    for i, name in enumerate(PAYLOAD):
        array = tensors[name]
        bad = illegal_indices(array) if name == "indices" else nan_bytes(array)
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            fault = "a nibble whose places are not ascending" if name == "indices" else "NaN"
            raise FormatError(
                f"{prefix}{name}: {fault}, byte 0x{int(array[at]):02X} at {at} "
                f"({_where(split, i, at)})"
            )
    _check_padding(split, tensors, prefix)
    scale, bias = tensors["w_scale"], tensors["bias"]
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise FormatError(
            f"{prefix}w_scale: must be finite and positive, got {float(scale[row])} at row {row}"
        )
    if bias is not None and not bool(torch.isfinite(bias).all()):
        row = int((~torch.isfinite(bias)).nonzero()[0])
        raise FormatError(f"{prefix}bias: must be finite, got {float(bias[row])} at {row}")


def _check_padding(split: Split, tensors: Mapping[str, Tensor], prefix: str) -> None:
    for run, shard, (values, indices, _) in blocks(split, *(tensors[name] for name in PAYLOAD)):
        columns = split.shard_columns - run.width
        groups = groups_of(columns)
        bad = None
        if groups % 2:
            bad = (indices[:, -1] >> 4) != EMPTY_NIBBLE
            text = f"indices: the unused high nibble must be 0x{EMPTY_NIBBLE:X}"
        if columns % GROUP and not (groups % 2 and bool(bad.any())):
            nibble = indices[:, -1] >> (0 if groups % 2 else 4)
            places = torch.stack((nibble & 3, (nibble >> 2) & 3), dim=1)
            bad = ((places >= columns % GROUP) & (values[:, -2:] != 0)).any(dim=1)
            text = f"values: places behind column {columns} must hold 0x00"
        if bad is not None and bool(bad.any()):
            row = run.first_row + int(bad.nonzero()[0])
            raise FormatError(f"{prefix}{text}, but row {row} of shard {shard} differs")


def _where(split: Split, array: int, at: int) -> str:
    """Block and row of a byte of values (0), indices (1) or dense (2)."""
    starts = split.block_offsets()[:, :-1, array]
    sizes = [row_bytes(split.shard_columns, w)[array] for w in split.widths]
    block = int((starts.reshape(-1) <= at).nonzero()[-1])
    shard, tile = divmod(block, split.tiles)
    row = (at - int(starts[shard, tile])) // sizes[tile]
    return f"shard {shard}, tile {tile}, row {row} of the tile"


def read_state_dict(
    state: Mapping[str, Tensor], prefix: str, n: int | None, k: int | None
) -> dict[str, Tensor | Split]:
    """Arguments of HybridWeight from checkpoint tensors, dtypes, dimensions and split checked."""
    tensors = {}
    for name in (*TENSORS, "bias"):
        tensor = state.get(prefix + name)
        if tensor is None:
            if name == "bias":
                continue
            raise FormatError(f"{prefix}{name}: missing tensor")
        _check_tensor(prefix + name, name, tensor)
        tensors[name] = tensor.view(torch.uint8) if name in ("values", "dense") else tensor
    rows = tensors["w_scale"].shape[0]
    if n is not None and rows != n:
        raise FormatError(f"{prefix}w_scale: must have shape [{n}], got [{rows}]")
    perm = tensors.pop("k_perm")
    columns = perm.numel()
    if k is not None and columns != k:
        raise FormatError(f"{prefix}k_perm: must have {k} elements, got {columns}")
    try:
        split = Split(rows, columns, perm.cpu(), tensors.pop("dense_width").cpu())
    except FormatError as fault:
        raise FormatError(f"{prefix[:-1] or 'layer'}: {fault}") from fault
    for name, size in zip(PAYLOAD, split.payload_bytes(), strict=True):
        if tensors[name].shape[0] != size:
            raise FormatError(
                f"{prefix}{name}: must have shape [{size}] for {split!r}, "
                f"got {list(tensors[name].shape)}"
            )
    if "bias" in tensors and tensors["bias"].shape[0] != rows:
        raise FormatError(
            f"{prefix}bias: must have shape [{rows}], got {list(tensors['bias'].shape)}"
        )
    return {"split": split} | {name: t.contiguous() for name, t in tensors.items()}


def _check_tensor(full_name: str, name: str, tensor: Tensor) -> None:
    legal = {DTYPES[name]} | ({torch.uint8} if name in ("values", "dense") else set())
    if tensor.dtype not in legal:
        raise FormatError(f"{full_name}: must be {DTYPES[name]}, got {tensor.dtype}")
    if tensor.dim() != DIMS.get(name, 1):
        raise FormatError(
            f"{full_name}: must have {DIMS.get(name, 1)} dimension(s), got {list(tensor.shape)}"
        )
