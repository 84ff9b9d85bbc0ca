// SPDX-License-Identifier: Apache-2.0
// The ops of spense_kernels/ops.py on CUDA: check, choose, allocate, launch. Nothing waits for the
// device, save pack and unpack, which run once a layer.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cuda/gemm.h"
#include "cuda/pack.h"
#include "cuda/quantize.h"
#include "torch/cuda_memory.h"

namespace spense::ops {
namespace {

constexpr int64_t kTmaAlignment = 16;  // of an address and of a row stride, in bytes

// x itself where the copy engine can read its rows, else a copy on padded rows.
Tensor readable_rows(const Tensor& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const bool rows = x.size(0) == 1 || row_stride(x) % kTmaAlignment == 0;
  if (address % kTmaAlignment == 0 && rows) return x;
  Tensor padded = empty_cuda({x.size(0), format::padded_k(x.size(1))}, x.scalar_type(), x);
  Tensor view = first_columns(padded, x.size(1));
  torch::stable::copy_(view, x);
  return view;
}

// What the size of a stream says about the split, without reading the device.
void check_stream_size(const TensorArg& w_packed, int64_t n, int64_t k) {
  const int64_t tiles = format::tile_count(n);
  const int64_t blocks = format::padded_k(k) / format::kDenseUnitColumns;
  const int64_t most = tiles * blocks * format::kDenseUnitBytes;
  const int64_t saved = 2 * format::kDenseUnitBytes - format::kSparseUnitBytes;  // a sparse unit
  const int64_t least = most - tiles * (blocks / 2) * saved;
  const int64_t bytes = w_packed.tensor.numel();
  if (bytes < least || bytes > most || (most - bytes) % saved) {
    w_packed.fail("expected ", least, " to ", most, " bytes in steps of ", saved, " for n = ", n,
                  ", k = ", k, ", got ", bytes);
  }
}

Tensor hybrid_gemm(const Tensor& x, const Tensor& w_packed, const Tensor& w_tiles,
                   const Tensor& x_scale, const Tensor& w_scale, std::optional<Tensor> bias,
                   int64_t n, int64_t k, int64_t layout, std::optional<ScalarType> out_dtype,
                   bool fast_accum, std::optional<std::string> config) {
  constexpr const char* op = "hybrid_gemm";
  check_hybrid_gemm(x, w_packed, w_tiles, x_scale, w_scale, bias, n, k, layout);
  check_aligned(SPENSE_ARG(op, w_packed), 16);
  check_aligned(SPENSE_ARG(op, w_tiles), 16);
  check_stream_size({{op, "w_packed"}, w_packed}, n, k);
  const ScalarType y_dtype = out_dtype.value_or(ScalarType::BFloat16);
  const FloatType out = float_type({op, "out_dtype"}, y_dtype);

  const DeviceScope scope(x);
  Tensor y = empty_cuda({x.size(0), n}, y_dtype, x);
  if (y.numel() == 0) return y;
  const Tensor rows = readable_rows(x);
  cuda::GemmArgs args;
  args.m = x.size(0);
  args.n = n;
  args.k = k;
  args.x = data<uint8_t>(rows);
  // One row may carry a stride that no copy engine takes; it is never used.
  args.x_stride = rows.size(0) > 1 ? rows.stride(0) : format::padded_k(k);
  args.w = data<uint8_t>(w_packed);
  args.w_bytes = w_packed.numel();
  args.tiles = data<int32_t>(w_tiles);
  args.x_scale = data<float>(x_scale);
  args.x_scale_step = x_scale.size(0) == 1 ? 0 : 1;
  args.w_scale = data<float>(w_scale);
  args.bias = bias ? data<float>(*bias) : nullptr;
  args.y = y.mutable_data_ptr();
  args.out = out;

  const auto plan = cuda::plan_gemm(args, fast_accum, config ? config->c_str() : nullptr);
  if (!plan) {
    const cuda::DeviceInfo device = cuda::device_info();
    const std::string names = cuda::gemm_configs(device);
    if (names.empty()) {
      Arg{op, "x"}.fail(
          "expected a device of an architecture with a kernel in this build (see "
          "spense env), got compute capability ",
          device.arch / 10, ".", device.arch % 10);
    }
    Arg{op, "config"}.fail("expected one of ", names, ", got ", config.value_or("none"));
  }
  Tensor partials = empty_cuda({plan->partial_bytes}, ScalarType::Byte, x);
  uint32_t* counters = plan->counters ? zero_counters(plan->counters, x, scope.stream()) : nullptr;
  cuda::run_gemm(*plan, args, partials.mutable_data_ptr(), counters, scope.stream());
  return y;
}

std::tuple<Tensor, Tensor> quantize_fp8(const Tensor& x, std::optional<Tensor> gather) {
  constexpr const char* op = "quantize_fp8";
  check_rows_to_quantize(SPENSE_ARG(op, x), gather);
  const DeviceScope scope(x);
  cuda::QuantizeArgs args;
  args.in = float_type({op, "x"}, x.scalar_type());
  args.m = x.size(0);
  args.k = x.size(1);
  args.y_stride = format::padded_k(args.k);
  Tensor padded = empty_cuda({args.m, args.y_stride}, ScalarType::Float8_e4m3fn, x);
  Tensor scale = empty_cuda({args.m}, ScalarType::Float, x);
  if (args.m > 0) {
    args.x = x.const_data_ptr();
    args.x_stride = row_stride(x);
    args.gather = gather ? data<int32_t>(*gather) : nullptr;
    args.y = mutable_data<uint8_t>(padded);
    args.scale = mutable_data<float>(scale);
    cuda::quantize_fp8(args, scope.stream());
  }
  return {first_columns(padded, args.k), scale};
}

// The tables of a PackLayout on the device, and the layout that points into them.
struct DeviceLayout {
  DeviceLayout(const format::PayloadLayout& payload, const Tensor& like) {
    const auto& split = payload.split();
    const int64_t count = payload.tiles();
    std::vector<int32_t> table((count + 1) * format::kTileTableColumns);
    payload.write_tile_table(table.data());
    tiles = to_device(table.data(), table.size() * sizeof(int32_t), like);

    std::vector<int32_t> columns;
    std::vector<cuda::BlockOffsets> offsets;
    for (int64_t tile = 0; tile < count; ++tile) columns.push_back(payload.sparse_columns(tile));
    for (int64_t shard = 0; shard < split.k_shards; ++shard) {
      for (int64_t tile = 0; tile < count; ++tile) {
        offsets.push_back({payload.values_offset(shard, tile), payload.indices_offset(shard, tile),
                           payload.dense_offset(shard, tile)});
      }
    }
    keep(columns, like);
    keep(offsets, like);
    layout.n = split.n;
    layout.k = split.k;
    layout.k_shards = split.k_shards;
    layout.tiles = data<int32_t>(tiles);
    layout.sparse_columns = data<int32_t>(kept[0]);
    layout.offsets = static_cast<const cuda::BlockOffsets*>(kept[1].const_data_ptr());
    layout.total_units = table[count * format::kTileTableColumns + format::kUnitPrefix];
    if (split.k_shards > 1) add_shard_maps(payload, like);
  }

