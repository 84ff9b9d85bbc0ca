// SPDX-License-Identifier: Apache-2.0
// Host proof that a unit of the tile stream is the image that CuTe's layouts describe: values and
// metadata are placed once by csrc/format/tile_stream.h and once through tensors with CuTe's own
// shared-memory layouts, for SM90 (wgmma) and SM100 (tcgen05), and every byte is compared. Plain
// g++; test_cute_layouts.py builds and runs it.
#include <cstdio>
#include <cstring>

#include "cutlass/cutlass.h"
#include "cutlass/detail/layout.hpp"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/gemm.h"
//
#include "cute/atom/mma_atom.hpp"
#include "cute/atom/mma_traits_sm100.hpp"
#include "cute/atom/mma_traits_sm90_gmma.hpp"
#include "cute/atom/mma_traits_sm90_gmma_sparse.hpp"
#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/builders/sm1xx_sparse_config.inl"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
//
#include "format/tile_stream.h"

namespace {

using namespace cute;
namespace format = spense::format;

constexpr int kRows = format::kTileRows;
constexpr int kSparseColumns = format::kSparseUnitColumns;
constexpr int kDenseColumns = format::kDenseUnitColumns;
constexpr int kGroupBytes = 8;  // logical columns whose two nibbles share a byte

using Fp8 = cutlass::float_e4m3_t;
using SparseByte = sparse_elem<2, uint8_t>;    // one kept value stands for two logical columns
using MetadataByte = sparse_elem<8, uint8_t>;  // one byte for eight

using SparseConfig90 =
    cutlass::Sm90GemmSparseConfig<sparse_elem<2, Fp8>, GMMA::Major::K, MetadataByte, _128>;
using SparseConfig100 =
    cutlass::Sm1xxGemmSparseConfig<sparse_elem<2, Fp8>, cutlass::layout::RowMajor, MetadataByte>;

// The pointer swizzle looks at addresses, so units stand where shared memory would hold them.
struct alignas(1024) Unit {
  uint8_t bytes[format::kSparseUnitBytes];
  Unit() { std::memset(bytes, 0xEE, sizeof bytes); }
};

// Byte `pass` of a number that no two places of a unit share.
uint8_t mark(int row, int place, int pass) {
  return static_cast<uint8_t>((row * 128 + place) * 0x9E37u >> (8 * pass));
}
uint8_t metadata_mark(int row, int byte, int pass) {
  return static_cast<uint8_t>((row * 32 + byte) * 0x6A35u >> (8 * pass));
}

Unit ours(bool sparse, int pass) {
  Unit unit;
  for (int row = 0; row < kRows; ++row) {
    for (int j = 0; j < format::kRowBytes; ++j) {
      unit.bytes[format::value_offset(row, j)] = mark(row, j, pass);
    }
    for (int k = 0; sparse && k < kSparseColumns; k += kGroupBytes) {
      unit.bytes[format::metadata_offset(row, k)] = metadata_mark(row, k / kGroupBytes, pass);
    }
  }
  return unit;
}

// Places through tensors; `value(row, k)` and `metadata(row, k)` take logical columns.
template <class Value, class Metadata>
Unit sparse_unit(Value&& value, Metadata&& metadata, int pass) {
  Unit unit;
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kSparseColumns; k += 2) value(unit, row, k) = mark(row, k / 2, pass);
    for (int k = 0; k < kSparseColumns; k += kGroupBytes) {
      metadata(unit, row, k) = metadata_mark(row, k / kGroupBytes, pass);
    }
  }
  return unit;
}
template <class Value>
Unit dense_unit(Value&& value, int pass) {
  Unit unit;
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDenseColumns; ++k) value(unit, row, k) = mark(row, k, pass);
  }
  return unit;
}

template <class Config>
using MetadataAtom =
    ComposedLayout<Swizzle<0, 4, 3>, smem_sparse_ptr_flag_bits<8, 8>, typename Config::TensorEAtom>;

template <class Layout>
auto values_of(Unit& unit, const Layout& layout) {
  return make_tensor(make_smem_ptr<SparseByte>(static_cast<void*>(unit.bytes)), layout);
}
template <class Layout>
auto metadata_of(Unit& unit, const Layout& layout) {
  void* from = unit.bytes + format::kValueBytes;
  return make_tensor(make_smem_ptr<MetadataByte>(from), layout);
}
template <class Layout>
auto dense_of(Unit& unit, const Layout& layout) {
  return make_tensor(make_smem_ptr(unit.bytes), layout);
}

Unit sm90_sparse(int pass) {
  const auto values = tile_to_shape(GMMA::Layout_K_SW128_SpAtom<uint8_t, 2>{},
                                    Shape<Int<kRows>, Int<kSparseColumns>>{}, Step<_1, _2>{});
  const auto metadata = tile_to_shape(MetadataAtom<SparseConfig90>{},
                                      Shape<Int<kRows>, Int<kSparseColumns>>{}, Step<_1, _2>{});
  return sparse_unit(
      [&](Unit& u, int m, int k) -> uint8_t& { return values_of(u, values)(m, k).elem_; },
      [&](Unit& u, int m, int k) -> uint8_t& { return metadata_of(u, metadata)(m, k).elem_; },
      pass);
}
Unit sm90_dense(int pass) {
  const auto values = tile_to_shape(GMMA::Layout_K_SW128_Atom<uint8_t>{},
                                    Shape<Int<kRows>, Int<kDenseColumns>>{}, Step<_1, _2>{});
  return dense_unit([&](Unit& u, int m, int k) -> uint8_t& { return dense_of(u, values)(m, k); },
                    pass);
}

// tcgen05 sees a unit as instructions of 64 sparse or 32 dense columns: ((row, column), 0, step).
template <int kColumns, class Layout>
auto at_step(const Layout&, int m, int k) {
  return make_coord(make_coord(m, k % kColumns), 0, k / kColumns);
}

