# SPDX-License-Identifier: Apache-2.0
"""Inputs, references and comparisons shared by tests and benchmarks."""
