# SPDX-License-Identifier: Apache-2.0
"""The contract of every op: opcheck, no mutation or alias, compile, export, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from spense_kernels import ops
from spense_kernels.testing.op_inputs import (
    OpCall,
    gated_call,
    gemm_call,
    norm_call,
    pack_call,
    quantize_call,
    unpack_call,
)

# Ragged rows, ragged columns, one token, no token, several shards, no sparse or no dense part.
CALLS: dict[str, list[Callable[[], OpCall]]] = {
    "hybrid_gemm": [
        lambda: gemm_call(m=3, n=200, k=512, dense_width=[128, 256]),
        lambda: gemm_call(m=1, n=128, k=70, dense_width=[16], bias=True, out_dtype=torch.float32),
        lambda: gemm_call(m=5, n=130, k=384, dense_width=[0, 384], per_tensor=True),
        lambda: gemm_call(m=0, n=16, k=256, dense_width=[0], out_dtype=torch.float16),
    ],
    "quantize_fp8": [
        lambda: quantize_call(m=4, k=200, dtype=torch.bfloat16, gather=True),
        lambda: quantize_call(m=2, k=128, dtype=torch.float16, gather=False),
        lambda: quantize_call(m=0, k=17, dtype=torch.float32, gather=True),
    ],
    "rms_norm_quantize": [
        lambda: norm_call(m=4, k=200, dtype=torch.bfloat16),
        lambda: norm_call(m=2, k=128, dtype=torch.float16, gather=False, unit_offset=True),
        lambda: norm_call(m=0, k=17, dtype=torch.float32),
    ],
    "add_rms_norm_quantize": [
        lambda: norm_call(m=4, k=200, dtype=torch.bfloat16, add=True, weight_dtype=torch.float32),
        lambda: norm_call(m=1, k=1, dtype=torch.float32, add=True, unit_offset=True),
        lambda: norm_call(m=0, k=130, dtype=torch.float16, add=True, gather=False),
    ],
    "silu_mul_quantize": [
        lambda: gated_call(m=4, k=200, dtype=torch.bfloat16),
        lambda: gated_call(m=2, k=17, dtype=torch.float32, gather=False),
        lambda: gated_call(m=0, k=64, dtype=torch.float16, halves=False),
    ],
    "gelu_mul_quantize": [
        lambda: gated_call(m=4, k=200, dtype=torch.bfloat16, gelu="none"),
        lambda: gated_call(m=1, k=300, dtype=torch.float16, gather=False, gelu="tanh"),
        lambda: gated_call(m=0, k=64, dtype=torch.float32, gelu="tanh", halves=False),
    ],
    "pack": [
        lambda: pack_call(n=200, k=512, dense_width=[128, 256]),
        lambda: pack_call(n=130, k=256, dense_width=[16, 0], k_shards=4),
        lambda: pack_call(n=1, k=3, dense_width=[0]),
    ],
    "unpack": [
        lambda: unpack_call(n=200, k=512, dense_width=[128, 256]),
        lambda: unpack_call(n=130, k=256, dense_width=[16, 0], k_shards=4),
        lambda: unpack_call(n=1, k=3, dense_width=[0]),
    ],
}
SAMPLES = [
    pytest.param(make, id=f"{name}-{i}")
    for name, makes in CALLS.items()
    for i, make in enumerate(makes)
]
# torch's own schema test compares inputs with allclose, which FP8 does not have;
# test_inputs_stay_and_outputs_are_fresh takes its place.
FP8_INPUTS = {"hybrid_gemm"}
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def tensors_of(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, which compare for every dtype and for NaN."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same(actual: object, expected: object) -> None:
    """Equal bytes, dtypes, shapes and strides."""
    pairs = zip(tensors_of(actual), tensors_of(expected), strict=True)
    for a, b in pairs:
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(raw(a), raw(b))


def test_every_op_has_samples():
    assert set(CALLS) == set(ops.SCHEMAS)


@pytest.mark.parametrize("make", SAMPLES)
def test_opcheck(make):
    call = make()
    utils = OPCHECKS if call.op in FP8_INPUTS else (*OPCHECKS, "test_schema")
    op = getattr(torch.ops.spense, call.op).default
    torch.library.opcheck(op, tuple(call.args.values()), call.kwargs, test_utils=utils)


@pytest.mark.parametrize("make", SAMPLES)
def test_inputs_stay_and_outputs_are_fresh(make):
    call = make()
    before = {name: raw(tensor).clone() for name, tensor in call.tensors().items()}
    outputs = tensors_of(call())
    for name, tensor in call.tensors().items():
        assert torch.equal(raw(tensor), before[name]), f"{call.op} wrote to {name}"
    inputs = {t.untyped_storage().data_ptr() for t in call.tensors().values()}
    owned = [t.untyped_storage().data_ptr() for t in outputs if t.untyped_storage().nbytes()]
    assert len(owned) == len({*owned}), f"{call.op}: outputs share memory"
    assert not inputs & {*owned}, f"{call.op}: an output shares memory with an input"


@pytest.mark.parametrize("make", SAMPLES)
def test_python_function_is_the_op(make):
    call = make()
    assert_same(getattr(ops, call.op)(**call.args, **call.kwargs), call())


@pytest.mark.parametrize("make", SAMPLES)
def test_compile_full_graph(make):
    torch.compiler.reset()  # all samples compile one code object, and recompiling has a limit
    call = make()
    names, others = list(call.tensors()), copy.copy(call.args)

    def run(*tensors: Tensor) -> object:
        args = others | dict(zip(names, tensors, strict=True))
        return getattr(ops, call.op)(**args, **call.kwargs)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*call.tensors().values()), call())


class Layer(torch.nn.Module):
    """quantize_fp8 then hybrid_gemm, as SpenseLinear calls them."""

    def __init__(self, n: int, k: int, dense_width: list[int]) -> None:
        super().__init__()
        self.n, self.k = n, k
        call = gemm_call(m=1, n=n, k=k, dense_width=dense_width)
        for name in ("w_packed", "w_tiles", "w_scale"):
            self.register_buffer(name, call.args[name])
        self.register_buffer("gather", torch.randperm(k, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x8, scale = ops.quantize_fp8(x, self.gather)
        return ops.hybrid_gemm(
            x8, self.w_packed, self.w_tiles, scale, self.w_scale, n=self.n, k=self.k
        )


def test_inductor_compiles_a_layer_once_for_all_token_counts():
    layer = Layer(n=200, k=320, dense_width=[64, 0])
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for m in (4, 7, 2):
        x = torch.randn(m, 320, dtype=torch.bfloat16)
        assert_same(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", SAMPLES)
def test_export(make):
    call = make()

    class Op(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> object:
            args = call.args | dict(zip(call.tensors(), tensors, strict=True))
            return getattr(torch.ops.spense, call.op)(*args.values(), **call.kwargs)

    inputs = tuple(call.tensors().values())
    program = torch.export.export(Op(), inputs)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"spense.{call.op}.default" in targets
    assert_same(program.module()(*inputs), call())


def test_export_with_a_free_token_count():
    layer = Layer(n=130, k=256, dense_width=[0, 256])
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    x = torch.randn(8, 256, dtype=torch.bfloat16)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: tokens}})
    other = torch.randn(33, 256, dtype=torch.bfloat16)
    assert_same(program.module()(other), layer(other))


def test_forward_works_and_backward_is_refused():
    x = torch.randn(2, 64, requires_grad=True)
    _, scale = ops.quantize_fp8(x)
    call = gemm_call(m=2, n=16, k=64, dense_width=[0])
    y = call.with_argument("x_scale", scale)()
    assert y.requires_grad
    with pytest.raises(
        NotImplementedError, match=r"spense::hybrid_gemm: backward: expected a call"
    ):
        y.sum().backward()
    with pytest.raises(NotImplementedError, match=r"spense::quantize_fp8: backward"):
        scale.sum().backward()
    assert x.grad is None


def test_no_gradient_is_asked_under_no_grad():
    x = torch.randn(2, 64, requires_grad=True)
    with torch.no_grad():
        _, scale = ops.quantize_fp8(x)
    assert not scale.requires_grad


def test_quantized_rows_lie_on_zero_padding():
    x8, _ = ops.quantize_fp8(torch.full((3, 130), 5.0))
    assert x8.stride() == (256, 1)
    padded = x8.as_strided((3, 256), (256, 1)).view(torch.uint8)
    assert torch.equal(padded[:, 130:], torch.zeros(3, 126, dtype=torch.uint8))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_threads(threads):
    calls = [make() for makes in CALLS.values() for make in makes]
    expected = [call() for call in calls]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for call, result in zip(calls, expected, strict=True):
            assert_same(call(), result)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stride", [70, 71, 256])
def test_any_row_stride_of_x_gives_the_same(stride):
    call = gemm_call(m=4, n=130, k=70, dense_width=[16, 0])
    x = torch.zeros(4, stride, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, :70]
    x.view(torch.uint8).copy_(call.args["x"].view(torch.uint8))
    assert_same(call.with_argument("x", x)(), call())
    same_row = call.args["x"][:1].expand(4, 70)
    repeated = call.with_argument("x", same_row.view(torch.uint8).clone().view(same_row.dtype))
    assert_same(call.with_argument("x", same_row)(), repeated())


def test_calls_from_several_python_threads():
    calls = [make() for makes in CALLS.values() for make in makes]
    expected = [call() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: [call() for call in calls], range(8)):
            for result, wanted in zip(results, expected, strict=True):
                assert_same(result, wanted)
