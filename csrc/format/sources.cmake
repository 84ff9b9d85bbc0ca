# SPDX-License-Identifier: Apache-2.0
set(SPENSE_FORMAT_SOURCES format/pack.cpp format/status.cpp)
