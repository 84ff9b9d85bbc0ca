# SPDX-License-Identifier: Apache-2.0
"""The C++ packer: the layout's functions, sizes, and what it refuses and where it says so.

test_tile_stream.py compares pack and unpack with the torch twin byte for byte."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spense_kernels import layout, ops
from spense_kernels.format import HybridWeight, Split
from spense_kernels.format.tile_stream import value_offsets
from spense_kernels.testing.generators import legal_widths, random_split, random_weight
from spense_kernels.testing.numeric import assert_bitwise

native = pytest.importorskip("spense_kernels._C").format

ROWS = range(layout.TILE_ROWS)


def test_values_and_metadata_fill_a_sparse_unit_once():
    values = [native.value_offset(m, j) for m in ROWS for j in range(layout.ROW_BYTES)]
    bytes_of_nibbles = [
        native.metadata_offset(m, k) for m in ROWS for k in range(0, layout.SPARSE_UNIT_COLUMNS, 8)
    ]
    assert sorted(values + bytes_of_nibbles) == list(range(layout.SPARSE_UNIT_BYTES))
    assert values == value_offsets().flatten().tolist()


def test_a_row_lies_in_one_128_byte_line_and_chunks_of_16_stay_whole():
    """What copies, swizzled reads and the CPU kernels rely on."""
    for m in ROWS:
        for j in range(0, layout.ROW_BYTES, 16):
            at = native.value_offset(m, j)
            assert at // 128 == m
            assert at % 16 == 0
            assert [native.value_offset(m, j + i) for i in range(16)] == list(range(at, at + 16))


def test_legal_nibbles_are_the_six_ordered_pairs():
    legal = {native.make_nibble(i, j) for j in range(4) for i in range(j)}
    assert {x for x in range(256) if native.legal_nibble(x)} == legal == set(layout.LEGAL_NIBBLES)


@given(st.integers(1, 700), st.integers(1, 3000), st.integers(0, 1 << 16))
def test_sizes_agree_with_python(n, k, seed):
    split = random_split(n, k, seed=seed)
    sizes = native.payload_sizes(n, k, split.widths)
    values, indices, dense = split.payload_bytes()
    assert sizes == {
        "values": values,
        "indices": indices,
        "dense": dense,
        "packed": split.packed_bytes,
        "tiles": split.tiles,
    }


@given(st.integers(1, 40), st.integers(1, 300), st.data())
def test_round_trip_of_every_width(n, k, data):
    width = data.draw(st.sampled_from(legal_widths(k)))
    split = Split.uniform(n, k, width)
    weight = random_weight(split, seed=n + k, negative_zeros=0.1)
    packed = weight.pack()
    assert HybridWeight.from_packed(packed, split, weight.w_scale).equal(weight)


def layer(n: int = 130, k: int = 523, width: int = 208) -> HybridWeight:
    """315 sparse columns: a last group of three, 79 groups, an unused nibble in every row."""
    return random_weight(Split.uniform(n, k, width), seed=1)


def pack(weight: HybridWeight, values=None, indices=None, dense=None):
    given = {"values": values, "indices": indices, "dense": dense}
    arrays = [getattr(weight, name) if t is None else t for name, t in given.items()]
    return ops.pack(*arrays, weight.split.widths, n=weight.split.n, k=weight.split.k)


@pytest.mark.parametrize(
    ("name", "row", "place", "byte", "words"),
    [
        ("indices", 17, 20, 0x45, "got 0x05 (shard 0, tile 0, row 17, group 40)"),
        ("indices", 129, 0, 0x04, "got 0x00 (shard 0, tile 1, row 1, group 1)"),
        ("indices", 3, 39, 0x84, "expected 0x4 in the unused nibble, got 0x08 (shard 0, tile 0"),
        ("values", 5, 6, 0x7F, "no NaN byte, got 0x7F (shard 0, tile 0, row 5, value 6)"),
        ("values", 128, 157, 0xFF, "no NaN byte, got 0xFF (shard 0, tile 1, row 0, value 157)"),
        ("dense", 129, 207, 0x7F, "no NaN byte, got 0x7F (shard 0, tile 1, row 1, column 207)"),
    ],
)
def test_pack_says_what_is_wrong_and_where(name, row, place, byte, words):
    weight = layer()
    array = getattr(weight, name).clone()
    array[row * (array.numel() // 130) + place] = byte
    with pytest.raises(RuntimeError, match=f"^spense::pack: {name}: .*{re.escape(words)}"):
        pack(weight, **{name: array})


def test_pack_refuses_a_value_behind_the_last_column():
    """The last group has three columns; a nibble that keeps the fourth needs a zero there."""
    weight = layer()
    indices, values = weight.indices.clone(), weight.values.clone()
    indices[39] = 0x4C  # places 0 and 3
    values[157] = 0x38
    with pytest.raises(
        RuntimeError, match="values: expected 0x00 behind the last column, got 0x38"
    ):
        pack(weight, indices=indices, values=values)
    values[157] = 0x80  # -0.0 is a zero
    pack(weight, indices=indices, values=values)


def test_first_fault_is_the_same_for_any_number_of_threads():
    weight = layer(n=1280)
    indices = weight.indices.clone()
    per_row = indices.numel() // 1280
    for row in (400, 700, 1279):
        indices[row * per_row] = 0x00
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with pytest.raises(RuntimeError, match="tile 3, row 16, group 0"):
                pack(weight, indices=indices)
    finally:
        torch.set_num_threads(before)


def test_unpack_refuses_a_tampered_stream():
    split = Split.uniform(128, 512, 256)
    weight = random_weight(split, seed=3)
    packed = weight.pack()
    stream = packed.w_packed.clone()
    stream[native.metadata_offset(9, 64)] = 0x44 ^ 0x40
    with pytest.raises(
        RuntimeError, match=r"w_packed: expected a legal 2:4 nibble .* got 0x00 .*9"
    ):
        ops.unpack(stream, packed.w_tiles, split.widths, n=128, k=512)


def test_negative_zeros_are_stored_as_zeros():
    split = Split.uniform(64, 640, 160)
    weight = random_weight(split, seed=4)
    signed = HybridWeight(
        split,
        torch.where(weight.values == 0, 0x80, weight.values),
        weight.indices,
        torch.where(weight.dense == 0, 0x80, weight.dense),
        weight.w_scale,
    )
    assert (signed.values == 0x80).any()
    assert (signed.dense == 0x80).any()
    assert_bitwise(signed.pack().w_packed, weight.pack().w_packed)
