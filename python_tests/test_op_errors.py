# SPDX-License-Identifier: Apache-2.0
"""Bad input: every argument of every op, wrong in each way it can be, is named with what was
expected and what came, in the same words from the op and from its fake kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from spense_kernels import _fake, ops
from spense_kernels.testing.op_inputs import (
    OpCall,
    gated_call,
    gemm_call,
    norm_call,
    pack_call,
    quantize_call,
    unpack_call,
)

GOOD = {
    "hybrid_gemm": lambda: gemm_call(m=3, n=200, k=512, dense_width=[128, 256], bias=True),
    "quantize_fp8": lambda: quantize_call(m=4, k=200, dtype=torch.bfloat16, gather=True),
    "rms_norm_quantize": lambda: norm_call(m=4, k=200, dtype=torch.bfloat16),
    "add_rms_norm_quantize": lambda: norm_call(m=4, k=200, dtype=torch.bfloat16, add=True),
    "silu_mul_quantize": lambda: gated_call(m=4, k=200, dtype=torch.bfloat16),
    "gelu_mul_quantize": lambda: gated_call(m=4, k=200, dtype=torch.bfloat16, gelu="tanh"),
    "pack": lambda: pack_call(n=200, k=512, dense_width=[128, 64], k_shards=2),
    "unpack": lambda: unpack_call(n=200, k=512, dense_width=[128, 64], k_shards=2),
}


@dataclass(frozen=True)
class Bad:
    op: str
    argument: str
    change: Callable[[object], object]
    words: str  # what follows "spense::<op>: <argument>: "
    reported: str | None = None  # where another argument than the changed one is to blame

    def call(self) -> OpCall:
        good = GOOD[self.op]()
        value = {**good.args, **good.kwargs}[self.argument]
        return good.with_argument(self.argument, self.change(value))

    def text(self) -> str:
        return f"spense::{self.op}: {self.reported or self.argument}: {self.words}"


def cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


def value(new: object) -> Callable[[object], object]:
    return lambda _: new


def strided(tensor: Tensor) -> Tensor:
    """The same values, every element followed by a gap."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:1]])


def misplaced(tensor: Tensor) -> Tensor:
    """The same values one element behind an aligned address."""
    return torch.cat([tensor[:1], tensor])[1:]


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


# The tensors of pack and unpack that differ in nothing but name and size.
PAYLOAD = {"values": 30208, "indices": 7552, "dense": 41984}
GEMM, QUANT, PACK, UNPACK = "hybrid_gemm", "quantize_fp8", "pack", "unpack"
NORM, ADD = "rms_norm_quantize", "add_rms_norm_quantize"
SILU, GELU = "silu_mul_quantize", "gelu_mul_quantize"
# Ops that quantise rows, with the name of their first input, and inputs that go with it.
ROWS = {QUANT: "x", NORM: "x", ADD: "x", SILU: "gate", GELU: "gate"}
ALIKE = {ADD: "residual", SILU: "up", GELU: "up"}
U8, I32, F32 = torch.uint8, torch.int32, torch.float32
E = "expected "
FLOATS = "dtype bfloat16 or float16 or float32, got "

