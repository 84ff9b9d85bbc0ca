// SPDX-License-Identifier: Apache-2.0
// Who computes what: output tiles and ranges of K, dealt out to clusters of CTAs. Host and device
// share this file, so that tests on the host see what the kernel does.
//
// A group is the kGroup row tiles that the CTAs of a cluster work on side by side. K goes in
// steps of 256 columns (one sparse unit or up to two dense ones), which all tiles of a group take
// in the same order (Walk). Work is counted in 4096-byte blocks of the tile stream: a sparse unit
// 5, a dense unit 4.
//
//   tiles [0, whole)     each computed by one cluster, after its stream part: the first in the
//   order
//                        of clusters, the others round robin, or by tickets to whoever is free
//   tiles [whole, all)   stream-K: laid end to end and cut into equal numbers of blocks, one piece
//                        a cluster; a cut is moved to the next step, or to the tile's edge when
//                        that is at most `snap` blocks away
//
// With `pieces` every tile is cut by itself, into so many pieces of about equal blocks, one a
// cluster: all that hold a tile end at about the same time.
//
// Tiles are numbered row group by row group inside a band of `band` token tiles.
// Every piece is at least one step long (heuristics::legal), so the clusters `first`..`last` of a
// tile that was cut are consecutive and each holds one segment of it.
#pragma once

#include <cstdint>

#include "format/tile_stream.h"

namespace spense::heuristics {

inline constexpr int kStepColumns = format::kSparseUnitColumns;
inline constexpr int kSparseBlocks = format::kSparseUnitBytes / format::kBlockBytes;
inline constexpr int kDenseBlocks = format::kDenseUnitBytes / format::kBlockBytes;
inline constexpr int kMaxStepBlocks = 2 * kDenseBlocks;
static_assert(kSparseBlocks == 5 && kDenseBlocks == 4);

// Plain numbers; a kernel gets them as an argument.
struct ScheduleParams {
  int32_t row_tiles = 0;
  int32_t token_tiles = 0;
  int32_t k_blocks = 0;       // of 128 columns, the last may be padding in part
  int32_t stream_blocks = 0;  // of all row tiles once
  int32_t band = 1;
  int32_t clusters = 1;
  int32_t whole = 0;
  int32_t pieces = 0;  // of each tile; 0: as `whole` says
  int32_t snap = 0;
  int32_t skew = 0;  // 1/1024: how much less of the stream the last cluster gets than the first
  int32_t back = 0;  // 1/1024: share of the steps that are taken from the end of K (Walk)
};

// Whether places in the stream can be counted.
constexpr bool streamable(const ScheduleParams& p) {
  return int64_t{p.token_tiles} * p.stream_blocks <= INT32_MAX;
}

SPENSE_HD constexpr int32_t steps_of(int32_t k_blocks) { return (k_blocks + 1) / 2; }

// Blocks of the first `step` steps of a tile.
SPENSE_HD constexpr int32_t blocks_of_steps(int32_t step, int32_t sparse_units, int32_t k_blocks) {
  if (step <= sparse_units) return kSparseBlocks * step;
  const int32_t columns_end = 2 * step < k_blocks ? 2 * step : k_blocks;
  return kSparseBlocks * sparse_units + kDenseBlocks * (columns_end - 2 * sparse_units);
}

// Whole tiles behind the first of each cluster go to whoever is free: not every multiprocessor gets
// the same share of the bandwidth.
SPENSE_HD constexpr bool by_tickets(const ScheduleParams& p, int32_t cluster_ctas) {
  return cluster_ctas == 1 && p.whole > p.clusters;
}

inline constexpr int kWalkShare = 1024;

// The order in which a tile's steps are taken. Sparse columns come first in K and ask for more
// bytes in the time of their multiplication than dense ones, so large tiles take steps from both
// ends: `back` of 1024 from the last one backwards, spread evenly between those from the first one
// on.
struct Walk {
  int32_t steps = 0, back = 0;

  SPENSE_HD constexpr int32_t backs(int32_t turn) const { return turn * back / kWalkShare; }
  // The step taken at a turn.
  SPENSE_HD constexpr int32_t step(int32_t turn) const {
    const int32_t behind = backs(turn + 1);
    return behind != backs(turn) ? steps - behind : turn - behind;
  }
  // Blocks of the first `turn` steps taken.
  SPENSE_HD constexpr int32_t blocks(int32_t turn, int32_t sparse_units, int32_t k_blocks) const {
    const int32_t behind = backs(turn);
    return blocks_of_steps(turn - behind, sparse_units, k_blocks) +
           blocks_of_steps(steps, sparse_units, k_blocks) -
           blocks_of_steps(steps - behind, sparse_units, k_blocks);
  }
};

// The steps of turns [begin, ...) one after another, without a product a turn.
class Turns {
 public:
  SPENSE_HD constexpr Turns(const Walk& walk, int32_t begin) : back_(walk.back) {
    const int32_t backs = walk.backs(begin);
    front_ = begin - backs;
    last_ = walk.steps - backs;
    due_ = begin * walk.back - backs * kWalkShare;
  }
  SPENSE_HD constexpr int32_t next() {
    due_ += back_;
    if (due_ < kWalkShare) return front_++;
    due_ -= kWalkShare;
    return --last_;
  }

