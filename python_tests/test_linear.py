# SPDX-License-Identifier: Apache-2.0
"""SpenseLinear: results, state dict, casts, copies, compile, export, errors."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spense_kernels.errors import SpenseError
from spense_kernels.format import HybridWeight, Split
from spense_kernels.linear import SpenseLinear
from spense_kernels.quant import fp8_to_float
from spense_kernels.testing.generators import (
    AWKWARD_SHAPES,
    random_activations,
    random_split,
    random_weight,
    staircase_split,
)
from spense_kernels.testing.numeric import assert_bitwise
from spense_kernels.testing.reference import linear_float64

SHAPES = [*[(n, k, 1) for n, k in AWKWARD_SHAPES], (300, 640, 8), (257, 1024, 2)]


def example(seed: int = 0, bias: bool = True) -> tuple[SpenseLinear, HybridWeight]:
    weight = random_weight(staircase_split(200, 384, [96, 16], 2, seed), seed, bias)
    return SpenseLinear.from_hybrid(weight), weight


def check_result(y: torch.Tensor, x: torch.Tensor, weight: HybridWeight) -> None:
    """Within the bound of float32 sums plus one rounding to the result's dtype."""
    expected, bound = linear_float64(x, weight)
    got = y.reshape(-1, weight.split.n).double()
    rounding = expected.abs() * torch.finfo(y.dtype).eps / 2 + torch.finfo(y.dtype).tiny
    assert ((got - expected).abs() <= bound * (1 + torch.finfo(y.dtype).eps) + rounding).all()


@settings(max_examples=40)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([(), (1,), (0,), (7,), (2, 3), (2, 0, 4), (33,)]),
    st.integers(0, 1000),
)
def test_forward_equals_the_reference(shape, dtype, leading, seed):
    weight = random_weight(random_split(*shape, seed=seed), seed, bias=seed % 2 == 1)
    layer = SpenseLinear.from_hybrid(weight)
    k = shape[1]
    x = random_activations(max(1, torch.Size(leading).numel()), k, seed, dtype)
    x = x[: torch.Size(leading).numel()].reshape(*leading, k)
    y = layer(x)
    assert y.shape == (*leading, weight.split.n)
    assert y.dtype == dtype
    check_result(y, x, weight)


def test_forward_takes_any_strides():
    layer, _ = example()
    wide = random_activations(6, 2 * 384)
    expected = layer(wide[:, :384].contiguous())
    assert_bitwise(layer(wide[:, :384]), expected)
    assert_bitwise(layer(wide[:, :384].t().contiguous().t()), expected)
    shuffled = wide[:, :384].reshape(2, 3, 384).transpose(0, 1)
    assert_bitwise(layer(shuffled), expected.reshape(2, 3, 200).transpose(0, 1))


def test_state_dict_is_the_checkpoint_form():
    layer, weight = example()
    state = nn.Sequential(layer).state_dict()
    expected = weight.state_dict("0.")
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert_bitwise(tensor, expected[name])
    assert layer.hybrid_weight().equal(weight)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [False, True])
def test_load_state_dict(assign, device, bias):
    source, weight = example(bias=bias)
    with torch.device(device):
        model = nn.Sequential(SpenseLinear(384, 200, bias=bias))
    assert set(model.state_dict()) == {f"0.{name}" for name in weight.state_dict()}
    model.load_state_dict({f"0.{k}": v for k, v in source.state_dict().items()}, assign=assign)
    x = random_activations(5, 384)
    assert model[0].w_packed.device.type == "cpu"
    assert_bitwise(model(x), source(x))


def test_loading_replaces_another_split():
    layer, _ = example(seed=1)
    other = SpenseLinear.from_hybrid(random_weight(Split.uniform(200, 384, 384), bias=True))
    other.load_state_dict(layer.state_dict())
    assert other.split == layer.split
    x = random_activations(2, 384)
    assert_bitwise(other(x), layer(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("0.dense"), 'Missing key(s) in state_dict: "0.dense"'),
        (lambda s: s.update({"0.weight": s["0.values"]}), 'Unexpected key(s) in state_dict: "0.w'),
        (lambda s: s.pop("0.bias"), 'Missing key(s) in state_dict: "0.bias"'),
        (lambda s: s["0.indices"].fill_(0), "0.indices: a nibble whose places are not ascending"),
        (lambda s: s["0.k_perm"].fill_(0), "k_perm must be a permutation"),
        (lambda s: s.update({"0.values": s["0.values"][1:]}), "0.values: must have shape"),
        (lambda s: s["0.w_scale"].fill_(0), "0.w_scale: must be finite and positive"),
    ],
)
def test_bad_state_dicts_change_nothing(change, words):
    layer, weight = example()
    state = {f"0.{k}": v.clone() for k, v in example(seed=5)[0].state_dict().items()}
    change(state)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        nn.Sequential(layer).load_state_dict(state)
    if "Unexpected" not in words:
        assert layer.hybrid_weight().equal(weight)


def test_wrong_shapes_are_named():
    layer, _ = example(bias=False)
    with pytest.raises(RuntimeError, match=r"w_scale: must have shape \[201\], got \[200\]"):
        SpenseLinear(384, 201).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="k_perm: must have 383 elements, got 384"):
        SpenseLinear(383, 200).load_state_dict(layer.state_dict())
    for x in (torch.ones(4, 192), torch.ones(2, 2 * 384)):
        with pytest.raises(SpenseError, match=r"must have 384 columns \(in_features\), got"):
            layer(x)
    with pytest.raises(RuntimeError, match="spense::quantize_fp8: x: expected dtype"):
        layer(torch.ones(4, 384, dtype=torch.float64))


