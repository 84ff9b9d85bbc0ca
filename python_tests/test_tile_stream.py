# SPDX-License-Identifier: Apache-2.0
"""The packed form: torch twin against its definition, ops against the twin, byte for byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spense_kernels import layout, ops
from spense_kernels.errors import FormatError
from spense_kernels.format import HybridWeight, Split, pack_reference, unpack_reference
from spense_kernels.format.tile_stream import tile_table, value_offsets
from spense_kernels.testing.generators import (
    AWKWARD_SHAPES,
    random_split,
    random_weight,
    staircase_split,
)
from spense_kernels.testing.numeric import assert_bitwise

SHAPES = [
    *[(n, k, 1) for n, k in AWKWARD_SHAPES],
    (300, 640, 8),
    (257, 256, 4),
    (129, 1024, 2),
    (130, 800, 1),
    (256, 1056, 2),
]


def twin(weight: HybridWeight) -> tuple[torch.Tensor, torch.Tensor]:
    return pack_reference(weight.values, weight.indices, weight.dense, weight.split)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_byte_stands_where_the_layout_says(shape):
    """Reads the stream with the formulas of tile_stream.h, one place at a time in Python."""
    n, k, shards = shape
    split = random_split(n, k, shards, seed=1)
    weight = random_weight(split, seed=1, negative_zeros=0.02)
    w_packed, w_tiles = twin(weight)
    stream, table = w_packed.tolist(), w_tiles.tolist()
    expected = weight.to_dense()[:, split.gather().long()]
    got = torch.zeros(128 * split.tiles, layout.padded_k(k), dtype=torch.uint8)
    for tile in range(split.tiles):
        at, sparse, dense, _ = table[tile]
        at *= 4096
        for m in range(128):
            line = []
            for u in range(sparse):
                unit = at + u * 20480
                for group in range(64):
                    column = 4 * group
                    meta = 16384 + column // 128 * 2048 + m * 16 + column % 128 // 8
                    nibble = stream[unit + meta] >> (4 * (group % 2)) & 15
                    four = [0, 0, 0, 0]
                    for i, place in enumerate((nibble & 3, nibble >> 2)):
                        j = 2 * group + i
                        byte = m // 8 * 1024 + m % 8 * 128 + (j // 16 ^ m % 8) * 16 + j % 16
                        four[place] = stream[unit + byte]
                    assert nibble & 3 < nibble >> 2
                    line += four
            for u in range(dense):
                unit = at + sparse * 20480 + u * 16384
                for j in range(128):
                    byte = m // 8 * 1024 + m % 8 * 128 + (j // 16 ^ m % 8) * 16 + j % 16
                    line.append(stream[unit + byte])
            got[128 * tile + m] = torch.tensor(line, dtype=torch.uint8)
    assert_bitwise(got[:n, :k], expected)
    assert not got[n:].any()
    assert not got[:, k:].any()
    assert table[-1] == [len(stream) // 4096, 0, 0, sum(s + d for _, s, d, _ in table)]


def test_values_fill_a_unit_once():
    from spense_kernels import _C

    places = value_offsets().tolist()
    assert places == [[_C.format.value_offset(m, j) for j in range(128)] for m in range(128)]
    assert value_offsets().flatten().sort().values.tolist() == list(range(layout.VALUE_BYTES))


@settings(max_examples=60)
@given(st.sampled_from(SHAPES), st.integers(0, 10_000))
def test_pack_and_unpack_equal_the_twin(shape, seed):
    split = random_split(*shape, seed=seed)
    weight = random_weight(split, seed, negative_zeros=0.05)
    w_packed, w_tiles = twin(weight)
    packed = weight.pack()
    assert_bitwise(packed.w_packed, w_packed)
    assert_bitwise(packed.w_tiles, w_tiles)
    assert packed.w_packed.numel() == split.packed_bytes
    values, indices, dense = unpack_reference(w_packed, w_tiles, split)
    assert_bitwise(values, weight.values)
    assert_bitwise(indices, weight.indices)
    assert_bitwise(dense, weight.dense)
    assert HybridWeight.from_packed(packed, split, weight.w_scale).equal(
        HybridWeight(split, weight.values, weight.indices, weight.dense, weight.w_scale)
    )


def test_other_legal_encodings_pack_as_they_are_and_come_back_canonical():
    """A nibble with an empty place first, and -0.0 as a kept value: legal, not canonical."""
    split = staircase_split(130, 512, [0, 256])
    weight = random_weight(split, seed=2)
    values, indices = weight.values.clone(), weight.indices.clone()
    values.view(-1, 2)[::7] = torch.tensor([0x80, 0], dtype=torch.uint8)
    indices[:40] = 0xE9
    odd = HybridWeight(split, values, indices, weight.dense, weight.w_scale).validate()
    w_packed, w_tiles = twin(odd)
    packed = odd.pack()
    assert_bitwise(packed.w_packed, w_packed)
    back = HybridWeight.from_packed(packed, split, weight.w_scale)
    assert back.equal(odd.canonical())
    assert not back.equal(odd)
    by_twin = HybridWeight(split, *unpack_reference(w_packed, w_tiles, split), weight.w_scale)
    assert by_twin.equal(back)


def test_unpack_refuses_what_pack_cannot_have_written():
    split = Split.uniform(128, 200, 64)  # 136 sparse columns, all in dense units
    weight = random_weight(split)
    packed = weight.pack()
    crowded = packed.w_packed.clone()
    crowded[value_offsets()[0, :4]] = 0x38
    with pytest.raises(FormatError, match="tile 0 holds a group that is not 2:4"):
        unpack_reference(crowded, packed.w_tiles, split)
    with pytest.raises(RuntimeError, match="spense::unpack"):
        ops.unpack(crowded, packed.w_tiles, split.widths, n=128, k=200)
    other = Split.uniform(128, 300, 64)
    with pytest.raises(FormatError, match="must be those of Split"):
        unpack_reference(packed.w_packed, packed.w_tiles, other)
    with pytest.raises(RuntimeError, match="spense::unpack"):
        ops.unpack(packed.w_packed, packed.w_tiles, other.widths, n=128, k=300)


def test_tile_table_counts():
    split = staircase_split(300, 1024, [256, 1024, 0])
    assert tile_table(split).tolist() == [
        [0, 3, 2, 0],  # 768 sparse columns: three units of five blocks, two dense of four
        [23, 0, 8, 5],
        [55, 4, 0, 13],
        [75, 0, 0, 17],
    ]


def test_packed_form_moves_and_prints():
    weight = random_weight(Split.uniform(130, 256, 64))
    packed = weight.pack("meta")
    assert {t.device.type for t in (packed.w_packed, packed.w_tiles, packed.gather)} == {"meta"}
    assert repr(weight.pack()) == ("PackedWeight(n=130, k=256, bytes=65536, layout=1, device=cpu)")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gpu_encodes_and_packs_the_same_bytes(shape):
    split = random_split(*shape, seed=4)
    weight = random_weight(split, seed=4, bias=True, negative_zeros=0.05)
    there = HybridWeight.from_dense(
        weight.to_dense().cuda(), weight.w_scale.cuda(), split, weight.bias.cuda()
    ).validate()
    assert there.to("cpu").equal(weight)
    packed, expected = there.pack(), weight.pack()
    assert_bitwise(packed.w_packed, expected.w_packed)
    assert_bitwise(packed.w_tiles, expected.w_tiles)
    assert HybridWeight.from_packed(packed, split, there.w_scale, there.bias).equal(there)
    assert HybridWeight.from_state_dict(there.state_dict()).equal(there)
