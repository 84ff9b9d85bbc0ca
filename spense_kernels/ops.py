# SPDX-License-Identifier: Apache-2.0
"""The ops `torch.ops.spense.*`: schemas and what each argument means.

The functions here are those ops with names and defaults; they work in eager mode, under
`torch.compile(fullgraph=True)` and `torch.export`. Fakes are in _fake.py, CPU kernels behind
csrc/torch/ops_cpu.cpp, CUDA kernels behind csrc/torch/ops_cuda.cpp.

Every failed check is a RuntimeError that reads
`spense::<op>: <argument>: expected <what>, got <what>`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spense_kernels import _fake, _load

SCHEMAS = {
    # y[m, n] = sum_k(x[m, k] * w[n, k]) * x_scale[m] * w_scale[n] + bias[n]
    "hybrid_gemm": (
        "(Tensor x, Tensor w_packed, Tensor w_tiles, Tensor x_scale, Tensor w_scale, "
        "Tensor? bias=None, *, int n, int k, int layout=1, ScalarType out_dtype=bfloat16, "
        "bool fast_accum=True, str? config=None) -> Tensor"
    ),
    # x8[m, p] = e4m3(x[m, gather[p]] / scale[m]), scale[m] = max(amax_k |x[m, k]|, 1e-12) / 448
    "quantize_fp8": "(Tensor x, Tensor? gather=None) -> (Tensor, Tensor)",
    # checkpoint form -> tile stream and tile table
    "pack": (
        "(Tensor values, Tensor indices, Tensor dense, int[] dense_width, *, int n, int k, "
        "int k_shards=1) -> (Tensor w_packed, Tensor w_tiles)"
    ),
    # tile stream -> checkpoint form in its canonical encoding
    "unpack": (
        "(Tensor w_packed, Tensor w_tiles, int[] dense_width, *, int n, int k, int k_shards=1, "
        "int layout=1) -> (Tensor values, Tensor indices, Tensor dense)"
    ),
}


def hybrid_gemm(
    x: Tensor,
    w_packed: Tensor,
    w_tiles: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    n: int,
    k: int,
    layout: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = True,
    config: str | None = None,
) -> Tensor:
    """y[m, n] = sum_k(x[m, k] * w[n, k]) * x_scale[m] * w_scale[n] + bias[n].

    x         float8_e4m3fn [M, K], columns in gather order (`quantize_fp8` writes it so), stride 1
              in the last dimension. M = 0 is legal. On CUDA rows that are not 16-byte aligned are
              copied first. A row with a NaN gives a row of NaN.
    w_packed  uint8 [bytes], tile stream (csrc/format/tile_stream.h); 16-byte aligned
    w_tiles   int32 [ceil(n / 128) + 1, 4], tile table of that stream
    x_scale   float32 [M] (per token) or [1] (per tensor)
    w_scale   float32 [n], per output channel
    bias      float32 [n] or None
    n, k      rows and columns of the weight that was packed
    layout    version of the tile stream, 1
    out_dtype bfloat16, float16 or float32
    fast_accum  on SM90 lets the tensor cores keep sums at their own precision; elsewhere no effect
    config    forces a configuration by name; None chooses. CPU: reference, portable, avx2, avx512

    Returns [M, n], contiguous, in out_dtype. Raises RuntimeError for a wrong dtype, shape, stride,
    device or layout, a tile table that does not fit, or a config this machine does not have; a
    backward pass through it raises NotImplementedError.
    """
    return torch.ops.spense.hybrid_gemm(
        x,
        w_packed,
        w_tiles,
        x_scale,
        w_scale,
        bias,
        n=n,
        k=k,
        layout=layout,
        out_dtype=out_dtype,
        fast_accum=fast_accum,
        config=config,
    )


def quantize_fp8(x: Tensor, gather: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes rows to e4m3 with one scale each, gathering columns in the same pass.

    x       bfloat16, float16 or float32 [M, K], stride 1 in the last dimension
    gather  int32 [K] or None for the order as it is: x8[:, p] comes from x[:, gather[p]]

    Returns x8, float8_e4m3fn [M, K], a view with row stride ceil(K / 128) * 128 on zero padding,
    and scale, float32 [M], so that x8 * scale is about x: scale = max(amax, 1e-12) * (1 / 448) and
    x8 = round to nearest even of x * (1 / scale), saturating. A row that holds a NaN or an infinity
    gets scale NaN. Raises RuntimeError for a wrong dtype, shape, stride or device, and on the CPU
    for an entry of gather outside [0, K).
    """
    return torch.ops.spense.quantize_fp8(x, gather)


def pack(
    values: Tensor,
    indices: Tensor,
    dense: Tensor,
    dense_width: Sequence[int],
    *,
    n: int,
    k: int,
    k_shards: int = 1,
) -> tuple[Tensor, Tensor]:
    """Turns the checkpoint form of a layer (docs/format.md) into the tile stream kernels read.

    values, indices, dense  uint8, 1-D, sizes as docs/format.md computes them
    dense_width  dense columns per K shard of each 128-row tile, ceil(n / 128) integers
    n, k         rows and columns of the weight; k_shards: equal shards of k

    Returns w_packed, uint8 [bytes], and w_tiles, int32 [tiles + 1, 4]. Raises RuntimeError for a
    wrong dtype, shape or device and an illegal split; on the CPU also for an illegal metadata
    nibble, a NaN byte, or padding that is not zero.
    """
    return torch.ops.spense.pack(values, indices, dense, dense_width, n=n, k=k, k_shards=k_shards)


def unpack(
    w_packed: Tensor,
    w_tiles: Tensor,
    dense_width: Sequence[int],
    *,
    n: int,
    k: int,
    k_shards: int = 1,
    layout: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack`: values, indices and dense (uint8, 1-D) in the canonical encoding.

    Raises RuntimeError for a wrong dtype, shape, device, layout or split.
    """
    return torch.ops.spense.unpack(
        w_packed, w_tiles, dense_width, n=n, k=k, k_shards=k_shards, layout=layout
    )


def _no_gradient(name: str):
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"spense::{name}: backward: expected a call that no gradient is asked of, got a "
            "backward pass; this op is for inference. Run it under torch.no_grad() or detach "
            "its inputs."
        )

    return backward


def _no_cuda(name: str, reason: str):
    def kernel(*args, **kwargs):
        raise RuntimeError(f"spense::{name}: device: expected cpu, got cuda, but {reason}")

    return kernel


def _register() -> torch.library.Library | None:
    """Defines the ops; None when this process has them already (a second import of the module)."""
    if torch._C._jit_get_schemas_for_operator("spense::hybrid_gemm"):
        return None
    library = torch.library.Library("spense", "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=tags)
    _load.load_ops()
    reason = _load.why_no_cuda()
    for name in SCHEMAS:
        torch.library.register_fake(f"spense::{name}", getattr(_fake, name), lib=library)
        torch.library.register_autograd(f"spense::{name}", _no_gradient(name), lib=library)
        if reason is not None:
            library.impl(name, _no_cuda(name, reason), "CUDA")
    return library


# Kept for the life of the process: a Library that is collected takes its ops with it.
_LIBRARY = _register() or globals().get("_LIBRARY")
