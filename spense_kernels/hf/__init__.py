# SPDX-License-Identifier: Apache-2.0
"""spense checkpoints in transformers: from_pretrained, save_pretrained, pruning while loading.

Importing this package imports transformers and adds quantization method "spense" to it.
"""

from __future__ import annotations

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from spense_kernels.checkpoint.config import QUANT_METHOD
from spense_kernels.hf.config import SpenseConfig
from spense_kernels.hf.load import load
from spense_kernels.hf.quantizer import SpenseQuantizer, attach

__all__ = ["SpenseConfig", "SpenseQuantizer", "attach", "load"]

# A second import of this module in one process finds them there.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(SpenseConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(SpenseQuantizer)
