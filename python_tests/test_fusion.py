# SPDX-License-Identifier: Apache-2.0
"""Fused projections: the same bits from fewer GEMMs, and nothing else changes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spense_kernels import (
    SpenseLinear,
    fuse_projections,
    unfuse_neighbours,
    unfuse_projections,
)
from spense_kernels.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from spense_kernels.errors import FormatError
from spense_kernels.format import HybridWeight, Split
from spense_kernels.fusion import FusedPart, FusedProjections
from spense_kernels.prune import prune_magnitude
from spense_kernels.testing.generators import random_weight
from spense_kernels.testing.models import TINY, tiny_model
from spense_kernels.testing.numeric import assert_bitwise

TOKENS = torch.arange(18).reshape(2, 9) * 5 % 120


def pruned(architecture: str = "LlamaForCausalLM") -> nn.Module:
    model = tiny_model(architecture)
    prune_magnitude(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


class OpCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[str(op)] += 1
        return op(*args, **(kwargs or {}))


def siblings(rows, k=96, widths=None, k_shards=1, bias=True) -> nn.Module:
    """A module with children a, b, c of these rows that share one k_perm."""
    parent = nn.Module()
    perm = torch.stack([torch.randperm(k // k_shards) for _ in range(k_shards)])
    for i, (name, n) in enumerate(zip("abc", rows, strict=False)):
        tiles = -(-n // 128)
        width = torch.full((tiles,), (widths or [32] * 3)[i])
        split = Split(n, k, perm, width)
        weight = random_weight(split, seed=i, bias=bias)
        parent.add_module(name, SpenseLinear.from_hybrid(weight))
    return parent


@pytest.mark.parametrize("architecture", TINY)
def test_models_compute_the_same_bits_with_four_gemms_a_layer(architecture):
    model = pruned(architecture)
    expected = logits(model)
    with OpCalls() as before:
        logits(model)
    fused = copy.deepcopy(model)
    done = fuse_projections(fused)
    assert [len(names) for names in done] == [3, 2, 3, 2]
    with OpCalls() as after:
        assert_bitwise(logits(fused), expected)
    for op in ("spense.hybrid_gemm.default", "spense.quantize_fp8.default"):
        assert (before.counts[op], after.counts[op]) == (14, 8)
    assert fuse_projections(fused) == []  # again is harmless
    state = fused.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_bitwise(state[name], tensor)
    unfuse_projections(fused)
    assert not any(isinstance(m, (FusedPart, FusedProjections)) for m in fused.modules())
    assert_bitwise(logits(fused), expected)


@pytest.mark.parametrize("rows", [(128, 256, 128), (200, 56, 300), (1, 129)], ids=str)
@pytest.mark.parametrize("k_shards", [1, 2])
def test_ragged_rows_and_widths(rows, k_shards):
    """Widths that differ between the parts keep the bits with one K shard, where they do not
    change the order of x; with more shards the widths are alike here for that reason."""
    parent = siblings(rows, k_shards=k_shards, widths=[0, 16, 96] if k_shards == 1 else None)
    fused = copy.deepcopy(parent)
    names = tuple("abc"[: len(rows)])
    assert fuse_projections(fused, [names]) == [names]
    x = torch.randn(2, 3, 96, dtype=torch.bfloat16)
    for name in names:
        layer, part = parent.get_submodule(name), fused.get_submodule(name)
        assert_bitwise(part(x).contiguous(), layer(x))
        assert part.hybrid_weight().equal(layer.hybrid_weight())
        assert_bitwise(part.bias, layer.bias)
        assert_bitwise(part.w_scale, layer.w_scale)


def test_unstack_undoes_stack():
    parent = siblings((200, 56, 300), k=128, k_shards=2, bias=False)
    weights = [layer.hybrid_weight() for layer in parent.children()]
    stacked = HybridWeight.stack(weights)
    parts = stacked.unstack([200, 56, 300])
    assert all(part.equal(weight) for part, weight in zip(parts, weights, strict=True))
    with pytest.raises(FormatError, match="must fill 6 tiles"):
        stacked.unstack([200, 56])


def test_parts_may_be_called_in_any_way():
    """Another input, another order, one part only, twice: never a value of another input."""
    parent = siblings((64, 64, 64))
    fused = copy.deepcopy(parent)
    fuse_projections(fused, ["abc"])
    inputs = [torch.randn(2, 96, dtype=torch.bfloat16) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        name = "abc"[int(torch.randint(3, (), generator=generator))]
        x = inputs[int(torch.randint(3, (), generator=generator))]
        got = fused.get_submodule(name)(x)
        assert_bitwise(got.contiguous(), parent.get_submodule(name)(x))
    # A buffer that is written again between two calls of one part.
    x = inputs[0].clone()
    fused.a(x)
    x.copy_(inputs[1])
    assert_bitwise(fused.a(x).contiguous(), parent.a(inputs[1]))


def test_nothing_is_kept_after_the_last_part():
    fused = siblings((64, 64))
    fuse_projections(fused, ["ab"])
    x = torch.randn(2, 96, dtype=torch.bfloat16)
    fused.a(x)
    assert fused.fused_a_b._pending is not None
    fused.b(x)
    assert fused.fused_a_b._pending is None


def test_what_does_not_fit_stays_single():
    other_order = siblings((64, 64))
    other_order.b = siblings((64, 64)).b
    assert fuse_projections(other_order, ["ab"]) == []
    one_bias = siblings((64, 64))
    one_bias.b = SpenseLinear.from_hybrid(
        HybridWeight.from_dense(
            one_bias.b.hybrid_weight().to_dense(), one_bias.b.w_scale, one_bias.b.split
        )
    )
    assert fuse_projections(one_bias, ["ab"]) == []
    hooked = siblings((64, 64, 64))
    hooked.b.register_forward_hook(lambda *args: None)
    assert fuse_projections(hooked, ["abc"]) == [("a", "c")]
    assert fuse_projections(nn.ModuleDict({"q_proj": nn.Linear(2, 2)})) == []


def test_fused_models_are_saved_and_loaded_as_if_they_were_not(tmp_path):
    model = pruned()
    save_checkpoint(model, tmp_path / "a", provenance={"seed": 1})
    fuse_projections(model)
    save_checkpoint(model, tmp_path / "b", provenance={"seed": 1})
    assert (tmp_path / "a/SHA256SUMS").read_text() == (tmp_path / "b/SHA256SUMS").read_text()
    assert verify_checkpoint(tmp_path / "b").ok
    plain, fused = load_checkpoint(tmp_path / "b"), load_checkpoint(tmp_path / "b", fuse=True)
    assert [isinstance(m.model.layers[0].mlp.up_proj, FusedPart) for m in (plain, fused)] == [
        False,
        True,
    ]
    unfuse_neighbours(fused)  # which change last bits
    assert_bitwise(logits(fused), logits(plain))
    with pytest.raises(RuntimeError, match="call unfuse_projections"):
        fused.load_state_dict(plain.state_dict())


def test_fused_models_compile_in_one_graph():
    parent = siblings((64, 200))
    fused = copy.deepcopy(parent)
    fuse_projections(fused, ["ab"])

    def forward(x):
        return torch.cat((fused.a(x), fused.b(x)), dim=-1)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):
        x = torch.randn(tokens, 96, dtype=torch.bfloat16)
        assert_bitwise(compiled(x), torch.cat((parent.a(x), parent.b(x)), dim=-1))


@pytest.mark.gpu
def test_fused_by_default_on_a_gpu(tmp_path):
    save_checkpoint(pruned(), tmp_path / "m")
    model = load_checkpoint(tmp_path / "m", device="cuda")
    part = model.model.layers[0].mlp.up_proj
    assert isinstance(part, FusedPart)
    single = load_checkpoint(tmp_path / "m", device="cuda", fuse=False)
    assert part.hybrid_weight().equal(single.model.layers[0].mlp.up_proj.hybrid_weight())
    x = torch.randn(3, 64, dtype=torch.bfloat16, device="cuda")
    for name in ("gate_proj", "up_proj"):
        got = getattr(model.model.layers[0].mlp, name)(x)
        assert_bitwise(got.contiguous(), getattr(single.model.layers[0].mlp, name)(x))
