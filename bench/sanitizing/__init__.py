# SPDX-License-Identifier: Apache-2.0
"""Parts of sanitize.py: the work that is watched, a control kernel, what the tools reported."""
