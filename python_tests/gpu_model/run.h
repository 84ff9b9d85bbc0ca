// SPDX-License-Identifier: Apache-2.0
// The program around the kernels of one architecture:
//
//   run_smXX [--config NAME] [--case NAME] [--pace late|early|random] [--seeds N] [--list]
//
// Prints a line a run and stops with exit code 1 at the first that is not bitwise right.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "problem.h"

namespace model {

struct Kernel {
  std::string name;
  int tokens, ctas;
  // Plans and launches on model::machine() for that many multiprocessors.
  std::function<void(Problem& problem, int multiprocessors)> launch;
};

int run_all(const std::vector<Kernel>& kernels, int count, char** words);

}  // namespace model
