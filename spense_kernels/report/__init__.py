# SPDX-License-Identifier: Apache-2.0
"""What a dense fraction costs and gives: quality against speed, sensitivity, dense columns."""

from spense_kernels.report.document import write_report
from spense_kernels.report.pareto import Chosen, measure

__all__ = ["Chosen", "measure", "write_report"]
