# SPDX-License-Identifier: Apache-2.0
"""Distance between two models' predictions, a few positions at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spense_kernels.evaluate import logit_form
from spense_kernels.finetune.fuse import Fused

CPU_BYTES, CUDA_BYTES = 64 << 20, 1 << 30  # float32 logits of one model held at a time
# Rows of logits start on whole cache lines: matrix products with odd strides are many times slower.
_ALIGN = 64


def distillation_loss(
    student: nn.Module, teacher: nn.Module, hidden: Tensor, target: Tensor, compiled: bool = False
) -> Tensor:
    """Mean KL(teacher || student) over positions, in nats, float32.

    Args:
        hidden, target: [T, D] last hidden states of student and teacher.
        compiled: on CUDA, let torch.compile fuse what lies between the matrix products.

    Over the whole vocabulary. The gradient for `hidden` is worked out on the way forward, so
    logits of all positions never exist at once; there is none for `target` and the heads.
    """
    return _Distillation.apply(hidden, target, student, teacher, compiled)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, target, student, teacher, compiled):
        grad = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        distance = _kl_rows if compiled else _kl_rows.function
        forms = logit_form(student.config), logit_form(teacher.config)
        for part in _parts(hidden, student.get_output_embeddings().weight.shape[0]):
            given = _Head(student, hidden[part])
            wanted = _Head(teacher, target[part])
            total += distance(given.logits, wanted.logits, *forms).sum()
            grad[part] = given.backward(given.logits)
        ctx.save_for_backward(grad)
        ctx.count = hidden.shape[0]
        return total / hidden.shape[0]

    @staticmethod
    def backward(ctx, outer):
        (grad,) = ctx.saved_tensors
        return grad * (outer / ctx.count).to(grad.dtype), None, None, None, None


def _parts(hidden: Tensor, vocabulary: int) -> list[slice]:
    """Equal slices of the positions where they divide: each other length is compiled anew."""
    count = hidden.shape[0]
    limit = max(1, (CUDA_BYTES if hidden.is_cuda else CPU_BYTES) // (4 * vocabulary))
    least = -(-count // limit)
    number = next((n for n in range(least, 2 * least) if count % n == 0), least)
    rows = -(-count // number)
    return [slice(start, start + rows) for start in range(0, count, rows)]


class _Head:
    """Output of a model's head, neither scaled nor capped, and the way back to its input.

    Attributes:
        logits: [R, vocabulary] in the dtype of the head.
    """

    def __init__(self, model: nn.Module, hidden: Tensor):
        head = model.get_output_embeddings()
        # Of a plain head the product is written here, with aligned rows; others know their own way.
        self.weight = None
        if type(head) is nn.Linear and head.bias is None and head.weight.dtype == hidden.dtype:
            self.weight = head.weight.detach()
            size = self.weight.shape[0]
            rows = hidden.new_empty(hidden.shape[0], -(-size // _ALIGN) * _ALIGN)
            self.logits = torch.mm(hidden.detach(), self.weight.T, out=rows[:, :size])
            return
        with torch.enable_grad():
            self.leaf = hidden.detach().requires_grad_()
            self.output = head(self.leaf)
        self.logits = self.output.detach().clone()

    def backward(self, grad: Tensor) -> Tensor:
        """Gradient of the head's input [R, D] from that of its output."""
        if self.weight is not None:
            return grad @ self.weight
        return torch.autograd.grad(self.output, self.leaf, grad)[0]


@Fused
def _kl_rows(given: Tensor, wanted: Tensor, given_form, wanted_form) -> Tensor:
    """KL of each row, float32 [R]; `given` becomes the gradient of their sum for `given`.

    Args:
        given, wanted: [R, V] outputs of the heads of student and teacher.
        given_form, wanted_form: (scale, cap) of the logits, see logit_form.
    """
    capped = _formed(given, given_form)
    log_q = capped.log_softmax(dim=-1, dtype=torch.float32)
    log_p = _formed(wanted, wanted_form).log_softmax(dim=-1, dtype=torch.float32)
    p = log_p.exp()
    distance = (p * (log_p - log_q)).sum(dim=-1)
    grad = log_q.exp() - p
    scale, cap = given_form
    if cap is not None:
        grad = grad * (1.0 - (capped / cap).square())
    given.copy_(grad * scale if scale != 1.0 else grad)
    return distance


def _formed(logits: Tensor, form) -> Tensor:
    scale, cap = form
    if scale != 1.0:
        logits = logits.float() * scale
    return logits if cap is None else torch.tanh(logits.float() / cap) * cap
