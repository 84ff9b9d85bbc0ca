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
    # y[m, n] = sum_k(x[m, k] * w[n, k]) * x_scale[m] * w_scale[n] + bias[n]. (A default dtype would
    # be serialised as an integer in AOTInductor packages, which then do not load; hence None.)
    "hybrid_gemm": (
        "(Tensor x, Tensor w_packed, Tensor w_tiles, Tensor x_scale, Tensor w_scale, "
        "Tensor? bias=None, *, int n, int k, int layout=1, ScalarType? out_dtype=None, "
        "bool fast_accum=True, str? config=None) -> Tensor"
    ),
    # x8[m, p] = e4m3(x[m, gather[p]] / scale[m]), scale[m] = max(amax_k |x[m, k]|, 1e-12) / 448
    "quantize_fp8": "(Tensor x, Tensor? gather=None) -> (Tensor, Tensor)",
    # quantize_fp8 of x / rms(x) * weight (1 + weight with unit_offset)
    "rms_norm_quantize": (
        "(Tensor x, Tensor weight, Tensor? gather=None, *, float eps, bool unit_offset=False) "
        "-> (Tensor, Tensor)"
    ),
    # the same of x + residual, which is the third result
    "add_rms_norm_quantize": (
        "(Tensor x, Tensor residual, Tensor weight, Tensor? gather=None, *, float eps, "
        "bool unit_offset=False) -> (Tensor, Tensor, Tensor)"
    ),
    # quantize_fp8 of silu(gate) * up, and of gelu(gate) * up
    "silu_mul_quantize": "(Tensor gate, Tensor up, Tensor? gather=None) -> (Tensor, Tensor)",
    "gelu_mul_quantize": (
        "(Tensor gate, Tensor up, Tensor? gather=None, *, str approximate='none') "
        "-> (Tensor, Tensor)"
    ),
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
    out_dtype: torch.dtype | None = None,
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
    out_dtype bfloat16 (None), float16 or float32
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


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    gather: Tensor | None = None,
    *,
    eps: float,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMSNorm and `quantize_fp8` in one pass over memory.

    x       bfloat16, float16 or float32 [M, K], stride 1 in the last dimension
    weight  [K], in the dtype of x or float32
    gather  int32 [K] or None, as in `quantize_fp8`
    eps     added to the mean square
    unit_offset  scales by 1 + weight, as Gemma does

    Steps, in float32 and each rounded on its own, save the one in float64:
      p = sums of x * x over columns 8 i to 8 i + 7, as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))
      q = sum of p in float64, in an order that is left open, rounded to float32 once
      r = 1 / sqrt(q / K + eps)                          w = weight, or 1 + weight
      v = (x * w) * r                                    then `quantize_fp8` of v, from float32
    so devices agree bit for bit unless q lies within K * 2^-56 of where float32 rounds the other
    way. Nothing is rounded to the dtype of x in between, as an unfused model does: v is within
    2^-8 (bfloat16) or 2^-11 (float16) of that model's, relatively.

    Returns x8 and scale as `quantize_fp8` does; a row of v with NaN or infinity gets scale NaN.
    Raises RuntimeError for a wrong dtype, shape, stride or device, an eps below 0, and on the CPU
    for an entry of gather outside [0, K). The CUDA kernels take up to 131,072 columns.
    """
    return torch.ops.spense.rms_norm_quantize(x, weight, gather, eps=eps, unit_offset=unit_offset)


def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    gather: Tensor | None = None,
    *,
    eps: float,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_quantize` of x + residual, which it returns as well.

    residual  [M, K] in the dtype of x, stride 1 in the last dimension; the rest as there

    Returns x8, scale, and sum [M, K], contiguous: x + residual in float32, rounded to the dtype of
    x. The norm is that of sum.
    """
    return torch.ops.spense.add_rms_norm_quantize(
        x, residual, weight, gather, eps=eps, unit_offset=unit_offset
    )


def silu_mul_quantize(
    gate: Tensor, up: Tensor, gather: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_fp8` of silu(gate) * up in one pass over memory.

    gate, up  bfloat16, float16 or float32 [M, K], both alike, stride 1 in the last dimension; the
              halves of one [M, 2 K] are fine
    gather    int32 [K] or None, as in `quantize_fp8`

    v = gate / (1 + 2^(-log2(e) * gate)) * up in float32, its relative error below 2^-15 (the power
    of two and, on CUDA, the division are approximations); no rounding to the dtype of gate in
    between. Then as `quantize_fp8`, from float32. On CUDA a gate below -43.5, where silu is below
    6e-18 in size, counts as 0.

    Returns x8 and scale. A row of v with a NaN or an infinity gets scale NaN. Raises RuntimeError
    for a wrong dtype, shape, stride or device, and on the CPU for entries of gather outside [0, K).
    """
    return torch.ops.spense.silu_mul_quantize(gate, up, gather)


def gelu_mul_quantize(
    gate: Tensor, up: Tensor, gather: Tensor | None = None, *, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    """`silu_mul_quantize` with a GELU: gelu(gate) * up, relative error below 2^-15 as there.

    On CUDA with "tanh" a gate below -7.6, where the GELU is below 1e-18 in size, counts as 0.

    approximate  of torch.nn.functional.gelu: "none" for gate * Phi(gate), "tanh" for
                 gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate^3)))
    """
    return torch.ops.spense.gelu_mul_quantize(gate, up, gather, approximate=approximate)


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
