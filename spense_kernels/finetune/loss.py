# SPDX-License-Identifier: Apache-2.0
"""Distance between two models' predictions, a few positions at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spense_kernels.evaluate import logit_form
from spense_kernels.finetune.fuse import Fused

CPU_BYTES, CUDA_BYTES = 64 << 20, 1 << 30  # float32 logits of one model held at a time
# Matrix products with an odd size are several times slower; the head gets rows of zeros up to this.
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
        distance = _kl_rows if compiled else _kl_rows.function
        forms = logit_form(student.config), logit_form(teacher.config)
        given, wanted = _Head(student, hidden), _Head(teacher, target)
        grad = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        parts = _parts(hidden, given.size)
        room = hidden.new_zeros(parts[0].stop, given.aligned)
        for part in parts:
            logits = given.logits(hidden[part])
            rows = room[: logits.shape[0]]
            towards = wanted.logits(target[part])
            total += distance(logits, towards, rows[:, : given.size], *forms).sum()
            grad[part] = given.backward(rows)
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
    """A model's head without what scales and caps its output, and the way back to its input.

    Attributes:
        size, aligned: words of the vocabulary; columns of the gradients that `backward` takes.
    """

    def __init__(self, model: nn.Module, hidden: Tensor):
        self.head = model.get_output_embeddings()
        self.size = self.aligned = self.head.weight.shape[0]
        # Of a plain head the products are written here; others know their own way.
        head, self.weight = self.head, None
        if type(head) is nn.Linear and head.bias is None and head.weight.dtype == hidden.dtype:
            self.aligned = -(-self.size // _ALIGN) * _ALIGN
            self.weight = head.weight.detach()
            if self.aligned != self.size:
                # A copy of the head costs next to nothing against what odd sizes do to products.
                more = (0, 0, 0, self.aligned - self.size)
                self.weight = nn.functional.pad(self.weight, more)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, size] in the dtype of the head, for hidden [R, D]."""
        if self.weight is not None:
            return (hidden.detach() @ self.weight.T)[:, : self.size]
        with torch.enable_grad():
            self.leaf = hidden.detach().requires_grad_()
            self.output = self.head(self.leaf)
        return self.output.detach()

    def backward(self, grad: Tensor) -> Tensor:
        """[R, D] of the last `logits`, for grad [R, aligned] with zeros behind the vocabulary."""
        if self.weight is not None:
            return grad @ self.weight
        return torch.autograd.grad(self.output, self.leaf, grad)[0]


@Fused
def _kl_rows(given: Tensor, wanted: Tensor, grad: Tensor, given_form, wanted_form) -> Tensor:
    """KL of each row, float32 [R]; writes the gradient of their sum for `given` into `grad`.

    Args:
        given, wanted, grad: [R, V] outputs of the heads of student and teacher.
        given_form, wanted_form: (scale, cap) of the logits, see logit_form.
    """
    capped = _formed(given, given_form)
    log_q = capped.log_softmax(dim=-1, dtype=torch.float32)
    log_p = _formed(wanted, wanted_form).log_softmax(dim=-1, dtype=torch.float32)
    p = log_p.exp()
    distance = (p * (log_p - log_q)).sum(dim=-1)
    scale, cap = given_form
    found = log_q.exp() - p
    if cap is not None:
        found = found * (1.0 - (capped / cap).square())
    grad.copy_(found * scale if scale != 1.0 else found)
    return distance


def _formed(logits: Tensor, form) -> Tensor:
    scale, cap = form
    if scale != 1.0:
        logits = logits.float() * scale
    return logits if cap is None else torch.tanh(logits.float() / cap) * cap