  cuda::PackLayout layout;
  Tensor tiles;  // bytes of w_tiles

 private:
  // Gather order goes shell by shell, and inside a shell shard by shard.
  void add_shard_maps(const format::PayloadLayout& payload, const Tensor& like) {
    const auto& split = payload.split();
    const int64_t granules = split.k / format::kGranule;
    std::vector<int32_t> shard_of_gather, gather_of_shard(granules);
    const auto& shells = payload.shells();
    for (size_t shell = 0; shell + 1 < shells.size(); ++shell) {
      for (int64_t shard = 0; shard < split.k_shards; ++shard) {
        for (int64_t p = shells[shell]; p < shells[shell + 1]; p += format::kGranule) {
          const int64_t q = (shard * payload.shard_columns() + p) / format::kGranule;
          gather_of_shard[q] = static_cast<int32_t>(shard_of_gather.size());
          shard_of_gather.push_back(static_cast<int32_t>(q));
        }
      }
    }
    keep(shard_of_gather, like);
    keep(gather_of_shard, like);
    layout.shard_of_gather = data<int32_t>(kept[2]);
    layout.gather_of_shard = data<int32_t>(kept[3]);
  }

  template <typename T>
  void keep(const std::vector<T>& host, const Tensor& like) {
    kept.push_back(to_device(host.data(), host.size() * sizeof(T), like));
  }

