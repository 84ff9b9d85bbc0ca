# SPDX-License-Identifier: Apache-2.0
"""A pruned MLP through torch.compile, torch.export and an AOTInductor package.

    python docs/examples/compile_and_export.py mlp.pt2

The package runs without Python code of the model; the process that loads it needs the ops, which
`import spense_kernels` brings (or torch.ops.load_library of lib/libspense_ops_*.so).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from spense_kernels import SpenseLinear, ops


class Mlp(nn.Module):
    """x + down(silu(gate(x)) * up(x)); the activation quantises for down."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        for name, rows, columns in (
            ("gate", intermediate, hidden),
            ("up", intermediate, hidden),
            ("down", hidden, intermediate),
        ):
            linear = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
            self.add_module(name, SpenseLinear.from_dense(linear, dense_fraction=0.25))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate(x), self.up(x), self.down
        x8, scale = ops.silu_mul_quantize(gate, up, down.gather)
        return x + ops.hybrid_gemm(
            x8, down.w_packed, down.w_tiles, scale, down.w_scale, n=x.shape[1], k=gate.shape[1]
        )


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "mlp.pt2")
    torch.manual_seed(0)
    model = Mlp(256, 512).eval()
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        assert torch.equal(compiled(x), expected)
        print("torch.compile: one graph, the same bits")

        tokens = torch.export.Dim("tokens", min=2, max=4096)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: tokens}})
        torch._inductor.aoti_compile_and_package(program, package_path=str(target))
        loaded = torch._inductor.aoti_load_package(str(target))
        for count in (4, 33):
            x = torch.randn(count, 256, dtype=torch.bfloat16)
            assert torch.equal(loaded(x), model(x))
        print(f"AOTInductor: {target}, {target.stat().st_size} bytes, the same bits")


if __name__ == "__main__":
    main()
