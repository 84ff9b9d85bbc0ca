# SPDX-License-Identifier: Apache-2.0
"""The ops' contract on a GPU: opcheck, compile, empty and strided inputs, words of errors."""

from __future__ import annotations

import pytest
import torch
from devices import GPU_CONFIGS, Problem, all_devices, check_bits, cuda, poisoned
from test_ops import FP8_INPUTS, OPCHECKS, SAMPLES, assert_same

from spense_kernels import ops
from spense_kernels.testing.configs import gemm_configs
from spense_kernels.testing.generators import exact_activations, exact_weight, random_split
from spense_kernels.testing.op_inputs import gemm_call

FLOAT32 = torch.float32
FP8 = torch.float8_e4m3fn
gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("make", SAMPLES)
def test_opcheck(make):
    call = make().to("cuda")
    utils = OPCHECKS if call.op in FP8_INPUTS else (*OPCHECKS, "test_schema")
    op = getattr(torch.ops.spense, call.op).default
    torch.library.opcheck(op, tuple(call.args.values()), call.kwargs, test_utils=utils)


@gpu
@pytest.mark.parametrize("make", SAMPLES)
def test_compiled_is_eager(make):
    torch.compiler.reset()
    call = make().to("cuda")
    op = getattr(torch.ops.spense, call.op)
    compiled = torch.compile(lambda *args: op(*args, **call.kwargs), fullgraph=True)
    assert_same(compiled(*call.args.values()), call())


@gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layer_with_quantiser(mode):
    torch.compiler.reset()
    call = gemm_call(m=16, n=384, k=1024, dense_width=[256] * 3).to("cuda")
    packed, tiles, _, w_scale = list(call.tensors().values())[1:]
    order = torch.randperm(1024, dtype=torch.int32, device="cuda")

    def layer(x):
        x8, x_scale = torch.ops.spense.quantize_fp8(x, order)
        return torch.ops.spense.hybrid_gemm(x8, packed, tiles, x_scale, w_scale, n=384, k=1024)

    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for m in (16, 16, 16, 5):
        x = torch.randn(m, 1024, dtype=torch.bfloat16, device="cuda")
        assert_same(compiled(x).clone(), layer(x))


@all_devices
def test_no_tokens(device):
    for dtype in (torch.bfloat16, torch.float16, FLOAT32):
        call = gemm_call(m=0, n=300, k=256, dense_width=[0, 16, 256], out_dtype=dtype).to(device)
        y = call()
        assert (y.shape, y.dtype, y.device.type) == ((0, 300), dtype, device)


@pytest.fixture(scope="module", params=["cpu", cuda])
def case(request) -> Problem:
    return Problem(exact_weight(random_split(300, 1040, seed=3), seed=4, bias=True), request.param)


def configs_of(case: Problem) -> list[str | None]:
    return [None, *(GPU_CONFIGS if case.device == "cuda" else [])]


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize(
    ("stride", "offset"),
    [(1040, 0), (1056, 16), (1041, 0), (1050, 3), (1152, 0), (1152, 1), (4096, 48), (1040, 8)],
)
def test_any_rows_of_x(case, m, stride, offset):
    """Rows of any stride and address; what lies between them is NaN and must not be read."""
    x, scale = (t.to(case.device) for t in exact_activations(m, 1040, seed=m))
    buffer = torch.full((offset + m * stride,), 0x7F, dtype=torch.uint8, device=case.device)
    rows = buffer.as_strided((m, 1040), (stride, 1), offset)
    rows.copy_(x.view(torch.uint8))
    for config in configs_of(case):
        with poisoned():
            out = case.run(rows.view(FP8), scale, config, out_dtype=FLOAT32)
        check_bits(out, case.exact(x, scale, FLOAT32), f"{config}, m = {m}")


def test_one_row_for_all_tokens(case):
    x, scale = (t.to(case.device) for t in exact_activations(1, 1040))
    same = x.expand(70, 1040)
    out = case.run(same, scale.expand(70).contiguous(), out_dtype=FLOAT32)
    check_bits(out, case.exact(x, scale, FLOAT32).expand(70, 300), "stride 0")


def test_transposed_x_is_refused(case):
    x, scale = (t.to(case.device) for t in exact_activations(1040, 1040))
    with pytest.raises(RuntimeError, match="spense::hybrid_gemm: x: expected stride 1"):
        case.run(x.t(), scale)


@gpu
def test_unknown_configuration_names_all():
    names = gemm_configs("cuda")
    assert len(set(names)) == len(names) >= 1
    call = gemm_call(m=3, n=128, k=256, dense_width=[64]).to("cuda")
    with pytest.raises(RuntimeError, match=r"config: expected one of .*got t1x1"):
        call.with_argument("config", "t1x1")()
    for name in names:
        call.with_argument("config", name)()


@gpu
def test_packed_bytes_that_do_not_fit():
    call = gemm_call(m=3, n=128, k=1024, dense_width=[256]).to("cuda")
    packed = call.args["w_packed"]
    for wrong in (packed[:-4096], torch.cat([packed, packed]), packed[:4096]):
        with pytest.raises(RuntimeError, match="spense::hybrid_gemm: w_packed: expected"):
            call.with_argument("w_packed", wrong)()
    shifted = torch.cat([packed[:1], packed])[1:]
    with pytest.raises(RuntimeError, match="spense::hybrid_gemm: w_packed: expected"):
        call.with_argument("w_packed", shifted)()


@gpu
@pytest.mark.parametrize("name", ["w_packed", "w_tiles", "x_scale", "w_scale"])
def test_an_argument_on_the_cpu(name):
    call = gemm_call(m=3, n=128, k=256, dense_width=[64]).to("cuda")
    with pytest.raises(RuntimeError, match=f"{name}: expected device cuda:0"):
        ops.hybrid_gemm(**(call.args | {name: call.args[name].cpu()}), **call.kwargs)
