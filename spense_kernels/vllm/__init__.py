# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: quantization method "spense" for vLLM's own model classes.

vLLM calls `register` in each of its processes, because the package names it as an entry point of
group `vllm.general_plugins`; nothing has to be imported by the user.
"""


def register() -> None:
    """Makes the ops and the quantization method known to vLLM; again is harmless."""
    import spense_kernels.vllm.config  # noqa: F401, registers
