// SPDX-License-Identifier: Apache-2.0
#include "torch/cuda_memory.h"

#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

namespace spense::ops {
namespace {

// The function lives in torch's CUDA library, which this library is not linked to, so that one
// build serves every torch: a weak symbol would stay null.
cuda::Stream current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  if (!getter) throw std::runtime_error("spense: expected a torch with CUDA, got one without");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

}  // namespace

DeviceScope::DeviceScope(const Tensor& tensor)
    : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

Tensor empty_cuda(const std::vector<int64_t>& shape, ScalarType type, const Tensor& like) {
  return torch::stable::empty(shape, type, std::nullopt, like.device());
}

Tensor to_device(const void* host, int64_t bytes, const Tensor& like) {
  Tensor staged = torch::stable::empty({bytes}, ScalarType::Byte);
  std::memcpy(staged.mutable_data_ptr(), host, static_cast<size_t>(bytes));
  return torch::stable::to(staged, like.device());
}

uint32_t* zero_counters(int64_t count, const Tensor& like, cuda::Stream stream) {
  constexpr int64_t kRound = 1024;
  // A graph may run on any stream, beside eager calls: what it captured stays its own.
  const cuda::CaptureInfo capture = cuda::capture_info(stream);
  using Key = std::tuple<int32_t, cuda::Stream, uint64_t>;
  static std::mutex guard;
  // Never freed: a graph or a kernel under way may still use what a larger request replaced.
  static auto* pool = new std::map<Key, std::vector<Tensor>>;
  const std::lock_guard lock(guard);
  auto& buffers = (*pool)[{like.get_device_index(), stream, capture.active ? capture.id : 0}];
  const int64_t bytes = (count + kRound - 1) / kRound * kRound * int64_t{sizeof(uint32_t)};
  if (buffers.empty() || buffers.back().numel() < bytes) {
    Tensor fresh = empty_cuda({bytes}, ScalarType::Byte, like);
    cuda::fill_zero(fresh.mutable_data_ptr(), bytes, stream);
    buffers.push_back(fresh);
  }
  return static_cast<uint32_t*>(buffers.back().mutable_data_ptr());
}

}  // namespace spense::ops
