# SPDX-License-Identifier: Apache-2.0
from spense_kernels.cli import main

main()
