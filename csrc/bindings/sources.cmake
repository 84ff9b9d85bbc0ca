# SPDX-License-Identifier: Apache-2.0
# Each file adds one submodule or group of functions; module.cpp calls them all.
set(SPENSE_BINDING_SOURCES bindings/module.cpp bindings/cpu.cpp bindings/format.cpp
                           bindings/sm90.cpp bindings/sm100.cpp)
