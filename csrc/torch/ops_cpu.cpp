// SPDX-License-Identifier: Apache-2.0
// The ops of spense_kernels/ops.py on the CPU: check, choose, allocate, call. Schemas live there.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/gemm.h"
#include "cpu/quantize.h"
#include "format/pack.h"
#include "torch/common.h"

namespace spense::ops {
namespace {

using torch::stable::parallel_for;

Tensor empty_cpu(std::initializer_list<int64_t> shape, ScalarType type) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::empty(sizes, type);
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

std::unique_ptr<void, Free> aligned_workspace(size_t bytes) {
  constexpr size_t kAlignment = 64;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  std::unique_ptr<void, Free> memory(rounded ? std::aligned_alloc(kAlignment, rounded) : nullptr);
  if (rounded && !memory) throw std::bad_alloc();
  return memory;
}

// Runs check(begin, end) over all tiles and throws the problem of the first tile that has one.
template <typename Check>
void for_tiles(const char* op, int64_t tiles, const Check& check) {
  std::mutex guard;
  format::Status first;
  parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const format::Status status = check(begin, end);
    const std::lock_guard lock(guard);
    if (!status.ok() && (first.ok() || status.tile < first.tile)) first = status;
  });
  throw_unless_ok(op, first);
}

Tensor hybrid_gemm(const Tensor& x, const Tensor& w_packed, const Tensor& w_tiles,
                   const Tensor& x_scale, const Tensor& w_scale, std::optional<Tensor> bias,
                   int64_t n, int64_t k, int64_t layout, std::optional<ScalarType> out_dtype,
                   bool /*fast_accum: sums are always float32 here*/,
                   std::optional<std::string> config) {
  constexpr const char* op = "hybrid_gemm";
  check_hybrid_gemm(x, w_packed, w_tiles, x_scale, w_scale, bias, n, k, layout);
  check_aligned(SPENSE_ARG(op, w_packed), 16);
  const ScalarType y_dtype = out_dtype.value_or(ScalarType::BFloat16);
  const FloatType out = float_type({op, "out_dtype"}, y_dtype);
  const cpu::GemmConfig* gemm = cpu::find_gemm(config ? config->c_str() : nullptr);
  if (!gemm) {
    Arg{op, "config"}.fail("expected one of ", cpu::config_names(), ", got ", *config);
  }
  const auto table = format::check_tile_table(n, k, data<int32_t>(w_tiles), w_packed.numel());
  throw_unless_ok(op, table);

  Tensor y = empty_cpu({x.size(0), n}, y_dtype);
  if (y.numel() == 0) return y;
  cpu::GemmArgs args;
  args.m = x.size(0);
  args.n = n;
  args.k = k;
  args.x = data<uint8_t>(x);
  args.x_stride = row_stride(x);
  args.w = data<uint8_t>(w_packed);
  args.tiles = data<int32_t>(w_tiles);
  args.x_scale = data<float>(x_scale);
  args.x_scale_step = x_scale.size(0) == 1 ? 0 : 1;
  args.w_scale = data<float>(w_scale);
  args.bias = bias ? data<float>(*bias) : nullptr;
  args.y = y.mutable_data_ptr();
  args.out = out;
  const auto plan = gemm->plan(args, static_cast<int>(torch::stable::get_num_threads()));
  const auto workspace = aligned_workspace(plan.workspace_bytes);
  if (plan.prepare_items) {
    parallel_for(0, plan.prepare_items, 1, [&](int64_t begin, int64_t end) {
      gemm->prepare(plan, workspace.get(), begin, end);
    });
  }
  parallel_for(0, plan.run_items, 1,
               [&](int64_t begin, int64_t end) { gemm->run(plan, workspace.get(), begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> quantize_fp8(const Tensor& x, std::optional<Tensor> gather) {
  constexpr const char* op = "quantize_fp8";
  check_rows_to_quantize(SPENSE_ARG(op, x), gather);
  cpu::QuantizeArgs args;
  args.in = float_type({op, "x"}, x.scalar_type());
  args.m = x.size(0);
  args.k = x.size(1);
  if (gather) {
    args.gather = data<int32_t>(*gather);
    if (const int64_t bad = cpu::first_bad_gather(args.gather, args.k); bad >= 0) {
      Arg{op, "gather"}.fail("expected columns in [0, ", args.k, "), got ", args.gather[bad],
                             " at position ", bad);
    }
  }
  args.y_stride = format::padded_k(args.k);
  Tensor padded = empty_cpu({args.m, args.y_stride}, ScalarType::Float8_e4m3fn);
  Tensor scale = empty_cpu({args.m}, ScalarType::Float);
  if (args.m > 0) {
    args.x = x.const_data_ptr();
    args.x_stride = row_stride(x);
    args.y = mutable_data<uint8_t>(padded);
    args.scale = mutable_data<float>(scale);
    const cpu::QuantizeConfig* config = cpu::find_quantize(nullptr);
    const int64_t rows_worth_a_thread = std::max<int64_t>(1, (int64_t{1} << 14) / args.k);
    parallel_for(0, args.m, rows_worth_a_thread,
                 [&](int64_t begin, int64_t end) { config->run(args, begin, end); });
  }
  return {first_columns(padded, args.k), scale};
}

std::tuple<Tensor, Tensor> pack(const Tensor& values, const Tensor& indices, const Tensor& dense,
                                std::vector<int64_t> dense_width, int64_t n, int64_t k,
                                int64_t k_shards) {
  constexpr const char* op = "pack";
  const auto layout = payload_layout(op, dense_width, n, k, k_shards);
  const auto sizes = layout.sizes();
  check_payload_arrays(values, indices, dense, sizes);
  for_tiles(op, sizes.tiles, [&](int64_t begin, int64_t end) {
    return format::check_payload(layout, data<uint8_t>(values), data<uint8_t>(indices),
                                 data<uint8_t>(dense), begin, end);
  });
  Tensor w_packed = empty_cpu({sizes.packed}, ScalarType::Byte);
  Tensor w_tiles = empty_cpu({sizes.tiles + 1, format::kTileTableColumns}, ScalarType::Int);
  layout.write_tile_table(mutable_data<int32_t>(w_tiles));
  uint8_t* packed = mutable_data<uint8_t>(w_packed);
  parallel_for(0, sizes.tiles, 1, [&](int64_t begin, int64_t end) {
    format::pack(layout, data<uint8_t>(values), data<uint8_t>(indices), data<uint8_t>(dense),
                 packed, begin, end);
  });
  return {w_packed, w_tiles};
}

std::tuple<Tensor, Tensor, Tensor> unpack(const Tensor& w_packed, const Tensor& w_tiles,
                                          std::vector<int64_t> dense_width, int64_t n, int64_t k,
                                          int64_t k_shards, int64_t layout) {
  constexpr const char* op = "unpack";
  const auto payload = check_unpack(w_packed, w_tiles, dense_width, n, k, k_shards, layout);
  const auto sizes = payload.sizes();
  const auto table = format::check_tile_table(payload, data<int32_t>(w_tiles), w_packed.numel());
  throw_unless_ok(op, table);

  Tensor values = empty_cpu({sizes.values}, ScalarType::Byte);
  Tensor indices = empty_cpu({sizes.indices}, ScalarType::Byte);
  Tensor dense = empty_cpu({sizes.dense}, ScalarType::Byte);
  uint8_t* out[] = {mutable_data<uint8_t>(values), mutable_data<uint8_t>(indices),
                    mutable_data<uint8_t>(dense)};
  for_tiles(op, sizes.tiles, [&](int64_t begin, int64_t end) {
    return format::unpack(payload, data<uint8_t>(w_packed), out[0], out[1], out[2], begin, end);
  });
  return {values, indices, dense};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spense, CPU, m) {
  m.impl("hybrid_gemm", TORCH_BOX(&hybrid_gemm));
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace spense::ops