METADATA_CASES = [
    Bad(GEMM, "x", cast(F32), E + "dtype float8_e4m3fn, got float32"),
    Bad(GEMM, "x", cast(torch.float8_e5m2), E + "dtype float8_e4m3fn, got float8_e5m2"),
    Bad(GEMM, "x", flat, E + "2 dimensions, got 1"),
    Bad(GEMM, "x", lambda x: x[:, :500], E + "512 columns (k), got 500"),
    Bad(GEMM, "x", strided, E + "stride 1 in the last dimension, got 2"),
    Bad(GEMM, "w_packed", cast(torch.int8), E + "dtype uint8, got int8"),
    Bad(GEMM, "w_packed", lambda w: w.view(-1, 4096), E + "1 dimensions, got 2"),
    Bad(GEMM, "w_packed", strided, E + "a contiguous tensor, got strides [2] for shape [106496]"),
    Bad(GEMM, "w_packed", lambda w: w[:-1], E + "a multiple of 4096 bytes, got 106495"),
    Bad(GEMM, "w_tiles", cast(torch.int64), E + "dtype int32, got int64"),
    Bad(GEMM, "w_tiles", lambda t: t[:-1], E + "shape [3, 4], got [2, 4]"),
    Bad(GEMM, "w_tiles", flat, E + "shape [3, 4], got [12]"),
    Bad(GEMM, "w_tiles", strided, E + "a contiguous tensor, got strides [8, 2] for shape [3, 4]"),
    Bad(GEMM, "x_scale", cast(torch.float64), E + "dtype float32, got float64"),
    Bad(GEMM, "x_scale", lambda s: s[:, None], E + "1 dimensions, got 2"),
    Bad(GEMM, "x_scale", lambda s: s[:2], E + "shape [3] or [1], got [2]"),
    Bad(GEMM, "x_scale", strided, E + "a contiguous tensor, got strides [2] for shape [3]"),
    Bad(GEMM, "w_scale", cast(torch.bfloat16), E + "dtype float32, got bfloat16"),
    Bad(GEMM, "w_scale", lambda s: s[:1], E + "shape [200], got [1]"),
    Bad(GEMM, "w_scale", strided, E + "a contiguous tensor, got strides [2] for shape [200]"),
    Bad(GEMM, "bias", cast(torch.float16), E + "dtype float32, got float16"),
    Bad(GEMM, "bias", lambda b: b[None], E + "shape [200], got [1, 200]"),
    Bad(GEMM, "bias", strided, E + "a contiguous tensor, got strides [2] for shape [200]"),
    Bad(GEMM, "n", value(0), E + "at least 1, got 0"),
    Bad(GEMM, "n", value(300), E + "shape [4, 4], got [3, 4]", reported="w_tiles"),
    Bad(GEMM, "k", value(-1), E + "at least 1, got -1"),
    Bad(GEMM, "k", value(640), E + "640 columns (k), got 512", reported="x"),
    Bad(GEMM, "layout", value(2), E + "1 (tile stream version 1), got 2"),
    Bad(
        GEMM,
        "out_dtype",
        value(torch.float64),
        E + "dtype bfloat16 or float16 or float32, got float64",
    ),
    *(
        case
        for op, x in ROWS.items()
        for case in (
            Bad(op, x, cast(torch.float64), E + FLOATS + "float64"),
            Bad(op, x, cast(torch.int32), E + FLOATS + "int32"),
            Bad(op, x, flat, E + "2 dimensions, got 1"),
            Bad(op, x, strided, E + "stride 1 in the last dimension, got 2"),
            Bad(op, x, lambda x: x[:, :0], E + "at least 1, got 0", reported=f"{x}.shape[1]"),
            Bad(op, "gather", cast(torch.int64), E + "dtype int32, got int64"),
            Bad(op, "gather", lambda g: g[1:], E + "shape [200], got [199]"),
            Bad(op, "gather", strided, E + "a contiguous tensor, got strides [2] for shape [200]"),
        )
    ),
    *(
        case
        for op, other in ALIKE.items()
        for case in (
            Bad(op, other, cast(torch.float16), E + "dtype bfloat16, got float16"),
            Bad(op, other, flat, E + "2 dimensions, got 1"),
            Bad(op, other, lambda r: r[:3], E + "shape [4, 200], got [3, 200]"),
            Bad(op, other, lambda r: r[:, 1:], E + "shape [4, 200], got [4, 199]"),
            Bad(op, other, strided, E + "stride 1 in the last dimension, got 2"),
        )
    ),
    *(
        case
        for op in (NORM, ADD)
        for case in (
            Bad(op, "weight", cast(torch.float16), E + "dtype bfloat16 or float32, got float16"),
            Bad(op, "weight", lambda w: w[None], E + "shape [200], got [1, 200]"),
            Bad(op, "weight", strided, E + "a contiguous tensor, got strides [2] for shape [200]"),
            Bad(op, "eps", value(-0.5), E + "at least 0, got -0.5"),
            Bad(op, "eps", value(float("nan")), E + "at least 0, got nan"),
        )
    ),
    Bad(GELU, "approximate", value("erf"), E + "none or tanh, got erf"),
    *(Bad(PACK, name, cast(I32), E + "dtype uint8, got int32") for name in PAYLOAD),
    *(
        Bad(PACK, name, longer, E + f"shape [{size}], got [{size + 1}]")
        for name, size in PAYLOAD.items()
    ),
    *(
        Bad(PACK, name, strided, E + f"a contiguous tensor, got strides [2] for shape [{size}]")
        for name, size in PAYLOAD.items()
    ),
    Bad(UNPACK, "w_packed", cast(I32), E + "dtype uint8, got int32"),
    Bad(UNPACK, "w_packed", lambda w: w[:-4096], E + "shape [106496], got [102400]"),
    Bad(UNPACK, "w_packed", strided, E + "a contiguous tensor, got strides [2] for shape [106496]"),
    Bad(UNPACK, "w_tiles", cast(F32), E + "dtype int32, got float32"),
    Bad(UNPACK, "w_tiles", lambda t: t[:, :3].contiguous(), E + "shape [3, 4], got [3, 3]"),
    Bad(UNPACK, "w_tiles", strided, E + "a contiguous tensor, got strides [8, 2] for shape [3, 4]"),
    Bad(UNPACK, "layout", value(0), E + "1 (tile stream version 1), got 0"),
    *(
        case
        for op in (PACK, UNPACK)
        for case in (
            Bad(op, "n", value(0), E + "at least 1, got 0"),
            Bad(op, "k", value(0), E + "at least 1, got 0"),
            Bad(op, "k_shards", value(0), E + "at least 1, got 0"),
            Bad(op, "k", value(520), E + "a multiple of 16 * k_shards = 32, got 520"),
            Bad(
                op,
                "dense_width",
                value([128]),
                E + "2 widths (one for each 128 rows of n), got 1",
            ),
            *(
                Bad(
                    op,
                    "dense_width",
                    value([128, width]),
                    E + f"0, 256 or a multiple of 16 below it, got {width} (tile 1)",
                )
                for width in (-16, 8, 250, 272)
            ),
        )
    ),
]


