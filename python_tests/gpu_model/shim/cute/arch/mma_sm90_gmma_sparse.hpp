// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
