// SPDX-License-Identifier: Apache-2.0
// _C.sm90: the choice of an SM90 kernel and how long it is expected to take.
#include <stdexcept>

#include "bindings/module.h"
#include "heuristics/cost.h"

namespace py = pybind11;

namespace spense::bindings {
namespace {

using namespace heuristics;

GemmDesc describe(int64_t m, int64_t n, int64_t k, int64_t packed_bytes, int multiprocessors) {
  GemmDesc desc;
  desc.m = m, desc.n = n, desc.k = k;
  desc.packed_bytes = packed_bytes;
  desc.multiprocessors = multiprocessors;
  if (m < 1 || n < 1 || k < 1 || multiprocessors < 1) {
    throw std::invalid_argument("sm90: m, n, k, multiprocessors: expected values above 0");
  }
  const int64_t blocks = desc.row_tiles() * desc.k_blocks(), sparse = desc.sparse_units();
  const int64_t least = kSparseBlocks * sparse + kDenseBlocks * (blocks - 2 * sparse);
  if (sparse < 0 || 2 * sparse > blocks || least * format::kBlockBytes != packed_bytes) {
    throw std::invalid_argument("sm90: packed_bytes: no " + std::to_string(n) + " x " +
                                std::to_string(k) + " weight has " + std::to_string(packed_bytes));
  }
  return desc;
}

}  // namespace

void add_sm90(py::module_& parent) {
  py::module_ m = parent.def_submodule("sm90", "Choice of an SM90 kernel (heuristics/gemm.h).");
  m.def("configs", [] {
    std::vector<std::string> names;
    for (const GemmConfig& config : configs()) names.emplace_back(config.name);
    return names;
  });
  m.def(
      "estimate",
      [](int64_t m, int64_t n, int64_t k, int64_t packed_bytes, int multiprocessors) {
        const GemmDesc desc = describe(m, n, k, packed_bytes, multiprocessors);
        const GemmChoice choice = choose(desc, {});
        const int slots = cluster_slots(desc, {}, *choice.config);
        return py::dict(py::arg("config") = choice.name(),
                        py::arg("us") = estimate_us(desc, choice, slots));
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("packed_bytes"),
      py::arg("multiprocessors") = 132,
      "The config that would run and its microseconds on an H100 in a chain of launches, with "
      "fast_accum. A model (heuristics/cost.h), not a measurement.");
  m.def(
      "schedule",
      [](int64_t m, int64_t n, int64_t k, int64_t packed_bytes, const std::string& choice,
         int multiprocessors) {
        const GemmDesc desc = describe(m, n, k, packed_bytes, multiprocessors);
        const auto found = find_choice(desc, {}, choice);
        if (!found) {
          throw std::invalid_argument("sm90: choice: expected one of " + choice_names() + ", got " +
                                      choice);
        }
        const auto p = schedule(desc, *found, cluster_slots(desc, {}, *found->config));
        return py::dict(py::arg("clusters") = p.clusters, py::arg("whole") = p.whole,
                        py::arg("pieces") = p.pieces, py::arg("skew") = p.skew);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("packed_bytes"), py::arg("choice"),
      py::arg("multiprocessors") = 132,
      "How a choice deals out the tiles: clusters of CTAs, tiles that are not cut, pieces of each "
      "where all are cut by themselves, and by how many 1/1024 the last cluster's piece is smaller "
      "than the first's (heuristics/schedule.h).");
}

}  // namespace spense::bindings
