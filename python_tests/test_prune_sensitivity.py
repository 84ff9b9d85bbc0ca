# SPDX-License-Identifier: Apache-2.0
"""Weights of tokens with gradients far above the rest."""

from __future__ import annotations

import pytest
import torch

from spense_kernels.prune.sensitivity import CLIP, _kept_share


def weights() -> torch.Tensor:
    """[7, 37] over eight decades; some zero, one sequence entirely."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(7, 37, generator=generator).mul(3).exp()
    found[torch.rand(7, 37, generator=generator) < 0.4] = 0
    found[2] = 0
    return found


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8])
def test_weights_stop_at_clip_times_the_median_of_their_batch(batch):
    weight = weights()
    kept = weight * _kept_share(weight, batch)
    for part, found in zip(weight.split(batch), kept.split(batch), strict=True):
        if part.any():
            part = part.clamp_max(CLIP * part[part > 0].median())
        torch.testing.assert_close(found, part)
    assert bool((kept < weight).any())


@pytest.mark.gpu
def test_the_host_waits_for_no_median():
    weight = weights().cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = _kept_share(weight, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), _kept_share(weights(), 2))
