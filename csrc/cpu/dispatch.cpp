// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.h"

#include <cstring>

#include "cpu/cpu_features.h"

namespace spense::cpu {
namespace {

template <typename Config>
std::vector<const Config*> available(std::initializer_list<const Config*> configs) {
  std::vector<const Config*> found;
  for (const Config* config : configs) {
    if (config->available()) found.push_back(config);
  }
  return found;
}

template <typename Config>
const Config* find(const std::vector<const Config*>& configs, const char* name) {
  if (name == nullptr || *name == '\0') return configs.front();
  for (const Config* config : configs) {
    if (std::strcmp(config->name, name) == 0) return config;
  }
  return nullptr;
}

}  // namespace

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bf16");
}
#endif

const std::vector<const GemmConfig*>& gemm_configs() {
  static const auto configs = available<GemmConfig>({
#if defined(__x86_64__)
      &kGemmAvx512, &kGemmAvx2,
#endif
      &kGemmPortable, &kGemmReference});
  return configs;
}

const std::vector<const QuantizeConfig*>& quantize_configs() {
  static const auto configs = available<QuantizeConfig>({
#if defined(__x86_64__)
      &kQuantizeAvx512, &kQuantizeAvx2,
#endif
      &kQuantizePortable, &kQuantizeReference});
  return configs;
}

const GemmConfig* find_gemm(const char* name) { return find(gemm_configs(), name); }
const QuantizeConfig* find_quantize(const char* name) { return find(quantize_configs(), name); }

std::string config_names() {
  std::string names;
  for (const GemmConfig* config : gemm_configs()) {
    names += (names.empty() ? "" : ", ") + std::string(config->name);
  }
  return names;
}

int64_t first_bad_gather(const int32_t* gather, int64_t k) {
  for (int64_t p = 0; p < k; ++p) {
    if (gather[p] < 0 || gather[p] >= k) return p;
  }
  return -1;
}

}  // namespace spense::cpu
