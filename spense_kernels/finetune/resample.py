# SPDX-License-Identifier: Apache-2.0
"""Windows with some tokens drawn anew from what the dense model says in their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spense_kernels.evaluate import logit_form
from spense_kernels.finetune.loss import Head, formed, parts_of


@torch.no_grad()
def resampled(
    model: nn.Module, hidden: Tensor, ids: Tensor, places: Tensor, chances: Tensor
) -> Tensor:
    """int64 [B, L]: `ids` with the tokens at `places` drawn from the model's predictions there.

    Args:
        hidden: [B, L, D] last hidden states of the model for `ids`.
        places: int64 [B, R] in 1..L-1, each at most once a row.
        chances: float32 [B, R] in 0..1: where in the cumulated probabilities the draw falls.

    All draws see the tokens that `ids` has before them, not each other.
    """
    before = (places - 1)[:, :, None].expand(-1, -1, hidden.shape[-1])
    before = hidden.gather(1, before).flatten(0, 1)
    head, form, chance = Head(model, before), logit_form(model.config), chances.flatten()
    drawn = torch.empty_like(chance, dtype=ids.dtype)
    for part in parts_of(before, head.size):
        probable = formed(head.logits(before[part]), form).softmax(dim=-1, dtype=torch.float32)
        upto = probable.cumsum(dim=-1)
        point = chance[part, None] * upto[:, -1:]
        found = torch.searchsorted(upto, point, right=True)[:, 0]
        # Where the product rounds up to the sum, nothing lies above it.
        drawn[part] = torch.where(found < head.size, found, probable.argmax(dim=-1))
    return ids.scatter(1, places, drawn.view_as(places))