def cases(*bads: Bad) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "bad", [pytest.param(b, id=f"{b.op}-{b.argument}-{i}") for i, b in enumerate(bads)]
    )


@cases(*METADATA_CASES)
def test_op_and_fake_say_the_same(bad):
    call = bad.call()
    with pytest.raises(RuntimeError, match=re.escape(bad.text())) as eager:
        call()
    with pytest.raises(RuntimeError) as fake:
        getattr(_fake, call.op)(*call.args.values(), **call.kwargs)
    assert str(eager.value).splitlines()[0] == str(fake.value).splitlines()[0] == bad.text()


def test_every_argument_is_in_the_table():
    tried = {(bad.op, bad.argument) for bad in METADATA_CASES}
    # Any bool; names are checked below.
    free = {(GEMM, "fast_accum"), (GEMM, "config"), (NORM, "unit_offset"), (ADD, "unit_offset")}
    for name in ops.SCHEMAS:
        schema = getattr(torch.ops.spense, name).default._schema
        assert {(name, a.name) for a in schema.arguments} <= tried | free


@pytest.mark.parametrize(
    ("op", "argument", "first"),
    [
        *((GEMM, a, "x") for a in ("w_packed", "w_tiles", "x_scale", "w_scale", "bias")),
        *((op, "gather", x) for op, x in ROWS.items()),
        *((op, other, ROWS[op]) for op, other in ALIKE.items()),
        (NORM, "weight", "x"),
        (ADD, "weight", "x"),
        (PACK, "indices", "values"),
        (PACK, "dense", "values"),
        (UNPACK, "w_tiles", "w_packed"),
    ],
)
def test_wrong_device(op, argument, first):
    good = GOOD[op]()
    call = good.with_argument(argument, good.args[argument].to("meta"))
    words = f"spense::{op}: {argument}: expected device cpu as of {first}, got meta"
    with pytest.raises(RuntimeError, match=re.escape(words)):
        call()


def changed(place: int | tuple[int, ...], new: int) -> Callable[[Tensor], Tensor]:
    """A copy with one element changed."""

    def change(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy[place] = new
        return copy

    return change


# What only the data shows; the fakes cannot know it.
DATA_CASES = [
    Bad(GEMM, "w_packed", misplaced, E + "data aligned to 16 bytes, got an address 1 bytes behind"),
    Bad(GEMM, "w_packed", lambda w: w[:-4096], E + "106496 bytes, got 102400"),
    Bad(GEMM, "w_tiles", changed((1, 0), 99), E + "13 at [1, 0], got 99"),
    Bad(GEMM, "w_tiles", changed((0, 2), -1), E + "2 at [0, 2], got -1"),
    Bad(GEMM, "w_tiles", changed((2, 3), 0), E + "6 at [2, 3], got 0"),
    *(
        Bad(op, "gather", changed(at, new), E + f"columns in [0, 200), got {new} at position {at}")
        for op in ROWS
        for at, new in ((3, 200), (0, -1))
    ),
    Bad(PACK, "values", changed(7, 0x7F), E + "no NaN byte, got 0x7F"),
    Bad(PACK, "dense", changed(0, 0xFF), E + "no NaN byte, got 0xFF"),
    Bad(PACK, "indices", changed(0, 0x40), E + "a legal 2:4 nibble"),
    Bad(UNPACK, "w_tiles", changed((0, 1), 0), E + "1 at [0, 1], got 0"),
    Bad(UNPACK, "w_packed", changed(16384, 0x40), E + "a legal 2:4 nibble"),
    Bad(UNPACK, "w_packed", changed(slice(73728, 90112), 1), E + "at most two values in four"),
]


@cases(*DATA_CASES)
def test_bad_data(bad):
    with pytest.raises(RuntimeError, match="^" + re.escape(bad.text())):
        bad.call()()


def test_unknown_config_lists_the_known():
    call = GOOD[GEMM]().with_argument("config", "turbo")
    known = r"spense::hybrid_gemm: config: expected one of .*reference.*, got turbo"
    with pytest.raises(RuntimeError, match=known):
        call()


def test_no_cuda_says_why():
    kernel = ops._no_cuda("pack", "this torch has no CUDA")
    words = "spense::pack: device: expected cpu, got cuda, but this torch has no CUDA"
    with pytest.raises(RuntimeError, match=words):
        kernel()


def test_errors_name_no_source_path():
    with pytest.raises(RuntimeError) as caught:
        GOOD[GEMM]().with_argument("layout", 7)()
    assert "/" not in str(caught.value).splitlines()[0]
