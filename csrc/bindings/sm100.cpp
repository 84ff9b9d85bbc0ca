// SPDX-License-Identifier: Apache-2.0
// _C.sm100: configs, budgets, choice and estimates of the SM100 family.
#include "heuristics/sm100.h"

#include <stdexcept>

#include "bindings/module.h"

namespace py = pybind11;

namespace spense::bindings {
namespace {

using namespace heuristics;

py::dict facts(const sm100::Config& c) {
  return py::dict(
      py::arg("name") = c.name, py::arg("tokens") = c.tokens, py::arg("ctas") = c.ctas,
      py::arg("pairs") = c.pairs, py::arg("w_stages") = c.w_stages,
      py::arg("x_stages") = c.x_stages, py::arg("residency") = c.residency,
      py::arg("accumulators") = sm100::accumulators(c),
      py::arg("smem_bytes") = sm100::smem_bytes(c), py::arg("smem_limit") = sm100::smem_limit(c),
      py::arg("tmem_used") = sm100::tmem_used(c), py::arg("tmem_columns") = sm100::tmem_columns(c),
      py::arg("threads") = sm100::kThreads);
}

const sm100::Config& named(const std::string& name) {
  const sm100::Config* config = sm100::find_config(name);
  if (!config) {
    throw std::invalid_argument("sm100: config: expected one of " + sm100::config_names() +
                                ", got " + name);
  }
  return *config;
}

GemmDesc describe(int64_t m, int64_t n, int64_t k, int64_t packed_bytes, int multiprocessors) {
  GemmDesc desc;
  desc.m = m, desc.n = n, desc.k = k;
  desc.packed_bytes = packed_bytes;
  desc.multiprocessors = multiprocessors;
  return desc;
}

}  // namespace

void add_sm100(py::module_& parent) {
  py::module_ m = parent.def_submodule("sm100", "Choice of an SM100 kernel (heuristics/sm100.h).");
  const sm100::Machine machine;
  m.attr("MACHINE") = py::dict(py::arg("clock_ghz") = machine.clock_ghz,
                               py::arg("dram_bytes_per_us") = machine.dram_bytes_per_us,
                               py::arg("l2_bytes_per_us") = machine.l2_bytes_per_us,
                               py::arg("smem_bytes_per_clock") = machine.smem_bytes_per_clock,
                               py::arg("macs_per_clock") = machine.macs_per_clock,
                               py::arg("clocks_per_store") = machine.clocks_per_store);
  m.def("configs", [] {
    py::list all;
    for (const sm100::Config& c : sm100::configs()) all.append(facts(c));
    return all;
  });
  m.def(
      "choose",
      [](int64_t m, int64_t n, int64_t k, int64_t packed_bytes, int multiprocessors) {
        return sm100::choose(describe(m, n, k, packed_bytes, multiprocessors)).name;
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("packed_bytes"),
      py::arg("multiprocessors") = 148);
  m.def(
      "estimate",
      [](const std::string& name, int64_t m, int64_t n, int64_t k, int64_t packed_bytes,
         int multiprocessors) {
        const sm100::Config& c = named(name);
        const GemmDesc desc = describe(m, n, k, packed_bytes, multiprocessors);
        const sm100::Estimate e = sm100::estimate(desc, c);
        const ScheduleParams s = sm100::schedule(desc, c);
        return py::dict(py::arg("tensor_us") = e.tensor_us, py::arg("smem_us") = e.smem_us,
                        py::arg("dram_us") = e.dram_us, py::arg("l2_us") = e.l2_us,
                        py::arg("total_us") = e.total_us(),
                        py::arg("ctas") = s.clusters * sm100::cluster_ctas(c),
                        py::arg("partial_bytes") = sm100::partial_bytes(c, s));
      },
      py::arg("config"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("packed_bytes"),
      py::arg("multiprocessors") = 148,
      "Microseconds, each bound as if the others cost nothing. A model, not a measurement.");
}

}  // namespace spense::bindings
