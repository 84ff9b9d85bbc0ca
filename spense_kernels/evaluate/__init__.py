# SPDX-License-Identifier: Apache-2.0
"""Texts, windows, perplexity with its standard error, greedy generation, op counting."""

from spense_kernels.evaluate.generation import generate
from spense_kernels.evaluate.measure import logit_form, logits_of, paired_difference, perplexity
from spense_kernels.evaluate.op_count import OpCounter
from spense_kernels.evaluate.text import Corpus, files, pick, python_docs, windows

__all__ = [
    "Corpus",
    "OpCounter",
    "files",
    "generate",
    "logit_form",
    "logits_of",
    "paired_difference",
    "perplexity",
    "pick",
    "python_docs",
    "windows",
]
