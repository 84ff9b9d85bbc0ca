// SPDX-License-Identifier: Apache-2.0
// What most of the model includes, compiled once (build.py).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string_view>

#include "machine.h"
