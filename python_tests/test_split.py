# SPDX-License-Identifier: Apache-2.0
"""The split of a layer: legality, orders, sizes, slices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spense_kernels import layout
from spense_kernels.errors import FormatError
from spense_kernels.format import Split
from spense_kernels.testing.generators import random_perm, random_split, staircase_split

GRANULE_SHARDS = [(3, 1), (100, 1), (130, 1), (256, 1), (256, 4), (640, 8), (1024, 2)]


@st.composite
def splits(draw) -> Split:
    k, shards = draw(st.sampled_from(GRANULE_SHARDS))
    n = draw(st.sampled_from([1, 3, 128, 129, 300, 640]))
    return random_split(n, k, shards, seed=draw(st.integers(0, 1000)))


def is_dense(split: Split) -> torch.Tensor:
    """bool [n, k], straight from the definition."""
    dense = torch.zeros(split.n, split.k, dtype=torch.bool)
    for tile in range(split.tiles):
        width = int(split.dense_width[tile])
        for shard in range(split.k_shards):
            last = split.k_perm[shard].tolist()[split.shard_columns - width :]
            columns = [shard * split.shard_columns + column for column in last]
            dense[128 * tile : 128 * tile + 128, columns] = True
    return dense


@given(splits())
def test_gather_is_a_permutation_with_every_tiles_sparse_columns_first(split):
    gather = split.gather()
    assert gather.dtype == torch.int32
    assert gather.sort().values.tolist() == list(range(split.k))
    columns = split.columns()
    for width in set(split.widths):
        sparse = split.shard_columns - width
        first = gather[: split.k_shards * sparse].sort().values
        assert torch.equal(first.long(), columns[:, :sparse].reshape(-1).sort().values)


@given(splits())
def test_gather_keeps_groups_of_four_together(split):
    """A group of the checkpoint stays four neighbours in the gather order of the tile stream."""
    positions = split.positions()
    whole = split.k_shards * split.shard_columns // 4 * 4 if split.k_shards == 1 else split.k
    runs = positions[:whole].view(-1, 4)
    assert torch.equal(runs - runs[:, :1], torch.arange(4).expand_as(runs))
    assert (runs[:, 0] % 4 == 0).all()


def test_gather_shell_by_shell_by_hand():
    """Two shards of 48 columns; widths 16 and 32 in use, so shells [0,16) [16,32) [32,48)."""
    split = Split(256, 96, torch.arange(48).repeat(2, 1), torch.tensor([16, 32]))
    shells = [(0, 16), (48, 64), (16, 32), (64, 80), (32, 48), (80, 96)]
    assert split.gather().tolist() == [c for a, b in shells for c in range(a, b)]


@given(splits())
def test_dense_fraction_counts_weights(split):
    assert split.dense_fraction == pytest.approx(float(is_dense(split).double().mean()), abs=1e-12)


@given(splits())
def test_sizes_add_up(split):
    offsets, payload = split.block_offsets(), split.payload_bytes()
    assert offsets[-1, -1].tolist() == list(payload)
    sizes = offsets[:, 1:] - offsets[:, :-1]
    for tile, width in enumerate(split.widths):
        rows = min(128, split.n - 128 * tile)
        groups = -(-(split.shard_columns - width) // 4)
        expected = [rows * 2 * groups, rows * -(-groups // 2), rows * width]
        assert sizes[:, tile].tolist() == [expected] * split.k_shards
    eighths = is_dense(split).sum() * 8 + (~is_dense(split)).sum() * 5
    assert split.logical_bytes == -(-int(eighths) // 8)
    assert split.padding_waste == split.packed_bytes - split.logical_bytes >= 0


@given(splits(), st.data())
def test_runs_cover_all_tiles(split, data):
    limit = data.draw(st.sampled_from([None, 1, 2]))
    runs = split.runs(limit)
    tiles = [(t, r.width) for r in runs for t in range(r.first_tile, r.last_tile)]
    assert tiles == list(enumerate(split.widths))
    assert [r.first_row for r in runs[1:]] == [r.last_row for r in runs[:-1]]
    assert runs[0].first_row == 0
    assert runs[-1].last_row == split.n
    assert limit is None or all(r.last_tile - r.first_tile <= limit for r in runs)


@given(splits(), st.data())
def test_slices_hold_the_same_weights_dense(split, data):
    dense = is_dense(split)
    first = data.draw(st.integers(0, split.tiles - 1))
    last = data.draw(st.integers(first + 1, split.tiles))
    assert torch.equal(is_dense(split.rows(first, last)), dense[128 * first : 128 * last])
    first = data.draw(st.integers(0, split.k_shards - 1))
    last = data.draw(st.integers(first + 1, split.k_shards))
    columns = slice(first * split.shard_columns, last * split.shard_columns)
    assert torch.equal(is_dense(split.shard(first, last)), dense[:, columns])


def test_stack_pads_all_parts_but_the_last():
    perm = random_perm(256, 4)
    parts = [Split.uniform(n, 256, d, perm, 4) for n, d in ((200, 64), (130, 0), (5, 256))]
    stacked = Split.stack(parts)
    assert stacked.n == 256 + 256 + 5
    assert Split.stack_rows(parts) == [(0, 200), (256, 386), (512, 517)]
    assert stacked.widths == [16, 16, 0, 0, 64]
    assert Split.stack(parts[:1]) == parts[0]


def test_real_layers():
    """Decode traffic of a 5120 x 5120 projection at 25 %: 0.71875 byte a weight, no waste."""
    split = Split.from_fraction(5120, 5120, 0.25, k_shards=8)
    assert split.widths == [160] * 40
    assert split.packed_bytes == 5120 * 5120 * 23 // 32
    assert split.padding_waste == 0
    # K = 640 has 480 sparse columns, of which one unit of 256 is packed sparse: 0.85 byte a weight.
    small = Split.from_fraction(640, 640, 0.25)
    assert small.packed_bytes == 5 * (20480 + 3 * 16384)
    assert small.packed_bytes / (640 * 640) == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("k", "d", "shards", "width"),
    [
        (640, 0.25, 1, 160),
        (640, 0.26, 1, 160),
        (640, 0.0375, 1, 32),  # 24 columns: halves go up
        (100, 0.95, 1, 96),
        (100, 0.97, 1, 96),
        (100, 0.98, 1, 100),
        (100, 1.0, 1, 100),
        (3, 0.49, 1, 0),
        (3, 0.5, 1, 3),
        (5120, 0.25, 8, 160),
        (64, 1.0, 4, 16),
    ],
)
def test_from_fraction_rounds_to_the_granule(k, d, shards, width):
    assert Split.from_fraction(128, k, d, k_shards=shards).widths == [width]


def test_constants_and_sizes_are_those_of_the_kernels():
    from spense_kernels import _C

    native = _C.format
    names = [name for name in dir(native) if name.isupper()]
    assert len(names) >= 12
    assert {n: getattr(native, n) for n in names} == {n: getattr(layout, n) for n in names}
    assert [n for n in range(16) if native.legal_nibble(n)] == list(layout.LEGAL_NIBBLES)
    for k in (1, 127, 128, 129, 640, 5120):
        assert native.padded_k(k) == layout.padded_k(k)
        for sparse in range(0, k + 1, 64):
            units = native.sparse_units(sparse)
            assert layout.units_of(k, sparse) == (units, native.dense_units(k, units))


@given(splits())
def test_payload_sizes_are_those_of_the_packer(split):
    from spense_kernels import _C

    sizes = _C.format.payload_sizes(split.n, split.k, split.widths, split.k_shards)
    assert (sizes["values"], sizes["indices"], sizes["dense"]) == split.payload_bytes()
    assert (sizes["packed"], sizes["tiles"]) == (split.packed_bytes, split.tiles)


def test_a_split_keeps_its_own_arrays():
    perm, width = random_perm(64), torch.tensor([16], dtype=torch.int32)
    split = Split(1, 64, perm, width)
    before = copy.deepcopy(split)
    perm.fill_(0)
    width.fill_(0)
    assert split == before


def test_split_survives_copies_and_a_meta_default_device():
    split = staircase_split(300, 640, [160, 0, 640], seed=1)
    assert copy.deepcopy(split) == split
    assert pickle.loads(pickle.dumps(split)) == split
    with torch.device("meta"):
        again = Split.uniform(128, 64, 16)
        assert again.gather().device.type == "cpu"
        assert again.packed_bytes == 16384
    assert split != Split.uniform(300, 640, 160)
    assert "k_shards=1, dense_width=0..640" in repr(split)


PERM = torch.arange(64)[None]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Split(0, 64, PERM, torch.tensor([0])), "n must be an int >= 1, got 0"),
        (lambda: Split(1.0, 64, PERM, torch.tensor([0])), "n must be an int >= 1, got 1.0"),
        (lambda: Split(1, 65, PERM, torch.tensor([0])), "k_perm must have shape .* 65 elements"),
        (lambda: Split(1, 64, PERM[0], torch.tensor([0])), "k_perm must have 2 dimensions"),
        (lambda: Split(1, 64, PERM.float(), torch.tensor([0])), "integer dtype, got torch.float32"),
        (lambda: Split(1, 64, PERM * 0, torch.tensor([0])), "permutation .* but shard 0 is not"),
        (lambda: Split(1, 64, PERM + 2**32, torch.tensor([0])), "k_perm must fit int32"),
        (lambda: Split(1, 64, PERM, torch.tensor([8])), "multiple of 16 below 64 .* got 8 at tile"),
        (lambda: Split(1, 64, PERM, torch.tensor([-16])), "got -16 at tile 0"),
        (lambda: Split(1, 64, PERM, torch.tensor([80])), "got 80 at tile 0"),
        (lambda: Split(129, 64, PERM, torch.tensor([0])), "one entry per 128 rows = 2, got 1"),
        (lambda: Split.uniform(1, 48, 0, k_shards=2), "multiple of 16 \\* k_shards = 32, got 48"),
        (lambda: Split.uniform(1, 64, 0, k_shards=0), "k_shards must be an int >= 1, got 0"),
        (lambda: Split.uniform(1, 64, 65), "dense_columns must be 0..64 .* got 65"),
        (lambda: Split.uniform(1, 64, 16, PERM, 2), "k_perm must have shape \\[2, 32\\]"),
        (lambda: Split.from_fraction(1, 64, 1.5), "d must be in 0..1, got 1.5"),
        (lambda: Split.uniform(1, 64, 16).shard(0, 2), "last <= k_shards=1, got first=0, last=2"),
        (lambda: Split.uniform(1, 64, 16).rows(1, 1), "last <= tiles=1, got first=1, last=1"),
        (lambda: Split.stack([]), "must not be empty"),
        (
            lambda: Split.stack([Split.uniform(1, 64, 16), Split.uniform(1, 128, 16)]),
            "share one k_perm, but splits\\[1\\] \\(k=128",
        ),
    ],
)
def test_bad_splits_are_named(make, words):
    with pytest.raises(FormatError, match=words):
        make()
