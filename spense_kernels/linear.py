# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight is hybrid 2:4 sparse and dense FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spense_kernels import ops
from spense_kernels.errors import FormatError, SpenseError
from spense_kernels.format import HybridWeight, PackedWeight, Split
from spense_kernels.format.groups import keep_largest_two
from spense_kernels.format.validate import DTYPES, TENSORS


class QuantizedRows(NamedTuple):
    """Stands for an input x of a PackedLinear that is quantised, in that layer's gather order.

    Attributes:
        x8: float8_e4m3fn [M, K]; x_scale: float32 [M], as `quantize_fp8` makes them.
        shape, dtype: of x, [..., K] with M rows.
        outputs: what fused projections have computed of it, (group, all of its rows) each.
    """

    x8: Tensor
    x_scale: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    outputs: list[tuple[nn.Module, Tensor]]


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with stride 1 in the last dimension."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def quantized(x: Tensor, gather: Tensor | None) -> QuantizedRows:
    """x [..., K] by `quantize_fp8`."""
    return QuantizedRows(*ops.quantize_fp8(rows_of(x), gather), tuple(x.shape), x.dtype, [])


class PackedLinear(nn.Module):
    """y = x @ W.T + bias for inference; x is quantised to FP8 per row on the way in.

    Holds the tile stream that kernels read and what a forward pass needs beside it; how that is
    stored in a state dict is up to the subclass.

    Attributes:
        split: the layer's Split, None while there is no weight.
        w_packed uint8 [bytes], w_tiles int32 [tiles + 1, 4], k_gather int32 [in_features],
        w_scale float32 [out_features], bias float32 [out_features] or None: buffers. Casts such
        as `.half()` move them but never change their dtypes.

    Every attribute and every module's dict that a forward pass reads is one that torch.compile's
    guards read before every call; hence few, and sizes are taken from the buffers.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device=None):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = bool(bias)
        self.split: Split | None = None
        self._in_order = False
        device = device or torch.get_default_device()
        empty = {
            "w_packed": torch.empty(0, dtype=torch.uint8, device=device),
            "w_tiles": torch.empty(0, 4, dtype=torch.int32, device=device),
            "k_gather": torch.empty(0, dtype=torch.int32, device=device),
            "w_scale": torch.empty(0, dtype=torch.float32, device=device),
            "bias": torch.empty(0, dtype=torch.float32, device=device) if bias else None,
        }
        for name, buffer in empty.items():
            # State dicts hold another form of these, so tools that go by names must not look for
            # them there. (An absent one stays persistent: accelerate trips over it otherwise.)
            self.register_buffer(name, buffer, persistent=buffer is None)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """[..., in_features] in bf16, fp16 or fp32 -> [..., out_features] in the same dtype.

        x may come quantised, in the order of `gather`, from another op than `quantize_fp8`.
        A backward pass raises NotImplementedError: the layer is for inference.
        """
        buffers = self._buffers
        w_packed, k = buffers["w_packed"], buffers["k_gather"].shape[0]
        if w_packed.numel() == 0:
            raise SpenseError(f"{type(self).__name__}: no weight yet; load a state dict first")
        if x.shape[-1] != k:
            raise SpenseError(
                f"{type(self).__name__}: x must have {k} columns (in_features), got {list(x.shape)}"
            )
        if not isinstance(x, QuantizedRows):
            x = quantized(x, self.gather)
        n = buffers["w_scale"].shape[0]
        y = ops.hybrid_gemm(
            x.x8,
            w_packed,
            buffers["w_tiles"],
            x.x_scale,
            buffers["w_scale"],
            buffers["bias"],
            n=n,
            k=k,
            out_dtype=x.dtype,
        )
        return y.view(*x.shape[:-1], n)

    @property
    def gather(self) -> Tensor | None:
        """What `quantize_fp8` takes for this layer: k_gather, or None where it changes nothing."""
        return None if self._in_order else self._buffers["k_gather"]

    def hybrid_weight(self) -> HybridWeight:
        """The weight in the checkpoint form, unpacked from the tile stream (a copy)."""
        if self.split is None:
            raise SpenseError(f"{type(self).__name__}: no weight yet; load a state dict first")
        packed = PackedWeight(
            self.w_packed, self.w_tiles, self.k_gather, self.out_features, self.in_features
        )
        return HybridWeight.from_packed(packed, self.split, self.w_scale, self.bias)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, "
        text += f"bias={self.has_bias}"
        if self.split is None:
            return f"{text}, no weight yet"
        return (
            f"{text}, d={self.split.dense_fraction:.4f}, k_shards={self.split.k_shards}, "
            f"packed_bytes={self.split.packed_bytes}"
        )

    def _set_weight(self, weight: HybridWeight, device) -> None:
        packed = weight.pack(device)
        self.split = weight.split
        self.w_packed, self.w_tiles, self.k_gather = packed.w_packed, packed.w_tiles, packed.gather
        order = weight.split.gather()
        self._in_order = bool((order == torch.arange(len(order), dtype=order.dtype)).all())
        self.w_scale = weight.w_scale.detach().to(device, copy=True)
        self.bias = None if weight.bias is None else weight.bias.detach().to(device, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # Payloads are bytes and scales are float32 by definition: follow the device, not the dtype.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                same = moved.dtype == buffer.dtype
                self._buffers[name] = moved if same else buffer.to(moved.device)
        return self


class SpenseLinear(PackedLinear):
    """A PackedLinear that takes the place of one nn.Linear.

    `state_dict` and `load_state_dict` speak the portable checkpoint form (docs/format.md). A module
    made by the constructor has no weight until a state dict is loaded; `from_hybrid` and
    `from_dense` make complete ones.
    """

    @classmethod
    def from_hybrid(cls, weight: HybridWeight, device=None) -> SpenseLinear:
        """A layer with this weight, on `device` (None: where the weight is)."""
        device = weight.values.device if device is None else device
        layer = cls(weight.split.k, weight.split.n, weight.bias is not None, device)
        layer._set_weight(weight, device)
        return layer

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, dense_fraction: float = 0.25, k_shards: int = 1
    ) -> SpenseLinear:
        """One-shot magnitude pruning of an nn.Linear, without calibration data.

        The columns of largest norm (per K shard) stay dense, the others keep the two largest of
        four weights. `spense_kernels.prune` does far better with calibration data.

        Args:
            dense_fraction: share of columns that stay dense, rounded as `Split.from_fraction` says.
        """
        weight = linear.weight.detach().float()
        n, k = weight.shape
        norms = weight.square().sum(dim=0).view(k_shards, -1) if k % k_shards == 0 else None
        perm = None if norms is None else norms.argsort(dim=1, stable=True).cpu()
        split = Split.from_fraction(n, k, dense_fraction, perm, k_shards)
        pruned = torch.zeros_like(weight)
        for columns in split.columns().to(weight.device):
            block = weight[:, columns]
            sparse = split.shard_columns - split.widths[0]
            block[:, :sparse] *= keep_largest_two(block[:, :sparse].abs())
            pruned[:, columns] = block
        bias = None if linear.bias is None else linear.bias.detach()
        return cls.from_hybrid(HybridWeight.from_float(pruned, split, bias))

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
        """An nn.Linear with the same weight (zeros at pruned places) and bias in `dtype`."""
        weight = self.hybrid_weight().dequantize(dtype)
        linear = nn.Linear(
            self.in_features, self.out_features, self.has_bias, device="meta", dtype=dtype
        )
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.split is None:
            # The names of what has to be loaded; there is no data that could be saved by mistake.
            for name in self._tensor_names():
                destination[prefix + name] = torch.empty(0, dtype=DTYPES[name], device="meta")
            return
        destination.update(self.hybrid_weight().state_dict(prefix))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        names = self._tensor_names()
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        known = {prefix + name for name in names}
        unexpected = [key for key in state_dict if key.startswith(prefix) and key not in known]
        if strict:
            unexpected_keys.extend(unexpected)
        if missing:
            if strict or len(missing) < len(names):
                missing_keys.extend(missing)
            return
        tensors = {key: state_dict[key] for key in known}
        try:
            weight = HybridWeight.from_state_dict(
                tensors, prefix, n=self.out_features, k=self.in_features
            )
            given = weight.values.device
            assign = local_metadata.get("assign_to_params_buffers", False)
            keep = self.w_packed.device.type != "meta" and not assign
            self._set_weight(weight, self.w_packed.device if keep else given)
        except (FormatError, RuntimeError) as fault:
            error_msgs.append(str(fault))

    def _tensor_names(self) -> list[str]:
        return [*TENSORS, "bias"] if self.has_bias else list(TENSORS)
