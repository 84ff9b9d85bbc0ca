# SPDX-License-Identifier: Apache-2.0
"""Which configurations of hybrid_gemm a device has, asked of the op itself."""

from __future__ import annotations

from spense_kernels.testing.op_inputs import gemm_call

NOT_A_CONFIG = "?"


def gemm_configs(device: str) -> list[str]:
    """Names of all configurations that run on the device, as the op's error message lists them."""
    call = gemm_call(m=1, n=16, k=64, dense_width=[0]).to(device)
    try:
        call.with_argument("config", NOT_A_CONFIG)()
    except RuntimeError as refusal:
        begin, end = "config: expected one of ", f", got {NOT_A_CONFIG}"
        text = str(refusal)
        if begin in text and end in text:
            return text.partition(begin)[2].partition(end)[0].split(", ")
        raise
    raise AssertionError(f"hybrid_gemm took {NOT_A_CONFIG!r} for a configuration")
