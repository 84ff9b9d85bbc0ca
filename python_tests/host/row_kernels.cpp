// SPDX-License-Identifier: Apache-2.0
// Runs the CUDA row kernels on fibers (fibers/fibers.h).
//
//   row_kernels <in> <out> norm|gated|plain m k type stride multiprocessors gather second weight
//   flag eps
//
// in: x, the second input (residual or up; `second` 1 where there is one), both [m, stride], weight
// (0: none, 1: type of x, 2: float32) and gather (0, 1), one after the other. `flag`: unit offset
// of a norm, activation otherwise. out: y [m, padded k], scale [m], sum [m, k].
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "cuda/gated.cu"
#include "cuda/norm.cu"
#include "cuda/quantize.cu"

namespace spense::cuda {
namespace {
thread_local unsigned char row_memory[kMaxSmem] __attribute__((aligned(16)));
int multiprocessors;
}  // namespace

DeviceInfo device_info() { return {90, multiprocessors}; }
}  // namespace spense::cuda

int main(int, char** argv) {
  using namespace spense;
  std::ifstream file(argv[1], std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  const bool norm = std::string(argv[3]) == "norm";
  const auto number = [&](int i) { return std::atoll(argv[i]); };
  cuda::QuantizeArgs rows;
  rows.m = number(4);
  rows.k = number(5);
  rows.in = static_cast<InType>(number(6));
  rows.x_stride = number(7);
  cuda::multiprocessors = static_cast<int>(number(8));
  const int64_t element = bytes_of(rows.in);
  // Aligned as an allocator would.
  std::vector<std::unique_ptr<void, void (*)(void*)>> kept;
  size_t at = 0;
  const auto take = [&](int64_t size) -> char* {
    char* data = static_cast<char*>(std::aligned_alloc(256, (size + 511) / 256 * 256));
    kept.emplace_back(data, std::free);
    if (at + size > bytes.size()) std::exit(3);
    std::memcpy(data, bytes.data() + at, size);
    at += size;
    return data;
  };
  const auto make = [&](int64_t size) -> char* {
    char* data = static_cast<char*>(std::aligned_alloc(256, (size + 511) / 256 * 256));
    kept.emplace_back(data, std::free);
    std::memset(data, 0xAA, size);
    return data;
  };
  rows.x = take(rows.m * rows.x_stride * element);
  const char* second = number(10) ? take(rows.m * rows.x_stride * element) : nullptr;
  const char* weight = number(11) ? take(rows.k * (number(11) == 2 ? 4 : element)) : nullptr;
  rows.gather = number(9) ? reinterpret_cast<const int32_t*>(take(rows.k * 4)) : nullptr;
  rows.y_stride = (rows.k + 127) / 128 * 128;
  rows.y = reinterpret_cast<uint8_t*>(make(rows.m * rows.y_stride));
  rows.scale = reinterpret_cast<float*>(make(rows.m * 4));
  char* sum = make(rows.m * rows.k * element);
  if (norm) {
    cuda::NormArgs args;
    args.rows = rows;
    args.residual = second;
    args.residual_stride = rows.x_stride;
    args.sum = second ? sum : nullptr;
    args.weight = weight;
    args.float_weight = number(11) == 2 || rows.in == InType::kFloat32;
    args.unit_offset = number(12) != 0;
    args.eps = std::strtof(argv[13], nullptr);
    cuda::norm_quantize(args, nullptr);
  } else if (!second) {
    cuda::quantize_fp8(rows, nullptr);
  } else {
    cuda::GatedArgs args;
    args.rows = rows;
    args.up = second;
    args.up_stride = rows.x_stride;
    args.activation = static_cast<Activation>(number(12));
    cuda::gated_quantize(args, nullptr);
  }
  std::ofstream out(argv[2], std::ios::binary);
  out.write(reinterpret_cast<char*>(rows.y), rows.m * rows.y_stride);
  out.write(reinterpret_cast<char*>(rows.scale), rows.m * 4);
  out.write(sum, rows.m * rows.k * element);
  return out.good() ? 0 : 4;
}