def test_a_layer_without_weight_says_so():
    layer = SpenseLinear(64, 32, bias=True)
    for use in (lambda: layer(torch.ones(1, 64)), layer.hybrid_weight, layer.dequantize):
        with pytest.raises(SpenseError, match="no weight yet; load a state dict first"):
            use()
    assert "no weight yet" in repr(layer)
    assert all(t.device.type == "meta" for t in layer.state_dict().values())


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
    ],
)
def test_casts_leave_every_byte(cast):
    layer, _ = example()
    before = {name: b.clone() for name, b in layer.named_buffers()}
    cast(layer)
    for name, buffer in layer.named_buffers():
        assert_bitwise(buffer, before[name])


def test_moves_to_meta_and_back():
    layer, _ = example()
    layer.half().to("meta")
    assert {b.device.type for b in layer.buffers()} == {"meta"}
    dtypes = {name: b.dtype for name, b in layer.named_buffers()}
    layer.to_empty(device="cpu")
    assert {name: b.dtype for name, b in layer.named_buffers()} == dtypes
    assert dtypes["w_scale"] == dtypes["bias"] == torch.float32


def test_deepcopy_and_pickle():
    layer, weight = example()
    x = random_activations(3, 384)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.hybrid_weight().equal(weight)
        assert_bitwise(other(x), layer(x))
        other.w_scale.fill_(1)
        assert layer.hybrid_weight().equal(weight)


def test_repr_is_readable():
    layer, _ = example()
    assert repr(layer) == (
        "SpenseLinear(in_features=384, out_features=200, bias=True, d=0.3500, k_shards=2, "
        f"packed_bytes={layer.split.packed_bytes})"
    )


def test_gradients_are_refused_in_words():
    layer, _ = example()
    x = random_activations(3, 384, dtype=torch.float32).requires_grad_()
    y = layer.train()(x)
    with pytest.raises(NotImplementedError, match=r"spense::hybrid_gemm: backward: .* inference"):
        y.sum().backward()
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_dequantize_is_a_linear_of_the_same_weight():
    layer, weight = example()
    linear = layer.dequantize(torch.float32)
    assert isinstance(linear, nn.Linear)
    assert_bitwise(linear.weight.data, weight.dequantize())
    assert_bitwise(linear.bias.data, weight.bias)
    assert not linear.weight.requires_grad
    assert "bias=False" in repr(example(bias=False)[0].dequantize())


@pytest.mark.parametrize(("n", "k", "shards"), [(200, 256, 1), (64, 384, 2), (5, 100, 1)])
def test_from_dense_keeps_the_largest(n, k, shards):
    torch.manual_seed(n)
    linear = nn.Linear(k, n)
    weight = linear.weight.detach()
    layer = SpenseLinear.from_dense(linear, 0.25, shards)
    split = layer.split
    assert split == Split.from_fraction(n, k, 0.25, split.k_perm, shards)
    norms = weight.square().sum(dim=0)[split.columns()]
    assert (norms.diff(dim=1) >= 0).all()
    kept = layer.hybrid_weight().to_dense()
    scale = layer.w_scale
    for columns in split.columns():
        sparse = columns[: split.shard_columns - split.widths[0]]
        dense = columns[split.shard_columns - split.widths[0] :]
        error = fp8_to_float(kept[:, dense]) * scale[:, None] - weight[:, dense]
        assert (error.abs() <= weight[:, dense].abs() / 16 + scale[:, None] * 2.0**-10).all()
        for group in sparse.split(4):
            smallest_kept = weight[:, group].abs().where(kept[:, group] != 0, torch.inf).amin(1)
            dropped = weight[:, group].abs().where(kept[:, group] == 0, 0).amax(1)
            # A kept weight below half of the smallest FP8 step rounds to zero as well.
            assert (dropped <= smallest_kept + scale * 2.0**-10).all()
    assert_bitwise(layer.bias, linear.bias.detach())


def test_from_dense_without_padding_to_shards():
    with pytest.raises(SpenseError, match="k must be a multiple of 16 \\* k_shards = 32, got 100"):
        SpenseLinear.from_dense(nn.Linear(100, 8), k_shards=2)


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_compiles_in_one_graph(leading):
    layer, _ = example()
    model = nn.Sequential(layer, nn.GELU()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = random_activations(6, 384)[: torch.Size(leading).numel()].reshape(*leading, 384)
    with torch.no_grad():
        assert_bitwise(compiled(x), model(x))


def test_compiles_for_any_number_of_rows():
    layer, _ = example()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for m in (5, 3, 0, 1, 17):
            x = random_activations(max(m, 1), 384)[:m]
            assert_bitwise(compiled(x), layer(x))


def test_exports():
    layer, _ = example()
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(
            nn.Sequential(layer), (random_activations(4, 384),), dynamic_shapes=({0: rows},)
        )
        x = random_activations(9, 384)
        assert_bitwise(exported.module()(x), layer(x))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"spense.quantize_fp8.default", "spense.hybrid_gemm.default"} <= called
