# SPDX-License-Identifier: Apache-2.0
"""Distance between two models' predictions, a few positions at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spense_kernels.evaluate import logits_of

CPU_BYTES, CUDA_BYTES = 64 << 20, 1 << 30  # float32 logits of one model held at a time


def distillation_loss(student: nn.Module, teacher: nn.Module, hidden: Tensor, target: Tensor):
    """Mean KL(teacher || student) over positions, in nats.

    Args:
        hidden, target: [T, D] last hidden states of student and teacher.

    The gradient is worked out on the way forward, so logits of all positions never exist at once.
    """
    return _Distillation.apply(hidden, target, student, teacher)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, target, student, teacher):
        vocabulary = student.get_output_embeddings().weight.shape[0]
        limit = CUDA_BYTES if hidden.is_cuda else CPU_BYTES
        rows = max(1, limit // (4 * vocabulary))
        total = torch.zeros((), device=hidden.device)
        grad = torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            with torch.no_grad():
                wanted = logits_of(teacher, target[part]).log_softmax(dim=-1)
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                given = logits_of(student, leaf).log_softmax(dim=-1)
                loss = nn.functional.kl_div(given, wanted, reduction="sum", log_target=True)
            (grad[part],) = torch.autograd.grad(loss, leaf)
            total += loss.detach()
        ctx.save_for_backward(grad)
        ctx.count = hidden.shape[0]
        return total / hidden.shape[0]

    @staticmethod
    def backward(ctx, outer):
        (grad,) = ctx.saved_tensors
        return grad * (outer / ctx.count).to(grad.dtype), None, None, None
