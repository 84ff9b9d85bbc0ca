// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of a family, by the names of their configs.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

#include "device/stream.h"

namespace spense::cuda {

template <class Params>
struct Instance {
  std::string_view name;
  void (*launch)(const Params& params, Stream stream);
  int (*max_clusters)();
};

template <class Params, size_t count>
const Instance<Params>& find_instance(const Instance<Params> (&all)[count], std::string_view name) {
  for (const Instance<Params>& instance : all) {
    if (instance.name == name) return instance;
  }
  throw std::logic_error("spense: no kernel for config " + std::string(name));
}

}  // namespace spense::cuda
