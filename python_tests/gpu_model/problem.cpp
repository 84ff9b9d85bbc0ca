// SPDX-License-Identifier: Apache-2.0
#include "problem.h"

#include <cstring>
#include <random>

#include "format/pack.h"
#include "tensor_core.h"

namespace model {
namespace {

namespace format = spense::format;

// e4m3 of an integer up to 16 in magnitude, found by decoding.
uint8_t encode(int v) {
  static const auto table = [] {
    std::array<uint8_t, 33> all{};
    for (int b = 0; b < 256; ++b) {
      const float f = e4m3(static_cast<uint8_t>(b));
      if (f == static_cast<int>(f) && f >= -16 && f <= 16 && b != 0x80) {
        all[static_cast<int>(f) + 16] = static_cast<uint8_t>(b);
      }
    }
    return all;
  }();
  return table[v + 16];
}

uint16_t round_bf16(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return static_cast<uint16_t>((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}

// An array on a 1024-byte boundary does not matter to the kernels; 16 bytes do.
uint8_t* aligned(std::vector<uint8_t>& v, size_t bytes) {
  v.assign(bytes + 16, 0);
  auto address = reinterpret_cast<uintptr_t>(v.data());
  return v.data() + (16 - address % 16) % 16;
}

}  // namespace

Problem::Problem(const Case& c, uint64_t seed) : c_(c), stride_(format::padded_k(c.k)) {
  make_weights(seed);
  std::mt19937_64 random(seed + 1);
  x_.resize(c.m * c.k);
  x_bytes_.assign(c.m * stride_ + 16, 0x7F);  // NaN where nothing may be read
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.k; ++j) {
      x_[i * c.k + j] = static_cast<int8_t>(random() % 9) - 4;
      x_bytes_[i * stride_ + j] = encode(x_[i * c.k + j]);
    }
  }
  for (int64_t i = 0; i < c.m; ++i) x_scale_.push_back(1.0f + static_cast<float>(i % 29) / 32);
  if (c.one_scale) x_scale_.resize(1);
  for (int64_t i = 0; i < c.n; ++i) {
    w_scale_.push_back(0.5f + static_cast<float>(i % 37) / 64);
    bias_.push_back(static_cast<float>(i % 11) - 5);
  }
  make_expected();
}

void Problem::make_weights(uint64_t seed) {
  std::mt19937_64 random(seed);
  const format::SplitDesc split{c_.n, c_.k, 1, c_.dense_width.data()};
  if (const auto status = format::check_split(split); !status.ok()) {
    fail("case %s: %s", c_.name.c_str(), status.message().c_str());
  }
  const format::PayloadLayout layout(split);
  const auto sizes = layout.sizes();
  std::vector<uint8_t> values(sizes.values), indices(sizes.indices, 0), dense(sizes.dense);
  w_.assign(c_.n * c_.k, 0);
  const auto value = [&] { return static_cast<int>(random() % 7) - 3; };
  for (int64_t tile = 0; tile < layout.tiles(); ++tile) {
    const int64_t columns = layout.sparse_columns(tile), groups = columns / 4;
    const int64_t width = c_.dense_width[tile];
    for (int64_t row = 0; row < layout.rows(tile); ++row) {
      int8_t* w = &w_[(tile * format::kTileRows + row) * c_.k];
      uint8_t* kept = values.data() + layout.values_offset(0, tile) + row * 2 * groups;
      uint8_t* nibbles = indices.data() + layout.indices_offset(0, tile) + row * ((groups + 1) / 2);
      for (int64_t g = 0; g < groups; ++g) {
        const int first = static_cast<int>(random() % 3);
        const int second = first + 1 + static_cast<int>(random() % (3 - first));
        for (const int place : {first, second}) {
          const int v = value();
          w[4 * g + place] = static_cast<int8_t>(v);
          kept[2 * g + (place == second)] = encode(v);
        }
        nibbles[g / 2] |= static_cast<uint8_t>((first | second << 2) << (g % 2 * 4));
      }
      if (groups % 2) nibbles[groups / 2] |= format::kEmptyNibble << 4;
      for (int64_t j = 0; j < width; ++j) {
        const int v = value();
        w[columns + j] = static_cast<int8_t>(v);
        dense[layout.dense_offset(0, tile) + row * width + j] = encode(v);
      }
    }
  }
  uint8_t* packed = aligned(packed_, sizes.packed);
  format::pack(layout, values.data(), indices.data(), dense.data(), packed, 0, layout.tiles());
  tiles_.resize((layout.tiles() + 1) * format::kTileTableColumns + 4);
  layout.write_tile_table(tiles_.data());
}

void Problem::make_expected() {
  const int64_t size = spense::bytes_of(c_.out);
  expected_.resize(c_.m * c_.n * size);
  for (int64_t i = 0; i < c_.m; ++i) {
    for (int64_t j = 0; j < c_.n; ++j) {
      int32_t sum = 0;
      for (int64_t k = 0; k < c_.k; ++k) sum += x_[i * c_.k + k] * w_[j * c_.k + k];
      float v = static_cast<float>(sum) * x_scale_[c_.one_scale ? 0 : i];
      v = v * w_scale_[j];
      if (c_.bias) v = v + bias_[j];
      uint8_t* to = &expected_[(i * c_.n + j) * size];
      if (c_.out == spense::OutType::kFloat32) {
        std::memcpy(to, &v, 4);
      } else if (c_.out == spense::OutType::kFloat16) {
        const auto half = static_cast<_Float16>(v);
        std::memcpy(to, &half, 2);
      } else {
        const uint16_t bits = round_bf16(v);
        std::memcpy(to, &bits, 2);
      }
    }
  }
}

spense::GemmArgs Problem::args() {
  const auto up = [](auto* p, uintptr_t to) {
    return reinterpret_cast<decltype(p)>((reinterpret_cast<uintptr_t>(p) + to - 1) / to * to);
  };
  spense::GemmArgs a;
  a.m = c_.m, a.n = c_.n, a.k = c_.k;
  a.x = up(x_bytes_.data(), 16);
  if (a.x != x_bytes_.data()) fail("x is not aligned");
  a.x_stride = stride_;
  a.w = up(packed_.data(), 16);
  a.w_bytes = static_cast<int64_t>(packed_.size()) - 16;
  a.tiles = tiles_.data();
  a.x_scale = x_scale_.data();
  a.x_scale_step = c_.one_scale ? 0 : 1;
  a.w_scale = w_scale_.data();
  a.bias = c_.bias ? bias_.data() : nullptr;
  a.y = y_.data() + kGuard;
  a.out = c_.out;
  return a;
}

std::vector<Region> Problem::regions(int64_t partial_bytes, int64_t counters) {
  y_.assign(expected_.size() + 2 * kGuard, 0xFF);
  partials_.assign(partial_bytes, 0xFF);
  counters_.assign(counters + 1, 0);
  const spense::GemmArgs a = args();
  const auto region = [](const char* name, const void* base, size_t bytes, bool dependent,
                         bool writable) {
    auto* at = const_cast<uint8_t*>(static_cast<const uint8_t*>(base));
    return Region{name,      at,       bytes,
                  dependent, writable, std::vector<uint8_t>(writable ? bytes : 0, 0)};
  };
  std::vector<Region> all = {
      region("x", a.x, c_.m * stride_, true, false),
      region("w", a.w, a.w_bytes, false, false),
      region("tiles", a.tiles, (tiles_.size() - 4) * 4, false, false),
      region("x_scale", a.x_scale, x_scale_.size() * 4, true, false),
      region("w_scale", a.w_scale, w_scale_.size() * 4, false, false),
      region("bias", bias_.data(), bias_.size() * 4, false, false),
      region("y", a.y, expected_.size(), true, true),
      region("memory before y", y_.data(), kGuard, true, false),
      region("memory behind y", y_.data() + kGuard + expected_.size(), kGuard, true, false),
      region("partials", partials_.data(), partials_.size(), true, true),
      region("counters", counters_.data(), counters * 4, true, true),
  };
  return all;
}

std::string Problem::check(const std::vector<Region>& after) const {
  const int64_t size = spense::bytes_of(c_.out);
  for (size_t i = 0; i < expected_.size(); ++i) {
    if (y_[kGuard + i] != expected_[i]) {
      const int64_t element = static_cast<int64_t>(i) / size;
      return "y differs at token " + std::to_string(element / c_.n) + ", row " +
             std::to_string(element % c_.n);
    }
  }
  for (size_t i = 0; i < y_.size(); ++i) {
    const bool inside = i >= kGuard && i < kGuard + expected_.size();
    if (!inside && y_[i] != 0xFF) return "memory beside y is written";
  }
  for (const Region& r : after) {
    // Stores of float32 are plain assignments, which are not counted.
    if (r.name != "y" || c_.out == spense::OutType::kFloat32) continue;
    for (uint8_t written : r.written) {
      if (!written) return "an element of y was never written";
    }
  }
  for (uint32_t counter : counters_) {
    if (counter) return "a counter is not zero afterwards";
  }
  return "";
}

std::vector<Case> cases(int tokens, int ctas) {
  using spense::OutType;
  const int64_t t = tokens;
  std::vector<Case> all = {
      // Tiles cut along K, ragged tokens and rows, a quarter dense.
      {"quarter", t - 3, 300, 1536, {384, 384, 384}, 4 * ctas},
      // Every tile its own width, from all sparse to all dense; widths in the middle of units.
      {"staircase", t, 640, 1280, {0, 1280, 16, 336, 768}, 4 * ctas, OutType::kFloat16, false},
      {"dense", t / 2 + 1, 256, 1024, {1024, 1024}, 3 * ctas, OutType::kBFloat16, true, true},
      {"sparse", t, 200, 1024, {0, 0}, 3 * ctas, OutType::kFloat32},
      // K ends inside a block, and the blocks are an odd number.
      {"odd K", 1, 130, 1360, {336, 80}, 2 * ctas},
      // A cut right behind the edge of a tile that is cut again; it moves to the edge.
      {"snap", 3, 512 * ctas, 4096, {}, 15 * ctas},
      // Too long for a piece or two of each tile: one stream whose every piece but two ends inside.
      {"uneven", 3, 256 * ctas, 6400, {}, 3 * ctas},
      // More units than the rings hold, more jobs than theirs.
      {"long", t, 256, 4608, {1152, 1152}, 2 * ctas},
      {"jobs", 30 * t, 128 * ctas, 256, {}, ctas},
      // Whole tiles and a rest, several token tiles.
      {"tokens", 2 * t + 5, 384, 768, {192, 0, 400}, 2 * ctas},
      // More CTAs than work, one step of K.
      {"tiny", 3, 40, 96, {32}, 5 * ctas},
  };
  for (Case& c : all) {
    if (c.name == "snap") c.dense_width.assign(4 * ctas, 0);
    if (c.name == "uneven") c.dense_width.assign(2 * ctas, 640);
    if (c.name == "jobs") c.dense_width.assign(ctas, 128);
  }
  return all;
}

}  // namespace model
