# SPDX-License-Identifier: Apache-2.0
"""Constants and size formulas of the two weight forms (checkpoint form and tile stream).

The tile stream part repeats csrc/format/tile_stream.h; a test compares the two through `_C`.
"""

TILE_ROWS = 128  # output rows of a tile
GRANULE = 16  # dense widths are multiples of this many columns
GROUP = 4  # columns of a 2:4 group
KEPT = 2  # values a group keeps

LAYOUT_VERSION = 1
SPARSE_UNIT_COLUMNS = 256
DENSE_UNIT_COLUMNS = 128
ROW_BYTES = 128
VALUE_BYTES = TILE_ROWS * ROW_BYTES
METADATA_BYTES = TILE_ROWS * SPARSE_UNIT_COLUMNS // 8
SPARSE_UNIT_BYTES = VALUE_BYTES + METADATA_BYTES
DENSE_UNIT_BYTES = VALUE_BYTES
BLOCK_BYTES = 4096  # unit of the offsets in the tile table
TILE_TABLE_COLUMNS = 4

EMPTY_NIBBLE = 0x4  # kept places 0 and 1: what an empty group and all padding carry
LEGAL_NIBBLES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)
FP8_MAX = 448.0  # largest finite float8_e4m3fn


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded_k(k: int) -> int:
    """K rounded up to whole dense units (128 columns)."""
    return ceil_div(k, DENSE_UNIT_COLUMNS) * DENSE_UNIT_COLUMNS


def tile_count(n: int) -> int:
    return ceil_div(n, TILE_ROWS)


def tile_rows(n: int, tile: int) -> int:
    """Real rows of a tile; only the last one may have fewer than 128."""
    return min(TILE_ROWS, n - tile * TILE_ROWS)


def groups_of(sparse_columns: int) -> int:
    return ceil_div(sparse_columns, GROUP)


def units_of(k: int, sparse_columns: int) -> tuple[int, int]:
    """(sparse units, dense units) of a tile with this many sparse columns in gather order."""
    sparse = sparse_columns // SPARSE_UNIT_COLUMNS
    return sparse, (padded_k(k) - sparse * SPARSE_UNIT_COLUMNS) // DENSE_UNIT_COLUMNS


def row_bytes(shard_columns: int, width: int) -> tuple[int, int, int]:
    """Checkpoint bytes (values, indices, dense) of one row in one K shard."""
    groups = groups_of(shard_columns - width)
    return groups * KEPT, ceil_div(groups, 2), width