 private:
  int32_t back_, front_ = 0, last_ = 0;  // the next step from the front, the last one from behind
  int32_t due_ = 0;                      // what has come up to the next one from behind
};

// How much of the stream the first c clusters get, relative to c = clusters. CTAs start one after
// another, as those of the kernel ahead leave; the last have the least time.
SPENSE_HD constexpr int32_t cumulative_share(int32_t c, int32_t clusters, int32_t skew) {
  return c * (2048 * clusters + skew * (clusters - c));
}

// A range of one output tile's steps, by the turns of the walk.
struct Segment {
  int32_t group = 0, token_tile = 0;
  int32_t step_begin = 0, step_end = 0;
  int32_t first = 0, last = 0;  // clusters that hold segments of this tile
};

// Where the partial sums of a segment go: each cluster has two places.
SPENSE_HD constexpr int32_t partial_slot(int32_t cluster, bool holds_first_step) {
  return 2 * cluster + (holds_first_step ? 1 : 0);
}

// Table gives the tile table: blocks_before(row_tile), sparse_units(row_tile), and
// find(groups, width, target): the last group g with width * blocks_before(kGroup * g) <= target.
template <typename Table, int kGroup>
class Schedule {
 public:
  SPENSE_HD Schedule(const ScheduleParams& params, const Table& table, int32_t cluster)
      : p_(params),
        table_(table),
        cluster_(cluster),
        steps_(steps_of(params.k_blocks)),
        walk_{steps_, params.back} {
    groups_ = (p_.row_tiles + kGroup - 1) / kGroup;
    stream_total_ = p_.token_tiles * p_.stream_blocks;
    if (!p_.pieces && p_.whole < groups_ * p_.token_tiles) start_stream();
  }

  // The next segment of this cluster, or false. The stream part comes first, so that its sums are
  // put together while other work goes on.
  SPENSE_HD bool next(Segment& out) {
    return next(out, [this] { return following(); });
  }
  SPENSE_HD int32_t following() const { return tile_ + p_.clusters; }
  // The same; take() says which whole tile comes after the first.
  template <class Take>
  SPENSE_HD bool next(Segment& out, Take take) {
    while (in_stream_) {
      const int32_t begin = step_, end = cut(stream_end_ - position_);
      if (begin < end) {
        out = Segment{group_, token_, begin, end, cluster_, cluster_};
        if (begin > 0 || end < steps_) find_contributors(out);
      }
      if (end < steps_) {
        in_stream_ = false;
      } else {
        advance();
      }
      if (begin < end) return true;
    }
    if (p_.pieces) return next_piece(out);
    tile_ = tile_ < 0 ? cluster_ : take();
    if (tile_ >= p_.whole) return false;
    place(tile_);
    out = Segment{group_, token_, 0, steps_, cluster_, cluster_};
    return true;
  }

 private:
  // --- tiles ---
  SPENSE_HD int32_t min(int32_t a, int32_t b) const { return a < b ? a : b; }
  SPENSE_HD int32_t band_width(int32_t band_start) const {
    return min(p_.band, p_.token_tiles - band_start);
  }
  SPENSE_HD int32_t group_begin(int32_t group) const {
    return table_.blocks_before(min(group * kGroup, p_.row_tiles));
  }
  SPENSE_HD int32_t group_blocks(int32_t group) const {
    return group_begin(group + 1) - group_begin(group);
  }
  SPENSE_HD void place(int32_t tile) {
    const int32_t band = tile / (groups_ * p_.band);
    band_start_ = band * p_.band;
    const int32_t inside = tile - band * groups_ * p_.band, width = band_width(band_start_);
    group_ = inside / width;
    token_ = band_start_ + inside % width;
  }

  // --- steps of the current tile ---
  SPENSE_HD int32_t blocks_until(int32_t turn) const {
    int32_t sum = 0;
    for (int r = 0; r < kGroup; ++r) {
      const int32_t tile = group_ * kGroup + r;
      if (tile < p_.row_tiles) sum += walk_.blocks(turn, table_.sparse_units(tile), p_.k_blocks);
    }
    return sum;
  }
  // The first step that begins at least `offset` blocks behind the start of the tile.
  SPENSE_HD int32_t first_step(int32_t offset) const {
    if (kGroup == 1 && p_.back == 0) return step_at(offset, table_.sparse_units(group_));
    int32_t low = 0, high = steps_;  // blocks_until(low) < offset <= blocks_until(high)
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (blocks_until(middle) < offset) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return high;
  }
  // The same for one tile in the order of K.
  SPENSE_HD int32_t step_at(int32_t offset, int32_t sparse_units) const {
    const int32_t dense = offset - kSparseBlocks * sparse_units;
    if (dense <= 0) return (offset + kSparseBlocks - 1) / kSparseBlocks;
    return min(steps_, sparse_units + (dense + kMaxStepBlocks - 1) / kMaxStepBlocks);
  }

