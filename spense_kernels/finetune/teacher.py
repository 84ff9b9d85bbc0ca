# SPDX-License-Identifier: Apache-2.0
"""What the dense model says about the windows, worked out once for each where that fits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CPU_BYTES, CUDA_SHARE = 4 << 30, 1 / 8  # memory for states that are kept; share of the device's
_CUDA_GROUP = 64  # windows at once


def last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """[B, L, D] last hidden states, what the head takes."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def without_waiting(rows: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; the host does not wait for what the device has to do."""
    if device.type == "cuda":
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)


class TeacherStates:
    """Last hidden states of the teacher for numbered windows.

    Windows go through the model in the same groups whatever is asked for and when, so a run that
    was stopped and goes on sees the same bits.

    Attributes:
        kept: whether states are kept: they fit, and windows come more than once.
    """

    def __init__(self, teacher: nn.Module, windows: Tensor, device: torch.device, again: bool):
        """again: whether windows will be asked for more than once."""
        self.teacher, self.windows, self.device = teacher, windows, device
        weight = teacher.get_output_embeddings().weight
        size = windows.numel() * weight.shape[1] * weight.element_size()
        if device.type == "cuda":
            limit = CUDA_SHARE * torch.cuda.get_device_properties(device).total_memory
        else:
            limit = CPU_BYTES
        self.kept = again and size <= limit
        self._group = _CUDA_GROUP if device.type == "cuda" else 1
        self._states: Tensor | None = None
        self._known = torch.zeros(windows.shape[0], dtype=torch.bool)

    @torch.no_grad()
    def of(self, rows: Tensor) -> Tensor:
        """[len(rows), L, D] on the device, for int64 rows on the CPU; only where `kept`."""
        for start in sorted({row // self._group * self._group for row in rows.tolist()}):
            if bool(self._known[start]):
                continue
            # The last group begins earlier than it must: every other size would compile anew.
            count = self.windows.shape[0]
            begin = max(0, min(start, count - self._group))
            found = last_hidden(
                self.teacher, self.windows[begin : begin + self._group].to(self.device)
            )
            if self._states is None:
                shape = (count, *found.shape[1:])
                self._states = torch.empty(shape, dtype=found.dtype, device=self.device)
            self._states[start : start + self._group] = found[start - begin :]
            self._known[start] = True
        return self._states[without_waiting(rows, self.device)]

    def fill(self) -> None:
        """All windows, at once."""
        self.of(torch.arange(self.windows.shape[0]))
