# SPDX-License-Identifier: Apache-2.0
"""The ops without any model: prune a matrix, pack it, multiply, compare with plain torch.

python docs/examples/op_alone.py
"""

from __future__ import annotations

import torch

from spense_kernels import HybridWeight, Split, ops

N, K, TOKENS = 512, 1024, 8


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(N, K)

    # Columns of large norm stay dense, the others keep the two largest of four weights.
    order = weight.norm(dim=0).argsort()
    split = Split.from_fraction(N, K, 0.25, k_perm=order)
    sparse = order[: K - split.widths[0]]
    groups = weight[:, sparse].view(N, -1, 4)
    keep = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2, dim=2).indices, 1.0)
    pruned = weight.clone()
    pruned[:, sparse] = (groups * keep).view(N, -1)

    hybrid = HybridWeight.from_float(pruned, split)  # FP8, one scale a row
    packed = hybrid.pack(device)  # the tile stream that kernels read
    print(f"{split}: {split.packed_bytes} bytes, dense FP8 {N * K}")

    x = torch.randn(TOKENS, K, dtype=torch.bfloat16, device=device)
    x8, x_scale = ops.quantize_fp8(x, packed.gather)  # FP8, columns in the order of the weight
    y = ops.hybrid_gemm(
        x8, packed.w_packed, packed.w_tiles, x_scale, hybrid.w_scale.to(device), n=N, k=K
    )

    # The same numbers in plain torch: FP8 values times scales.
    x_back = torch.empty(TOKENS, K, device=device)
    x_back[:, packed.gather.long()] = x8.float() * x_scale[:, None]
    expected = x_back @ hybrid.dequantize().to(device).t()
    error = (y.float() - expected).norm() / expected.norm()
    print(f"relative difference to plain torch: {error:.1e}")
    # bf16 rounds the result by up to 2^-9; tensor cores keep FP8 sums with some 2^-13.
    assert error < 2.0**-8


if __name__ == "__main__":
    main()
