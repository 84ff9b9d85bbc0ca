# SPDX-License-Identifier: Apache-2.0
"""RMSNorms on torch's own kernel against the models' own."""

from __future__ import annotations

import pytest
import torch
from prune_models import make, tokens_for_calibration

from spense_kernels.neighbours import NORMS
from spense_kernels.prune.calibrate import LayerWalk
from spense_kernels.prune.norms import fast_norms, rms_norm


def norms_of(model) -> list[torch.nn.Module]:
    """With weights that are told apart."""
    found = [m for m in model.modules() if type(m).__name__ in NORMS]
    generator = torch.Generator().manual_seed(5)
    for norm in found:
        norm.weight.data = 0.5 * torch.randn(norm.weight.shape, generator=generator)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_the_same_up_to_rounding(family, dtype):
    """Outputs and gradients, with a row of zeros and one where eps matters."""
    norms = norms_of(make(family))
    assert norms
    for norm in norms:
        norm.to(dtype)
        generator = torch.Generator().manual_seed(1)
        x, by = torch.randn(2, 3, 7, norm.weight.shape[0], generator=generator)
        x[0, 0], x[1, 2] = 0.0, x[1, 2] * 1e-3
        found = []
        for function in (norm, lambda x, norm=norm: rms_norm(norm, x)):
            leaf = x.to(dtype).requires_grad_()
            y = function(leaf)
            assert y.dtype == dtype
            found.append((y.detach(), torch.autograd.grad((y.float() * by).sum(), leaf)[0]))
        (y, grad), (expected, expected_grad) = found
        near = 1e-5 if dtype == torch.float32 else 0.02
        for a, b in ((y, expected), (grad, expected_grad)):
            error, size = (a - b).float(), b.float()
            assert float(error.norm()) < near * float(size.norm())
            assert bool((error.abs() <= near * size.abs().amax(dim=-1, keepdim=True)).all())


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_walk_takes_them_on_cuda_and_puts_the_own_ones_back(family, monkeypatch):
    model = make(family)
    norms = norms_of(model)
    model, tokens = model.cuda(), tokens_for_calibration()
    walk = LayerWalk(model, tokens, "cuda")
    plain = walk.layers[0](walk.hidden[0], **walk._arguments[len(tokens)][0][1])
    with walk.on_device(0) as layer:
        assert all("forward" in vars(m) for m in layer.modules() if m in norms)
        with fast_norms(layer):  # once more: nothing is lost
            pass
        torch.testing.assert_close(walk.call(0, walk.hidden[0]), plain, rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(m) for m in norms)
