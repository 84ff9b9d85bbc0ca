# SPDX-License-Identifier: Apache-2.0
"""Parts of gemm_sweep.py: shapes, operands, rivals, timing in CUDA graphs, report."""
