# SPDX-License-Identifier: Apache-2.0
"""The checkpoint form of a layer: encoding, decoding, slices, state dicts, bad contents."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spense_kernels.errors import FormatError
from spense_kernels.format import HybridWeight, Split
from spense_kernels.format.groups import decode_groups, encode_groups, keep_largest_two
from spense_kernels.quant import fp8_to_float, quantize_weight, weight_scale
from spense_kernels.testing.generators import (
    AWKWARD_SHAPES,
    random_dense_weight,
    random_perm,
    random_split,
    random_weight,
    staircase_split,
)

SHAPES = [*[(n, k, 1) for n, k in AWKWARD_SHAPES], (300, 640, 8), (257, 256, 4), (129, 1024, 2)]
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 10_000)
ONE = 0x38  # 1.0 as float8_e4m3fn


def encode_group(*group: int) -> tuple[list[int], int]:
    values, indices, crowded = encode_groups(torch.tensor([group], dtype=torch.uint8))
    assert not crowded.any()
    return values[0].tolist(), int(indices[0, 0])


def test_canonical_encoding_case_by_case():
    a, b = ONE, 0xC0
    assert encode_group(0, 0, 0, 0) == ([0, 0], 0x44)
    assert encode_group(a, 0, 0, 0) == ([a, 0], 0x44)
    assert encode_group(0, a, 0, 0) == ([0, a], 0x44)
    assert encode_group(0, 0, a, 0) == ([0, a], 0x48)
    assert encode_group(0, 0, 0, a) == ([0, a], 0x4C)
    pairs = {(0, 1): 4, (0, 2): 8, (0, 3): 0xC, (1, 2): 9, (1, 3): 0xD, (2, 3): 0xE}
    for (i, j), nibble in pairs.items():
        group = [0, 0, 0, 0]
        group[i], group[j] = a, b
        assert encode_group(*group) == ([a, b], 0x40 | nibble)
    # Even group in the low nibble; short last group; empty nibble behind an odd count.
    assert encode_group(0, 0, a, b, a, 0, b, 0) == ([a, b, a, b], 0x8E)
    assert encode_group(0, 0, 0, a, 0, 0, b, 0, 0, a) == ([0, a, 0, b, 0, a], 0x8C)
    values, indices, _ = encode_groups(torch.tensor([[0, a, 0, 0, b]], dtype=torch.uint8))
    assert (values.tolist(), indices.tolist()) == ([[0, a, b, 0]], [[0x44]])


def test_crowded_groups_are_found():
    block = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    assert encode_groups(block)[2].tolist() == [[False, True], [False, False]]


@given(st.lists(st.sampled_from([0x4, 0x8, 0x9, 0xC, 0xD, 0xE]), min_size=1, max_size=9), seeds)
def test_decoding_follows_the_definition(nibbles, seed):
    torch.manual_seed(seed)
    groups = len(nibbles)
    values = torch.randint(0, 256, (1, 2 * groups), dtype=torch.uint8)
    padded = [*nibbles, 0x4] if groups % 2 else nibbles
    packed = [low | high << 4 for low, high in zip(padded[::2], padded[1::2], strict=True)]
    expected = [0] * (4 * groups)
    for g, nibble in enumerate(nibbles):
        expected[4 * g + (nibble & 3)] = int(values[0, 2 * g])
        expected[4 * g + (nibble >> 2)] = int(values[0, 2 * g + 1])
    indices = torch.tensor([packed], dtype=torch.uint8)
    assert decode_groups(values, indices, 4 * groups)[0].tolist() == expected


@given(shapes, seeds)
def test_from_dense_then_to_dense_is_the_identity(shape, seed):
    split = random_split(*shape, seed=seed)
    weight = random_dense_weight(split, seed, negative_zeros=0.1)
    hybrid = HybridWeight.from_dense(weight, torch.ones(split.n), split).validate()
    expected = torch.where(weight == 0x80, 0, weight)
    assert torch.equal(hybrid.to_dense(), expected)
    for part in (hybrid.values, hybrid.dense):
        assert not (part == 0x80).any()
    assert hybrid.canonical().equal(hybrid)
    as_fp8 = HybridWeight.from_dense(weight.view(torch.float8_e4m3fn), torch.ones(split.n), split)
    assert as_fp8.equal(hybrid)


def test_blocks_stand_where_the_definition_says():
    """One element at a time from the rules of docs/format.md, over shards and widths."""
    split = staircase_split(300, 128, [16, 0, 64], k_shards=2, seed=3)
    weight = random_dense_weight(split, 3)
    hybrid = HybridWeight.from_dense(weight, torch.ones(300), split)
    values, indices, dense = [], [], []
    rows, perm = weight.tolist(), split.k_perm.tolist()
    for shard in range(2):
        for tile, width in enumerate([16, 0, 64]):
            for row in range(128 * tile, min(300, 128 * tile + 128)):
                line = [rows[row][64 * shard + column] for column in perm[shard]]
                nibbles = []
                for g in range((64 - width) // 4):
                    group = line[4 * g : 4 * g + 4]
                    kept, both = encode_group(*[0 if v == 0x80 else v for v in group])
                    values += kept
                    nibbles.append(both & 15)
                indices += [a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True)]
                dense += [0 if v == 0x80 else v for v in line[64 - width :]]
    assert hybrid.values.tolist() == values
    assert hybrid.indices.tolist() == indices
    assert hybrid.dense.tolist() == dense


@given(shapes, seeds)
def test_state_dict_round_trip(shape, seed):
    hybrid = random_weight(random_split(*shape, seed=seed), seed, bias=seed % 2 == 1)
    state = hybrid.state_dict("a.b.")
    assert state["a.b.values"].dtype == torch.float8_e4m3fn
    n, k, _ = shape
    assert HybridWeight.from_state_dict(state, "a.b.", n=n, k=k).equal(hybrid)
    as_bytes = state | {"a.b.values": hybrid.values, "a.b.dense": hybrid.dense}
    assert HybridWeight.from_state_dict(as_bytes, "a.b.").equal(hybrid)


@settings(max_examples=50)
@given(shapes, seeds, st.data())
def test_slices_equal_slices_of_the_dense_weight(shape, seed, data):
    hybrid = random_weight(random_split(*shape, seed=seed), seed, bias=True)
    split, dense = hybrid.split, hybrid.to_dense()
    first = data.draw(st.integers(0, split.tiles - 1))
    last = data.draw(st.integers(first + 1, split.tiles))
    part = hybrid.rows(first, last).validate()
    rows = slice(128 * first, 128 * last)
    assert torch.equal(part.to_dense(), dense[rows])
    assert torch.equal(part.w_scale, hybrid.w_scale[rows])
    assert torch.equal(part.bias, hybrid.bias[rows])
    cut = data.draw(st.integers(1, split.k_shards))
    ends = [0, cut] if cut == split.k_shards else [0, cut, split.k_shards]
    parts = [hybrid.shard(a, b).validate() for a, b in pairwise(ends)]
    assert torch.equal(torch.cat([p.to_dense() for p in parts], dim=1), dense)
    assert [p.bias is None for p in parts] == [False, True][: len(parts)]
    for name in ("values", "indices", "dense"):
        whole = torch.cat([getattr(p, name) for p in parts])
        assert torch.equal(whole, getattr(hybrid, name))


@pytest.mark.parametrize("bias", [False, True])
def test_stack_keeps_every_part(bias):
    perm = random_perm(256, 4)
    parts = [
        random_weight(Split.uniform(n, 256, d, perm, 4), seed=n, bias=bias)
        for n, d in ((200, 64), (128, 0), (130, 256), (5, 128))
    ]
    stacked = HybridWeight.stack(parts).validate()
    dense = stacked.to_dense()
    padding = torch.ones(stacked.split.n, dtype=torch.bool)
    for part, (first, last) in zip(parts, Split.stack_rows([p.split for p in parts]), strict=True):
        assert torch.equal(dense[first:last], part.to_dense())
        assert torch.equal(stacked.w_scale[first:last], part.w_scale)
        if bias:
            assert torch.equal(stacked.bias[first:last], part.bias)
        padding[first:last] = False
    assert not dense[padding].any()
    assert stacked.canonical().equal(stacked)


def test_stack_wants_biases_alike():
    split = Split.uniform(128, 64, 16)
    with pytest.raises(FormatError, match="a bias in all weights or in none"):
        HybridWeight.stack([random_weight(split), random_weight(split, bias=True)])


def test_from_float_quantises_per_row():
    split = staircase_split(200, 100, [16, 100])
    weight = fp8_to_float(random_dense_weight(split, 5)) * 3.7
    hybrid = HybridWeight.from_float(weight, split, bias=torch.ones(200, dtype=torch.bfloat16))
    assert torch.equal(hybrid.w_scale, weight.abs().amax(dim=1).clamp_min(1e-12) / 448)
    # e4m3 has 3 mantissa bits: half a unit in the last place is 1/16 of the value, and 2^-10 of a
    # scale below the smallest normal.
    error = (hybrid.dequantize() - weight).abs()
    assert (error <= weight.abs() / 16 + hybrid.w_scale[:, None] * 2.0**-10).all()
    assert hybrid.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_quantize_weight_edges():
    weight = torch.tensor([[0.0, -0.0], [448.0, 1.0], [1e-20, 0.0], [3e38, -3e38]])
    stored, scale = quantize_weight(weight)
    assert (scale > 0).all()
    assert fp8_to_float(stored)[1].tolist() == [448.0, 1.0]
    assert fp8_to_float(stored)[3].tolist() == [448.0, -448.0]
    assert torch.equal(scale, weight_scale(weight))
    # A scale given from outside may be too small: values saturate, they never become NaN.
    assert fp8_to_float(quantize_weight(weight[1:2], torch.ones(1) / 2)[0])[0].tolist() == [448, 2]
    for bad in (torch.nan, torch.inf):
        with pytest.raises(FormatError, match="must be finite, row 1 has NaN or Inf"):
            quantize_weight(torch.tensor([[1.0], [bad]]))
    with pytest.raises(FormatError, match=r"floating point \[N, K\]"):
        quantize_weight(torch.ones(2, 2, dtype=torch.int32))


def test_keep_largest_two_masks():
    scores = torch.tensor([[4.0, 1, 3, 2, 9, 8]])
    assert keep_largest_two(scores).tolist() == [[True, False, True, False, True, True]]
    assert keep_largest_two(torch.rand(64, 13)).sum() == 64 * (3 * 2 + 1)


def test_from_dense_refuses_what_is_not_two_of_four():
    perm = torch.arange(64).flip(0)
    split = Split.uniform(200, 64, 16, perm)
    weight = torch.zeros(200, 64, dtype=torch.uint8)
    weight[131, 52:55] = ONE
    words = "got 3 in row 131, group 2 of shard 0 \\(columns \\[55, 54, 53, 52\\]\\)"
    with pytest.raises(FormatError, match=words):
        HybridWeight.from_dense(weight, torch.ones(200), split)
    weight[131, 54] = 0x80  # -0.0 is not a nonzero
    assert HybridWeight.from_dense(weight, torch.ones(200), split).to_dense()[131, 52] == ONE
    weight[7, 9] = 0xFF
    with pytest.raises(FormatError, match="got NaN at row 7, column 9"):
        HybridWeight.from_dense(weight, torch.ones(200), split)
    with pytest.raises(FormatError, match=r"of shape \[200, 64\], got torch.float32 \[200, 64\]"):
        HybridWeight.from_dense(weight.float(), torch.ones(200), split)


# Rows 130, columns 130 of which 16 dense: 114 sparse columns, 29 groups, the last one of two
# columns, one unused nibble a row.
SPLIT = Split.uniform(130, 130, 16)
GOOD = random_weight(SPLIT, seed=9, bias=True)
ROW = 58  # value bytes a row
INDEX_ROW = 15


def spoiled(name: str, at, value) -> HybridWeight:
    array = getattr(GOOD, name).clone()
    array[at] = value
    return replace(GOOD, **{name: array})


@pytest.mark.parametrize(
    ("name", "at", "value", "words"),
    [
        ("indices", 0, 0x40, r"indices: a nibble .* byte 0x40 at 0 \(shard 0, tile 0, row 0"),
        ("indices", INDEX_ROW * 129 + 1, 0x14, "byte 0x14 at 1936 .*tile 1, row 1 of the tile"),
        ("indices", INDEX_ROW * 5 + 14, 0x84, "unused high nibble must be 0x4, but row 5"),
        ("values", 3, 0x7F, "values: NaN, byte 0x7F at 3"),
        ("values", ROW * 128, 0xFF, r"values: NaN, byte 0xFF at 7424 \(shard 0, tile 1, row 0"),
        ("dense", 17, 0x7F, "dense: NaN, byte 0x7F at 17 .*row 1 of the tile"),
        ("w_scale", 4, 0.0, "w_scale: must be finite and positive, got 0.0 at row 4"),
        ("w_scale", 4, -1.0, "got -1.0 at row 4"),
        ("w_scale", 4, torch.inf, "got inf at row 4"),
        ("w_scale", 4, torch.nan, "got nan at row 4"),
        ("bias", 129, torch.nan, "bias: must be finite, got nan at 129"),
    ],
)
def test_bad_contents_are_named(name, at, value, words):
    with pytest.raises(FormatError, match=words):
        spoiled(name, at, value).validate()


def test_values_behind_the_last_column_must_be_zero():
    indices, values = GOOD.indices.clone(), GOOD.values.clone()
    indices[14], values[56:58] = 0x4C, torch.tensor([ONE, ONE])  # places 0 and 3 of a group of 2
    bad = replace(GOOD, indices=indices, values=values)
    with pytest.raises(FormatError, match="places behind column 114 must hold 0x00, but row 0"):
        bad.validate()
    values[57] = 0
    replace(GOOD, indices=indices, values=values).validate()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("values", GOOD.values[:-1], r"values must be torch.uint8 of shape \[7540\], got .*7539"),
        ("indices", GOOD.indices.int(), "indices must be torch.uint8 .* got torch.int32"),
        ("dense", None, "dense must be torch.uint8 .* got None"),
        ("w_scale", GOOD.w_scale.double(), "w_scale must be torch.float32 .* got torch.float64"),
        ("w_scale", torch.ones(260)[::2], "w_scale must be contiguous"),
        ("bias", torch.ones(1), r"bias must be torch.float32 of shape \[130\]"),
        ("dense", GOOD.dense.to("meta"), "dense must be on cpu like values, got meta"),
    ],
)
def test_bad_arrays_are_named(name, value, words):
    with pytest.raises(FormatError, match=words):
        replace(GOOD, **{name: value})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("values", None, "l.values: missing tensor"),
        ("k_perm", None, "l.k_perm: missing tensor"),
        ("values", lambda t: t.to(torch.bfloat16), "l.values: must be torch.float8_e4m3fn, got"),
        ("values", lambda t: t[:-4], "l.values: must have shape"),
        ("values", lambda t: t[None], "l.values: must have 1 dimension"),
        ("indices", lambda t: t.long(), "l.indices: must be torch.uint8, got torch.int64"),
        ("dense", lambda t: t[1:], "l.dense: must have shape"),
        ("w_scale", lambda t: t[1:], r"l.w_scale: must have shape \[130\], got \[129\]"),
        ("w_scale", lambda t: t.half(), "l.w_scale: must be torch.float32, got torch.float16"),
        ("k_perm", lambda t: t[:, 1:], "l.k_perm: must have 130 elements, got 129"),
        ("k_perm", lambda t: t * 0, "l: Split: k_perm must be a permutation"),
        ("k_perm", lambda t: t[0], "l.k_perm: must have 2 dimension"),
        ("k_perm", lambda t: t.long(), "l.k_perm: must be torch.int32, got torch.int64"),
        ("dense_width", lambda t: t + 1, "l: Split: dense_width must be a multiple of 16"),
        ("dense_width", lambda t: t[1:], "l: Split: dense_width must have one entry"),
        ("dense_width", lambda t: t + 16, "l.values: must have shape"),
        ("bias", lambda t: t[1:], r"l.bias: must have shape \[130\], got \[129\]"),
    ],
)
def test_bad_state_dicts_are_named(name, change, words):
    state = GOOD.state_dict("l.")
    tensor = state.pop(f"l.{name}")
    if change is not None:
        state[f"l.{name}"] = change(tensor)
    with pytest.raises(FormatError, match=words):
        HybridWeight.from_state_dict(state, "l.", n=130, k=130)