  // --- pieces ---
  SPENSE_HD bool next_piece(Segment& out) {
    if (tile_ >= 0) return false;
    tile_ = cluster_ / p_.pieces;
    place(tile_);
    const int32_t piece = cluster_ - tile_ * p_.pieces, first = cluster_ - piece;
    const int32_t blocks = blocks_until(steps_);
    const auto edge = [&](int32_t pieces) {
      return pieces == p_.pieces ? steps_ : first_step(blocks * pieces / p_.pieces);
    };
    const int32_t begin = piece == 0 ? 0 : edge(piece);
    out = Segment{group_, token_, begin, edge(piece + 1), first, first + p_.pieces - 1};
    return true;
  }

  // --- the stream part ---
  SPENSE_HD int32_t blocks_before_tile(int32_t tile) {
    if (tile == 0) return 0;
    place(tile);
    return band_start_ * p_.stream_blocks + band_width(band_start_) * group_begin(group_) +
           (token_ - band_start_) * group_blocks(group_);
  }
  // A CTA cannot ask for its first weights before it knows its cuts: single precision will do, as
  // all CTAs compute the same.
  SPENSE_HD float share(int32_t cluster) const {
    return static_cast<float>(cumulative_share(cluster, p_.clusters, p_.skew));
  }
  SPENSE_HD int32_t raw_cut(int32_t cluster) const {
    if (cluster >= p_.clusters) return stream_total_;
    return stream_begin_ + static_cast<int32_t>(blocks_per_share_ * share(cluster));
  }
  SPENSE_HD void start_stream() {
    stream_begin_ = blocks_before_tile(p_.whole);
    blocks_per_share_ = static_cast<float>(stream_total_ - stream_begin_) / share(p_.clusters);
    stream_end_ = raw_cut(cluster_ + 1);
    const int32_t begin = raw_cut(cluster_);
    in_stream_ = true;
    const int32_t band_blocks = p_.band * p_.stream_blocks, band = begin / band_blocks;
    band_start_ = band * p_.band;
    const int32_t width = band_width(band_start_), inside = begin - band * band_blocks;
    group_ = table_.find(groups_, width, inside);
    blocks_ = group_blocks(group_);
    const int32_t behind = inside - width * group_begin(group_), column = behind / blocks_;
    token_ = band_start_ + column;
    position_ = begin - (behind - column * blocks_);
    step_ = cut(begin - position_);
    if (step_ == steps_) advance();
  }
  SPENSE_HD void advance() {
    position_ += blocks_;
    step_ = 0;
    if (position_ >= stream_end_) {
      in_stream_ = false;
      return;
    }
    if (++token_ == band_start_ + band_width(band_start_)) {
      token_ = band_start_;
      if (++group_ == groups_) {
        group_ = 0;
        band_start_ += p_.band;
        token_ = band_start_;
      }
      blocks_ = group_blocks(group_);
    }
  }
  // The step at which a cut `offset` blocks behind the start of the current tile falls.
  SPENSE_HD int32_t cut(int32_t offset) const {
    if (offset <= p_.snap) return 0;
    if (offset >= blocks_ - p_.snap) return steps_;
    return first_step(offset);
  }
  // The last cluster whose raw cut is at most `position`.
  SPENSE_HD int32_t owner(int32_t position) const {
    const int32_t last = p_.clusters - 1;
    const float shares = static_cast<float>(position - stream_begin_) / blocks_per_share_;
    int32_t cluster = min(last, static_cast<int32_t>(shares / share(1)));
    while (cluster < last && raw_cut(cluster + 1) <= position) ++cluster;
    while (cluster > 0 && raw_cut(cluster) > position) --cluster;
    return cluster;
  }
  SPENSE_HD void find_contributors(Segment& out) const {
    // Cuts up to `snap` blocks into the tile fall on step 0; these on a step before the end:
    const int32_t inner = min(blocks_ - p_.snap - 1, blocks_until(steps_ - 1));
    out.first = owner(position_ + p_.snap);
    out.last = owner(position_ + (inner > p_.snap ? inner : p_.snap));
  }

  ScheduleParams p_;
  Table table_;
  int32_t cluster_, steps_;
  Walk walk_;
  int32_t groups_;
  int32_t tile_ = -1;  // the whole tile dealt last
  bool in_stream_ = false;
  int32_t stream_total_, stream_begin_ = 0, stream_end_ = 0;
  float blocks_per_share_ = 0;
  int32_t position_ = 0;                            // blocks before the current tile
  int32_t band_start_ = 0, group_ = 0, token_ = 0;  // of the current tile
  int32_t blocks_ = 0, step_ = 0;                   // its blocks, the first step to do
};

}  // namespace spense::heuristics
