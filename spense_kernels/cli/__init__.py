# SPDX-License-Identifier: Apache-2.0
"""The command line: `spense`, or `python -m spense_kernels.cli`."""

from spense_kernels.cli.app import app, main

__all__ = ["app", "main"]
