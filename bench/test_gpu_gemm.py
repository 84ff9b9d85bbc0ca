# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark entries of gemm_sweep.py for the common shapes; a group is to be compared.

python -m pytest bench/test_gpu_gemm.py --benchmark-only --benchmark-group-by=group

An entry times the replay of a whole graph; `extra_info` has the microseconds of one launch. The
figures to quote are those of gemm_sweep.py, which replays rivals in turn.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from gemm.shapes import MODELS, Layer
from gemm.timing import Recorder, rotation
from gemm.workload import Workload

from spense_kernels import _load

REASON = _load.why_no_cuda() or ("" if torch.cuda.is_available() else "no CUDA device here")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON)]

RIVALS = ["spense", "cublas_tensor", "cusparselt"]
LAUNCHES = 24


@lru_cache(maxsize=1)
def recorder() -> Recorder:
    return Recorder(torch.device("cuda"))


@lru_cache(maxsize=1)
def workload(layer: Layer) -> Workload:
    made = Workload(layer, recorder(), RIVALS)
    made.set_dense(0.25)
    return made


@pytest.mark.parametrize("layer", MODELS["qwen3-32b"], ids=lambda layer: layer.name)
@pytest.mark.parametrize("m", [1, 16, 64, 256, 2048])
@pytest.mark.parametrize("what", RIVALS)
def test_gpu_gemm(benchmark, layer, m, what):
    calls = workload(layer).calls(m)
    if what not in calls:
        pytest.skip(f"{what} does not run here")
    calls = rotation(calls[what], LAUNCHES)
    recording = recorder().record(calls, len(calls))

    def replay() -> None:
        recording.replay()
        torch.cuda.synchronize()

    benchmark.group = f"{layer.label}, M = {m}"
    benchmark.extra_info |= recorder().measure({what: recording}, seconds=0.05)[what]
    benchmark.pedantic(replay, rounds=10, warmup_rounds=1)
