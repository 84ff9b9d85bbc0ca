# SPDX-License-Identifier: Apache-2.0
"""Parts of decode.py: model shapes, linear layers of each kind, attention, the step, results."""
