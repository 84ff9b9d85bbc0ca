// SPDX-License-Identifier: Apache-2.0
#include "run.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace model {
namespace {

std::string run_one(const Kernel& kernel, const Case& c, Pace pace, uint64_t seed) {
  Machine m;
  m.pace = pace;
  m.random.seed(seed);
  set_machine(&m);
  try {
    Problem problem(c, seed);
    kernel.launch(problem, c.multiprocessors);
    return problem.check(m.regions);
  } catch (const Failure& failure) {
    return failure.what;
  }
}

}  // namespace

int run_all(const std::vector<Kernel>& kernels, int count, char** words) {
  std::string config, name, pace;
  int seeds = 1;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto value = [&] { return std::string(i + 1 < count ? words[++i] : ""); };
    if (word == "--config") config = value();
    if (word == "--case") name = value();
    if (word == "--pace") pace = value();
    if (word == "--seeds") seeds = std::atoi(value().c_str());
    if (word == "--list") {
      for (const Kernel& kernel : kernels) std::printf("%s\n", kernel.name.c_str());
      return 0;
    }
  }
  const std::pair<const char*, Pace> paces[] = {
      {"late", Pace::kLate}, {"early", Pace::kEarly}, {"random", Pace::kRandom}};
  int runs = 0;
  for (const Kernel& kernel : kernels) {
    // A name may go on with a mode, behind a colon.
    if (!config.empty() && kernel.name.substr(0, kernel.name.find(':')) != config) continue;
    for (const Case& c : cases(kernel.tokens, kernel.ctas)) {
      if (!name.empty() && c.name != name) continue;
      for (const auto& [pace_name, p] : paces) {
        if (!pace.empty() && pace != pace_name) continue;
        for (int seed = 1; seed <= seeds; ++seed) {
          const std::string problem = run_one(kernel, c, p, static_cast<uint64_t>(seed));
          std::printf("%s %s, %s, %s, seed %d%s%s\n", problem.empty() ? "ok  " : "FAIL",
                      kernel.name.c_str(), c.name.c_str(), pace_name, seed,
                      problem.empty() ? "" : ": ", problem.c_str());
          std::fflush(stdout);
          ++runs;
          if (!problem.empty()) return 1;
        }
      }
    }
  }
  if (runs == 0) {
    std::printf("nothing to run\n");
    return 2;
  }
  return 0;
}

}  // namespace model