  std::vector<Tensor> kept;
};

Tensor to_cpu(const Tensor& tensor) {
  return torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

std::tuple<Tensor, Tensor> pack(const Tensor& values, const Tensor& indices, const Tensor& dense,
                                std::vector<int64_t> dense_width, int64_t n, int64_t k,
                                int64_t k_shards) {
  constexpr const char* op = "pack";
  const auto payload = payload_layout(op, dense_width, n, k, k_shards);
  const auto sizes = payload.sizes();
  check_payload_arrays(values, indices, dense, sizes);

  const DeviceScope scope(values);
  const DeviceLayout device(payload, values);
  const auto* in_values = data<uint8_t>(values);
  const auto* in_indices = data<uint8_t>(indices);
  const auto* in_dense = data<uint8_t>(dense);
  const int32_t none = 0;
  Tensor bad = to_device(&none, sizeof none, values);
  cuda::check_payload(device.layout, in_values, in_indices, in_dense,
                      static_cast<int32_t*>(bad.mutable_data_ptr()), scope.stream());
  if (*data<int32_t>(to_cpu(bad))) {
    // The host check finds the place and the words.
    const Tensor v = to_cpu(values), i = to_cpu(indices), d = to_cpu(dense);
    throw_unless_ok(op, format::check_payload(payload, data<uint8_t>(v), data<uint8_t>(i),
                                              data<uint8_t>(d), 0, sizes.tiles));
  }
  Tensor w_packed = empty_cuda({sizes.packed}, ScalarType::Byte, values);
  cuda::pack(device.layout, in_values, in_indices, in_dense, mutable_data<uint8_t>(w_packed),
             scope.stream());
  Tensor w_tiles =
      empty_cuda({sizes.tiles + 1, format::kTileTableColumns}, ScalarType::Int, values);
  std::vector<int32_t> table(w_tiles.numel());
  payload.write_tile_table(table.data());
  Tensor staged =
      torch::stable::empty({sizes.tiles + 1, format::kTileTableColumns}, ScalarType::Int);
  std::copy(table.begin(), table.end(), mutable_data<int32_t>(staged));
  torch::stable::copy_(w_tiles, staged);
  return {w_packed, w_tiles};
}

std::tuple<Tensor, Tensor, Tensor> unpack(const Tensor& w_packed, const Tensor& w_tiles,
                                          std::vector<int64_t> dense_width, int64_t n, int64_t k,
                                          int64_t k_shards, int64_t layout) {
  constexpr const char* op = "unpack";
  const auto payload = check_unpack(w_packed, w_tiles, dense_width, n, k, k_shards, layout);
  const auto sizes = payload.sizes();
  const DeviceScope scope(w_packed);
  const Tensor host_table = to_cpu(w_tiles);
  throw_unless_ok(op,
                  format::check_tile_table(payload, data<int32_t>(host_table), w_packed.numel()));

  const DeviceLayout device(payload, w_packed);
  Tensor values = empty_cuda({sizes.values}, ScalarType::Byte, w_packed);
  Tensor indices = empty_cuda({sizes.indices}, ScalarType::Byte, w_packed);
  Tensor dense = empty_cuda({sizes.dense}, ScalarType::Byte, w_packed);
  cuda::unpack(device.layout, data<uint8_t>(w_packed), mutable_data<uint8_t>(values),
               mutable_data<uint8_t>(indices), mutable_data<uint8_t>(dense), scope.stream());
  return {values, indices, dense};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spense, CUDA, m) {
  m.impl("hybrid_gemm", TORCH_BOX(&hybrid_gemm));
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace spense::ops
