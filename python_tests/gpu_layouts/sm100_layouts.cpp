// SPDX-License-Identifier: Apache-2.0
// The SM100 kernel's layouts, descriptors and tensor maps against CuTe's own, on the host, for
// every byte of every kind of tile and for every config. Prints what was compared; exit code 1
// where anything differs.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "layouts.h"

#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
// clang-format off
#include "cutlass/cutlass.h"
#include "cutlass/gemm/gemm.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/detail/layout.hpp"
#include "cute/tensor.hpp"
#include "cute/atom/mma_atom.hpp"
#include "cute/atom/mma_traits_sm100.hpp"
#include "cute/atom/copy_traits_sm100.hpp"
#include "cute/atom/copy_traits_sm90_tma.hpp"
#include "cutlass/gemm/collective/builders/sm1xx_sparse_config.inl"
// clang-format on
#include "device/tensor_map.h"
#include "format/tile_stream.h"
#include "heuristics/sm100.h"
#include "sm100/launch.h"
#include "sm100/mma.cuh"

namespace {

using namespace cute;
using E4m3 = cutlass::float_e4m3_t;
namespace format = spense::format;
namespace sm100 = spense::sm100;
using Config = spense::heuristics::sm100::Config;

constexpr auto kMajor = UMMA::Major::K;
constexpr int kSlot = 20480;  // of w; any multiple of 1024 would do
constexpr uint32_t kTmem = 0x40;

template <int kTokens, int kCtas>
struct Types {
  template <class Op>
  using Tiled = decltype(make_tiled_mma(Op{}));
  using One = std::bool_constant<kCtas == 1>;
  static constexpr int kRows = 128 * kCtas;
  using Sparse =
      std::conditional_t<One::value,
                         Tiled<SM100_MMA_F8F6F4_SS_SPARSE<
                             E4m3, E4m3, float, 128, kCtas == 1 ? kTokens : 64, kMajor, kMajor>>,
                         Tiled<SM100_MMA_F8F6F4_2x1SM_SS_SPARSE<
                             E4m3, E4m3, float, 256, kCtas == 1 ? 64 : kTokens, kMajor, kMajor>>>;
  template <class Op>
  using DenseTraits =
      MMA_Traits<Op, E4m3, E4m3, float, C<kRows>, C<kTokens>,
                 integral_constant<UMMA::Major, kMajor>, integral_constant<UMMA::Major, kMajor>,
                 integral_constant<UMMA::ScaleIn, UMMA::ScaleIn::One>,
                 integral_constant<UMMA::ScaleIn, UMMA::ScaleIn::One>>;
  using Dense = Tiled<std::conditional_t<One::value, DenseTraits<SM100_MMA_F8F6F4_SS>,
                                         DenseTraits<SM100_MMA_F8F6F4_2x1SM_SS>>>;
};

template <class Layout, class Coordinate>
int swizzled(const Layout& layout, const Coordinate& at, int per_byte) {
  return Swizzle<3, 4, 3>{}(static_cast<int>(layout.layout_b()(at)) / per_byte);
}

// --- what a slot holds -------------------------------------------------------------------------

template <int kTokens, int kCtas>
void check_images() {
  using T = Types<kTokens, kCtas>;
  using Values = typename T::Sparse::ValTypeA;
  using Metadata = typename T::Sparse::ValTypeE;
  using Rows = Int<T::kRows>;
  auto sparse = UMMA::tile_to_mma_shape(
      UMMA::Layout_K_SW128_SpAtom<E4m3, 2>{},
      partition_shape_A(typename T::Sparse{}, Shape<Rows, _256>{}), Step<_1, _2>{});
  auto dense = UMMA::tile_to_mma_shape(UMMA::Layout_K_SW128_Atom<E4m3>{},
                                       partition_shape_A(typename T::Dense{}, Shape<Rows, _128>{}),
                                       Step<_1, _2>{});
  using Sparsity = cutlass::Sm1xxGemmSparseConfig<Values, cutlass::layout::RowMajor, Metadata>;
  using Atom = ComposedLayout<Swizzle<0, 4, 3>, smem_sparse_ptr_flag_bits<8, 8>,
                              typename Sparsity::TensorEAtom>;
  auto metadata =
      UMMA::tile_to_mma_shape(Atom{}, partition_shape_A(typename T::Sparse{}, Shape<Rows, _256>{}));
  for (int m = 0; m < 128; ++m) {
    for (int k = 0; k < 256; ++k) {
      const auto at = make_coord(make_coord(m, k % 64), 0, k / 64);
      // Two logical columns share a byte of values, eight one of metadata.
      expect("sparse values", swizzled(sparse, at, 2), format::value_offset(m, k / 2));
      expect("metadata", format::kValueBytes + static_cast<int>(metadata.layout_b()(at)) / 8,
             format::metadata_offset(m, k));
    }
    for (int k = 0; k < 128; ++k) {
      const auto at = make_coord(make_coord(m, k % 32), 0, k / 32);
      expect("dense values", swizzled(dense, at, 1), format::value_offset(m, k));
    }
  }
  // A slot of x is what a box of the tensor map writes: rows of 128 bytes, pieces of 16 exchanged.
  auto x = UMMA::tile_to_mma_shape(
      UMMA::Layout_K_SW128_Atom<E4m3>{},
      partition_shape_B(typename T::Dense{}, Shape<Int<kTokens>, _128>{}), Step<_1, _2>{});
  for (int n = 0; n < kTokens / kCtas; ++n) {
    for (int k = 0; k < 128; ++k) {
      const int box = n * 128 + ((k / 16) ^ (n % 8)) * 16 + k % 16;
      expect("x", swizzled(x, make_coord(make_coord(n, k % 32), 0, k / 32), 1), box);
    }
  }
}

// --- descriptors -------------------------------------------------------------------------------

template <class Fragment>
uint64_t descriptor(const Fragment& fragment, int k) {
  return static_cast<uint64_t>(fragment(_, _, k)(0));
}

template <int kTokens, int kCtas>
void check_descriptors() {
  using T = Types<kTokens, kCtas>;
  using Sparse = typename T::Sparse;
  using Dense = typename T::Dense;
  using Rows = Int<T::kRows>;
  auto a_sparse =
      UMMA::tile_to_mma_shape(UMMA::Layout_K_SW128_SpAtom<E4m3, 2>{},
                              partition_shape_A(Sparse{}, Shape<Rows, _256>{}), Step<_1, _2>{});
  auto a_dense =
      UMMA::tile_to_mma_shape(UMMA::Layout_K_SW128_Atom<E4m3>{},
                              partition_shape_A(Dense{}, Shape<Rows, _128>{}), Step<_1, _2>{});
  auto x_sparse = UMMA::tile_to_mma_shape(UMMA::Layout_K_SW128_Atom<E4m3>{},
                                          partition_shape_B(Sparse{}, Shape<Int<kTokens>, _128>{}),
                                          Step<_1, _2>{});
  auto x_dense = UMMA::tile_to_mma_shape(UMMA::Layout_K_SW128_Atom<E4m3>{},
                                         partition_shape_B(Dense{}, Shape<Int<kTokens>, _128>{}),
                                         Step<_1, _2>{});
  for (int slot = 0; slot < 8; ++slot) {
    const uint32_t w = 1024 + slot * kSlot, x = 2048 + slot * 4096;
    uint8_t *w_at = shared_memory() + w, *x_at = shared_memory() + x;
    auto fa_sparse = Sparse::make_fragment_A(
        make_tensor(make_smem_ptr(recast_ptr<typename Sparse::ValTypeA>(w_at)), a_sparse));
    auto fa_dense =
        Dense::make_fragment_A(make_tensor(make_smem_ptr(reinterpret_cast<E4m3*>(w_at)), a_dense));
    auto fb_sparse = Sparse::make_fragment_B(
        make_tensor(make_smem_ptr(reinterpret_cast<E4m3*>(x_at)), x_sparse));
    auto fb_dense =
        Dense::make_fragment_B(make_tensor(make_smem_ptr(reinterpret_cast<E4m3*>(x_at)), x_dense));
    for (int i = 0; i < sm100::kInstructions; ++i) {
      expect("descriptor of sparse values", descriptor(fa_sparse, i),
             sm100::operand(w) + sm100::w_step(i));
      expect("descriptor of dense values", descriptor(fa_dense, i),
             sm100::operand(w) + sm100::w_step(i));
      // Each half of a sparse unit has its own slot of x.
      expect("descriptor of x, sparse", descriptor(fb_sparse, i % 2),
             sm100::operand(x) + sm100::sparse_x_step(i));
      expect("descriptor of x, dense", descriptor(fb_dense, i),
             sm100::operand(x) + sm100::dense_x_step(i));
    }
  }
  constexpr auto none = UMMA::ScaleIn::One;
  constexpr auto instruction = [](auto sparse) {
    return static_cast<uint32_t>(
        UMMA::make_instr_desc<E4m3, E4m3, float, T::kRows, kTokens, kMajor, kMajor, none, none,
                              UMMA::Saturate::False, decltype(sparse)::value>());
  };
  expect("sparse instruction", instruction(true_type{}),
         sm100::instruction(T::kRows, kTokens, true));
  expect("dense instruction", instruction(false_type{}),
         sm100::instruction(T::kRows, kTokens, false));
}

// --- tensor memory -----------------------------------------------------------------------------

template <int kTokens, int kCtas>
void check_tensor_memory() {
  using T = Types<kTokens, kCtas>;
  using Sparse = typename T::Sparse;
  using Metadata = typename Sparse::ValTypeE;
  using Copy =
      std::conditional_t<kCtas == 1, SM100_UTCCP_128dp128bit_1cta, SM100_UTCCP_128dp128bit_2cta>;
  auto shape = partition_shape_A(Sparse{}, Shape<Int<T::kRows>, _256>{});
  Tensor in_tmem = make_tensor<typename Sparse::FrgTypeE>(shape);
  in_tmem.data() = kTmem;
  for (int i = 0; i < sm100::kInstructions; ++i) {
    expect("metadata of an instruction",
           static_cast<uint32_t>(raw_pointer_cast(in_tmem(_, _, i).data())),
           kTmem + sm100::metadata_step(i));
  }
  // Lane = row; byte k / 8 of a row in order. One-bit places, 2^21 of them a lane.
  for (int m = 0; m < 128; ++m) {
    for (int k = 0; k < 256; ++k) {
      const int64_t place = in_tmem.layout()(make_coord(m, k % 64), 0, k / 64);
      const int64_t byte = 4 * sm100::metadata_step(k / 64) + k % 64 / 8;
      expect("place of metadata", place / 8, (int64_t{m} << 18) + byte);
    }
  }
  using Atom = ComposedLayout<
      Swizzle<0, 4, 3>, smem_sparse_ptr_flag_bits<8, 8>,
      typename cutlass::Sm1xxGemmSparseConfig<typename Sparse::ValTypeA, cutlass::layout::RowMajor,
                                              Metadata>::TensorEAtom>;
  auto copy = make_utccp_copy(Copy{}, recast<uint8_t>(in_tmem));
  auto thread = copy.get_slice(0);
  Tensor to = thread.partition_D(recast<uint8_t>(in_tmem));
  for (int slot = 0; slot < 8; ++slot) {
    const uint32_t w = 1024 + slot * kSlot;
    uint8_t* at = shared_memory() + w + format::kValueBytes;
    Tensor in_smem = make_tensor(make_smem_ptr(recast_ptr<Metadata>(at)),
                                 UMMA::tile_to_mma_shape(Atom{}, shape));
    Tensor from = get_utccp_smem_desc_tensor<Copy>(thread.partition_S(recast<uint8_t>(in_smem)));
    expect("copies of a unit", static_cast<int>(size<3>(to)), 2);
    for (int half = 0; half < 2; ++half) {
      expect("descriptor of metadata", static_cast<uint64_t>(from(0, 0, 0, half)),
             sm100::metadata_block(w + format::metadata_offset(0, 128 * half)));
      expect("target of metadata",
             static_cast<uint32_t>(raw_pointer_cast(to(_, _, _, half).data())),
             kTmem + sm100::metadata_step(2 * half));
    }
  }
  // Sums: lane = row of the CTA, column = token.
  Tensor sums = partition_fragment_C(typename T::Dense{}, Shape<Int<T::kRows>, Int<kTokens>>{});
  sums.data() = kTmem;
  for (int m = 0; m < 128; ++m) {
    for (int n = 0; n < kTokens; ++n) {
      const int64_t at = sums.layout()(make_coord(m, n), 0, 0);
      expect("place of a sum", at, (static_cast<uint64_t>(m) << 16) + n);
    }
  }
}

// --- tensor maps -------------------------------------------------------------------------------

template <int kTokens, int kCtas, int kPairs>
void check_tensor_maps(const Config& config) {
  constexpr int64_t kM = 500, kK = 1360, kStride = 1408, kBytes = 40 * 20480 + 3 * 16384;
  alignas(128) static uint8_t x[16], w[16];
  spense::GemmArgs args;
  args.m = kM, args.k = kK, args.x = x, args.x_stride = kStride, args.w = w, args.w_bytes = kBytes;

  auto x_slot = tile_to_shape(UMMA::Layout_K_SW128_Atom<E4m3>{},
                              Shape<Int<kTokens / kCtas / kPairs>, _128>{});
  Tensor x_matrix = make_tensor(make_gmem_ptr(reinterpret_cast<E4m3*>(x)), make_shape(kM, kK),
                                make_stride(kStride, _1{}));
  make_tma_atom(SM90_TMA_LOAD{}, x_matrix, x_slot, Shape<Int<kTokens / kCtas / kPairs>, _128>{});
  const TensorMapCall theirs = last_tensor_map();
  spense::cuda::tensor_map(sm100::x_matrix(config, args));
  expect_same_map("tensor map of x", theirs, last_tensor_map());
  if (kCtas == 1) return;

  const auto unit = [&]<int kUnit>(Int<kUnit>) {
    using Rows = Int<kUnit / 128>;
    Tensor stream =
        make_tensor(make_gmem_ptr(w), make_shape(kBytes / 128, _128{}), make_stride(_128{}, _1{}));
    auto slot = make_layout(Shape<Rows, _128>{}, Stride<_128, _1>{});
    make_tma_atom(SM90_TMA_LOAD{}, stream, slot, Shape<Rows, _128>{});
    const TensorMapCall of_cute = last_tensor_map();
    spense::cuda::tensor_map(sm100::w_matrix(args, kUnit));
    expect_same_map("tensor map of w", of_cute, last_tensor_map());
  };
  unit(Int<format::kSparseUnitBytes>{});
  unit(Int<format::kDenseUnitBytes>{});
}

template <int kTokens, int kCtas, int kPairs, int kW, int kX, int kResidency>
void check(const char* name) {
  const Config config{name, kTokens, kCtas, kPairs, kW, kX, kResidency};
  check_images<kTokens, kCtas>();
  check_descriptors<kTokens, kCtas>();
  check_tensor_memory<kTokens, kCtas>();
  check_tensor_maps<kTokens, kCtas, kPairs>(config);
  std::printf("config %s\n", name);
}

}  // namespace

int main(int count, char** words) {
  if (count > 1 && std::string(words[1]) == "--disagree") disagree();
#define INSTANCE(name, ...) check<__VA_ARGS__>(#name);
#include "heuristics/sm100_instances.def"
#undef INSTANCE
  return report();
}
