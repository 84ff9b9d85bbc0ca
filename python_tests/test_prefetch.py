# SPDX-License-Identifier: Apache-2.0
"""Hints of the next weight: in the order of execution, and without a trace anywhere else."""

from __future__ import annotations

import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spense_kernels import SpenseLinear, link_prefetch, neighbours, unlink_prefetch
from spense_kernels.linear import PackedLinear, next_weight
from spense_kernels.prune import prune_magnitude
from spense_kernels.testing.models import TINY, tiny_model
from spense_kernels.testing.numeric import assert_bitwise

TOKENS = torch.arange(18).reshape(2, 9) * 5 % 120


def pruned(architecture: str = "LlamaForCausalLM") -> nn.Module:
    model = tiny_model(architecture, torch.bfloat16)
    prune_magnitude(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


class Gemms(TorchDispatchMode):
    """Own and hinted weight of every hybrid_gemm, by address."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, int | None, int]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.spense.hybrid_gemm.default:
            following = args[6] if len(args) > 6 else None
            address = None if following is None else following.data_ptr()
            self.seen.append((args[1].data_ptr(), address, kwargs.get("next_k", 0)))
        return op(*args, **kwargs)


def gemms(model: nn.Module) -> list[tuple[int, int | None, int]]:
    with Gemms() as calls:
        logits(model)
    return calls.seen


def links(model: nn.Module) -> int:
    return sum(isinstance(m, PackedLinear) and m.following is not None for m in model.modules())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("architecture", TINY)
def test_the_hint_is_the_next_weight_that_is_used(architecture, fused):
    model = pruned(architecture)
    neighbours.fuse(model) if fused else link_prefetch(model)
    seen = gemms(model)
    columns = {
        m.w_packed.data_ptr(): m.in_features
        for m in model.modules()
        if isinstance(m, PackedLinear) and "w_packed" in m._buffers
    }
    assert len(seen) == len(model.model.layers) * (4 if fused else 7)
    for (_, hinted, k), (own, _, _) in pairwise(seen):
        assert hinted == own
        assert k == columns[own]
    assert seen[-1][1:] == (None, 0)


def test_results_and_state_dict_do_not_depend_on_it():
    model = pruned()
    expected, names = logits(model), list(model.state_dict())
    modules = dict(model.named_modules())
    count = link_prefetch(model)
    assert links(model) == count == 7 * len(model.model.layers) - 1
    assert_bitwise(logits(model), expected)
    assert list(model.state_dict()) == names
    assert dict(model.named_modules()) == modules
    model.load_state_dict(model.state_dict())
    assert_bitwise(logits(model), expected)
    assert unlink_prefetch(model) == count
    assert links(model) == 0


def test_fusing_and_unfusing_leave_no_link_to_what_is_gone():
    model = pruned()
    link_prefetch(model)
    neighbours.fuse(model)
    there = [m for m in model.modules() if isinstance(m, PackedLinear)]
    linked = {id(m.following) for m in there if m.following}
    assert len(linked) == 4 * len(model.model.layers) - 1
    assert linked <= {id(m._buffers) for m in there}
    neighbours.unfuse(model)
    assert links(model) == 0


@pytest.mark.parametrize("fused", [False, True])
def test_copies_and_pickles_come_without(fused):
    model = pruned()
    neighbours.fuse(model) if fused else link_prefetch(model)
    expected = logits(model)
    single = copy.deepcopy(model.model.layers[0].self_attn.o_proj)
    assert isinstance(single, SpenseLinear)
    assert single.following is None
    other = copy.deepcopy(model)
    assert links(other) == 0
    assert_bitwise(logits(other), expected)
    file = io.BytesIO()
    torch.save(model.model.layers[0].self_attn.o_proj, file)
    assert file.tell() < 2 * single.w_packed.nbytes + 100_000
    file.seek(0)
    assert torch.load(file, weights_only=False).following is None
    assert links(model) > 0, "the original keeps its own"


def test_moved_weights_are_followed_and_other_devices_are_not():
    linear = nn.Linear(64, 32)
    pair = nn.Sequential(SpenseLinear.from_dense(linear), SpenseLinear.from_dense(linear))
    link_prefetch(pair)
    pair[1].w_packed = pair[1].w_packed.clone()
    device = pair[0].w_packed.device
    assert next_weight(pair[0].following, device)["next_w_packed"] is pair[1].w_packed
    pair[1].to("meta")
    assert next_weight(pair[0].following, device) == {}


def test_linked_models_compile_in_one_graph():
    model = pruned()
    neighbours.fuse(model)
    expected = logits(model)
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_bitwise(model.lm_head(compiled(TOKENS).last_hidden_state), expected)


def test_deep_linked_models_compile():
    # Dynamo names what it reads by the way to it; its recursion ended where links led from layer
    # to layer (Qwen3-32B has 256 of them).
    layer = SpenseLinear.from_dense(nn.Linear(32, 32))
    deep = nn.Sequential(*(copy.deepcopy(layer) for _ in range(200)))
    assert link_prefetch(deep) == 199
    x = torch.ones(1, 32)
    compiled = torch.compile(deep, fullgraph=True, backend="eager")
    assert_bitwise(compiled(x), deep(x))
