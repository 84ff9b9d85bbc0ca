# SPDX-License-Identifier: Apache-2.0
"""The main job on a real model, start to end: prune, save, load elsewhere, compare, report."""
