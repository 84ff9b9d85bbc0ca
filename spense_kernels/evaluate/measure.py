# SPDX-License-Identifier: Apache-2.0
"""Perplexity over fixed windows, with the standard error that windows give."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spense_kernels.errors import SpenseError, UserError

LOGIT_BYTES = 64 << 20  # float32 logits held at a time


@torch.inference_mode()
def perplexity(model, windows: Tensor, batch: int = 1, progress=None) -> dict:
    """Next-token loss of a causal LM over windows.

    Args:
        model: transformers causal LM. Logits are formed a few positions at a time, so a large
            vocabulary costs LOGIT_BYTES and not windows * length * vocabulary * 4 bytes.
        windows: int64 [S, L]; L - 1 predictions a window.
        batch: windows a forward pass.
        progress: called with the number of windows done after each pass, or None.

    Returns a dict:
        nll: mean loss in nats a token.       stderr: its standard error.
        ppl: exp(nll).                        ppl_stderr: ppl * stderr (first order).
        tokens: predictions made.             window_nll: mean loss of each window.
    The standard error takes windows as independent samples: std(window_nll) / sqrt(S), because
    tokens of one window are correlated. It is None for a single window.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UserError(f"perplexity: windows must be [S >= 1, L >= 2], got {list(windows.shape)}")
    device = next(model.parameters()).device
    losses: list[float] = []
    for start in range(0, windows.shape[0], batch):
        ids = windows[start : start + batch].to(device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        for row in range(ids.shape[0]):
            loss = _token_nll(model, hidden[row, :-1], ids[row, 1:]).mean().item()
            if not math.isfinite(loss):
                raise SpenseError(f"perplexity: the loss of window {start + row} is {loss}")
            losses.append(loss)
        if progress is not None:
            progress(ids.shape[0])
    return summarise(losses, windows.shape[1] - 1)


def summarise(window_nll: list[float], tokens_a_window: int) -> dict:
    """The dict that perplexity() returns, from the windows' mean losses."""
    mean, error = _mean_and_error(window_nll)
    return {
        "nll": mean,
        "stderr": error,
        "ppl": math.exp(mean),
        "ppl_stderr": None if error is None else math.exp(mean) * error,
        "tokens": tokens_a_window * len(window_nll),
        "window_nll": list(window_nll),
    }


def paired_difference(result: dict, baseline: dict) -> dict:
    """Loss above a baseline over the same windows: {"nll", "stderr"}.

    Paired by window, which removes how hard each window is, so it is far more precise than the
    difference of two means.
    """
    a, b = result["window_nll"], baseline["window_nll"]
    if len(a) != len(b):
        raise SpenseError(f"paired_difference: {len(a)} windows against {len(b)}")
    mean, error = _mean_and_error([x - y for x, y in zip(a, b, strict=True)])
    return {"nll": mean, "stderr": error}


def _mean_and_error(values: list[float]) -> tuple[float, float | None]:
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def logits_of(model, hidden: Tensor) -> Tensor:
    """float32 [T, vocabulary] logits of last hidden states [T, D], scaled and capped."""
    scale, cap = logit_form(model.config)
    logits = model.get_output_embeddings()(hidden).float()
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _token_nll(model, hidden: Tensor, targets: Tensor) -> Tensor:
    rows = max(1, LOGIT_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))
    parts = []
    for start in range(0, hidden.shape[0], rows):
        logits = logits_of(model, hidden[start : start + rows])
        chunk = targets[start : start + rows]
        parts.append(torch.nn.functional.cross_entropy(logits, chunk, reduction="none"))
    return torch.cat(parts)


def logit_form(config) -> tuple[float, float | None]:
    """(scale, cap) of a model's logits: cap * tanh(scale * output of the head / cap).

    Cohere multiplies, Granite divides, Gemma 2 caps; (1.0, None) for all others.
    """
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)
    return float(scale), getattr(config, "final_logit_softcapping", None)