using Sm100Sparse = decltype(make_tiled_mma(
    SM100_MMA_F8F6F4_SS_SPARSE<Fp8, Fp8, float, 128, 64, UMMA::Major::K, UMMA::Major::K>{}));
using Sm100Dense =
    decltype(make_tiled_mma(MMA_Traits<SM100_MMA_F8F6F4_SS, Fp8, Fp8, float, C<128>, C<64>,
                                       integral_constant<UMMA::Major, UMMA::Major::K>,
                                       integral_constant<UMMA::Major, UMMA::Major::K>,
                                       integral_constant<UMMA::ScaleIn, UMMA::ScaleIn::One>,
                                       integral_constant<UMMA::ScaleIn, UMMA::ScaleIn::One>>{}));

Unit sm100_sparse(int pass) {
  const auto shape = partition_shape_A(Sm100Sparse{}, Shape<Int<kRows>, Int<kSparseColumns>>{});
  const auto values =
      UMMA::tile_to_mma_shape(UMMA::Layout_K_SW128_SpAtom<uint8_t, 2>{}, shape, Step<_1, _2>{});
  const auto metadata = UMMA::tile_to_mma_shape(MetadataAtom<SparseConfig100>{}, shape);
  return sparse_unit(
      [&](Unit& u, int m, int k) -> uint8_t& {
        return values_of(u, values)(at_step<64>(values, m, k)).elem_;
      },
      [&](Unit& u, int m, int k) -> uint8_t& {
        return metadata_of(u, metadata)(at_step<64>(metadata, m, k)).elem_;
      },
      pass);
}
Unit sm100_dense(int pass) {
  const auto shape = partition_shape_A(Sm100Dense{}, Shape<Int<kRows>, Int<kDenseColumns>>{});
  const auto values =
      UMMA::tile_to_mma_shape(UMMA::Layout_K_SW128_Atom<uint8_t>{}, shape, Step<_1, _2>{});
  return dense_unit(
      [&](Unit& u, int m, int k) -> uint8_t& {
        return dense_of(u, values)(at_step<32>(values, m, k));
      },
      pass);
}

// The metadata arrays that CUTLASS reads from global memory: the same order, tile by tile.
template <class Config>
int global_mismatches() {
  constexpr int kTiles = 3, kUnits = 2;
  const auto layout = Config::fill_layoutE(
      make_shape(kTiles * kRows, Int<64>{}, kUnits * kSparseColumns, Int<1>{}));
  int wrong = 0;
  for (int m = 0; m < kTiles * kRows; ++m) {
    for (int k = 0; k < kUnits * kSparseColumns; k += kGroupBytes) {
      const int block = k / 128, inside = format::metadata_offset(m % kRows, k % 128);
      const int expected = (block * kTiles + m / kRows) * (format::kMetadataBytes / 2) + inside -
                           format::kValueBytes;
      wrong += static_cast<int>(layout(m, k, 0)) / kGroupBytes != expected;
    }
  }
  return wrong;
}

// The register of wgmma.sp: which row and columns the lanes of a warpgroup bring. The kernel reads
// one 32-bit word a lane: row 16 * warp + lane / 4 + 8 * (lane % 2), columns from 32 * (lane / 2 %
// 2).
template <class Op>
int lane_mismatches() {
  const auto layout = typename MMA_Traits<Op>::ELayout{};
  int wrong = 0;
  for (int thread = 0; thread < 128; ++thread) {
    const int warp = thread / 32, lane = thread % 32;
    const int row = 16 * warp + lane / 4 + 8 * (lane % 2), column = 32 * (lane / 2 % 2);
    for (int value = 0; value < 32; ++value) {
      const int at = layout(thread, value);  // row + 64 * column
      wrong += at % 64 != row || at / 64 != column + value;
    }
    const int first = format::metadata_offset(row, column);
    for (int byte = 0; byte < 4; ++byte) {
      wrong += format::metadata_offset(row, column + byte * kGroupBytes) != first + byte;
    }
    wrong += (first - format::kValueBytes) % 4 != 0;
  }
  return wrong;
}

int report(const char* what, int wrong, int of) {
  std::printf("%-40s %d of %d bytes differ\n", what, wrong, of);
  return wrong;
}

int compare(const char* what, Unit (*theirs)(int), bool sparse) {
  const int size = sparse ? format::kSparseUnitBytes : format::kDenseUnitBytes;
  int wrong = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const Unit a = ours(sparse, pass), b = theirs(pass);
    for (int i = 0; i < format::kSparseUnitBytes; ++i) wrong += a.bytes[i] != b.bytes[i];
  }
  return report(what, wrong, 2 * size);
}

}  // namespace

int main() {
  using Op = SM90::GMMA::SPARSE::GMMA_64x16x64_F32E4M3E4M3_SS_TN<
      SM90::GMMA::ScaleIn::One, SM90::GMMA::ScaleIn::One, SM90::GMMA::SparseSel::Zero>;
  int wrong = compare("sm90 sparse unit", sm90_sparse, true);
  wrong += compare("sm90 dense unit", sm90_dense, false);
  wrong += compare("sm100 sparse unit", sm100_sparse, true);
  wrong += compare("sm100 dense unit", sm100_dense, false);
  const int metadata = 3 * 2 * format::kMetadataBytes;
  wrong += report("sm90 metadata in global memory", global_mismatches<SparseConfig90>(), metadata);
  wrong +=
      report("sm100 metadata in global memory", global_mismatches<SparseConfig100>(), metadata);
  wrong += report("sm90 metadata of a lane", lane_mismatches<Op>(), 128 * (32 + 4 + 1));
  return wrong != 0;
}
