// SPDX-License-Identifier: Apache-2.0
#include "torch/cuda_memory.h"

#include <dlfcn.h>

#include <algorithm>
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
  constexpr int64_t kRound = 4096, kSlab = 1 << 20;
  // A graph may run on any stream, beside eager calls: what it captured stays its own.
  const cuda::CaptureInfo capture = cuda::capture_info(stream);
  struct Piece {
    char* memory = nullptr;
    int64_t bytes = 0;
  };
  using Key = std::tuple<int32_t, cuda::Stream, uint64_t>;
  // Not torch's memory: what is allocated during a capture belongs to the pool of that graph, and
  // torch.compile refuses pools that hold more than a graph's outputs. Nothing is freed, since a
  // graph or a kernel under way may still use what a larger request replaced.
  static std::mutex guard;
  static auto* pieces = new std::map<Key, Piece>;
  static auto* slabs = new std::map<int32_t, Piece>;  // what is left of a device's newest one
  const std::lock_guard lock(guard);
  const int32_t device = like.get_device_index();
  Piece& piece = (*pieces)[{device, stream, capture.active ? capture.id : 0}];
  const int64_t bytes = (count * int64_t{sizeof(uint32_t)} + kRound - 1) / kRound * kRound;
  if (piece.bytes < bytes) {
    Piece& slab = (*slabs)[device];
    if (slab.bytes < bytes) {
      const int64_t size = std::max(bytes, kSlab);
      slab = {static_cast<char*>(cuda::permanent_memory(size)), size};
    }
    piece = {slab.memory, bytes};
    slab = {slab.memory + bytes, slab.bytes - bytes};
    cuda::fill_zero(piece.memory, bytes, stream);
  }
  return reinterpret_cast<uint32_t*>(piece.memory);
}

}  // namespace spense::ops
