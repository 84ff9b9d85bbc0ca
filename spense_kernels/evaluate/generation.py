# SPDX-License-Identifier: Apache-2.0
"""Continuations of a prompt by greedy decoding."""

from __future__ import annotations

import torch

from spense_kernels.errors import UserError


@torch.inference_mode()
def generate(model, tokenizer, prompt: str, max_new_tokens: int = 48, **options) -> str:
    """The model's continuation of `prompt` (without the prompt), greedy unless options say else.

    Args:
        options: passed on to transformers' generate, e.g. do_sample=True, temperature=0.8.

    Raises UserError for an empty prompt or max_new_tokens < 1.
    """
    if not prompt.strip():
        raise UserError("generate: prompt is empty")
    if max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}")
    device = next(model.parameters()).device
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    inputs.pop("token_type_ids", None)
    pad = tokenizer.pad_token_id
    options.setdefault("do_sample", False)
    options.setdefault("pad_token_id", pad if pad is not None else tokenizer.eos_token_id)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
