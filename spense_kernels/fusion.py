# SPDX-License-Identifier: Apache-2.0
"""Projections that read one input (q, k, v; gate, up) as one GEMM, without touching the model.

The projections stay where they are as thin parts; their rows stand below each other in one packed
weight beside them. The first part that sees an input quantises it once and computes all rows, the
others take theirs from that result. A part recognises the input by identity, so parts that are in
fact called with different inputs still compute the right thing, only slower.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spense_kernels.errors import SpenseError
from spense_kernels.format import HybridWeight, Split
from spense_kernels.linear import PackedLinear, QuantizedRows, SpenseLinear

# Names of sibling modules that are called with the same input, in the order of their rows.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class FusedProjections(PackedLinear):
    """The stacked weight of several projections; its parts store it, so its state dict is empty.

    Attributes:
        splits: Split of each part.
        ranges: (first, last) row of each part; every part starts at a whole tile of 128 rows.
    """

    def __init__(self, weights: Sequence[HybridWeight], device=None):
        stacked = HybridWeight.stack(weights)
        split = stacked.split
        super().__init__(split.k, split.n, stacked.bias is not None, device)
        self._set_weight(stacked, self.w_packed.device)
        self.splits = [weight.split for weight in weights]
        self.ranges = Split.stack_rows(self.splits)
        # (input, all rows of its output, ranges that have not been taken), or None.
        self._pending: tuple[Tensor, Tensor, tuple[tuple[int, int], ...]] | None = None

    def part(self, x: Tensor | QuantizedRows, rows: tuple[int, int]) -> Tensor:
        """One of `ranges` of the output for x; a view when the parts are called in turn."""
        # A result is kept with quantised rows, which no one changes and which do not live long; in
        # compiled code that leaves nothing to write back after every call.
        y = self._kept_with(x) if isinstance(x, QuantizedRows) else self._kept(x, rows)
        return y[..., rows[0] : rows[1]]

    def _kept_with(self, x: QuantizedRows) -> Tensor:
        for group, y in x.outputs:
            if group is self:
                return y
        y = self(x)
        x.outputs.append((self, y))
        return y

    def _kept(self, x: Tensor, rows: tuple[int, int]) -> Tensor:
        pending = self._pending
        if pending is not None and pending[0] is x and rows in pending[2]:
            y, waiting = pending[1], pending[2]
        else:
            y, waiting = self(x), tuple(self.ranges)
        waiting = tuple(other for other in waiting if other != rows)
        self._pending = (x, y, waiting) if waiting else None
        return y

    def part_weight(self, index: int) -> HybridWeight:
        """The weight of one part in the checkpoint form, as it was before it was stacked."""
        return self.hybrid_weight().unstack([split.n for split in self.splits])[index]

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_pending": None}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *args):
        pass


class FusedPart(SpenseLinear):
    """Stands where a projection stood; computes, saves and tells what that projection did."""

    def __init__(self, group: FusedProjections, index: int):
        nn.Module.__init__(self)
        self.split = group.splits[index]
        self.in_features, self.out_features = self.split.k, self.split.n
        self.has_bias = group.has_bias
        self._index = index
        self._rows = group.ranges[index]
        # Not a submodule: the group is one of the parent, all of its parts refer to it.
        self.__dict__["_group"] = group

    @property
    def w_scale(self) -> Tensor:
        first, last = self._rows
        return self._group.w_scale[first:last]

    @property
    def bias(self) -> Tensor | None:
        first, last = self._rows
        return None if self._group.bias is None else self._group.bias[first:last]

    @property
    def gather(self) -> Tensor | None:
        return self._group.gather

    @property
    def k_gather(self) -> Tensor:
        return self._group.k_gather

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """[..., in_features] -> [..., out_features], a view of the output of all parts."""
        return self._group.part(x, self._rows)

    def hybrid_weight(self) -> HybridWeight:
        return self._group.part_weight(self._index)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, fused"

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        error_msgs.append(f"{prefix[:-1]}: is fused; call unfuse_projections(model) before loading")


def fuse_projections(
    model: nn.Module, groups: Sequence[Sequence[str]] = PROJECTIONS
) -> list[tuple[str, ...]]:
    """Makes one GEMM of sibling SpenseLinear layers that read the same input, in place.

    Siblings are fused when they share k_perm, device and having a bias, as the pruner leaves them;
    others, and layers with hooks, stay as they are. Outputs agree bit for bit with those of the
    single layers wherever the kernel sums one row tile in a fixed order, as those for the CPU do.
    A part whose rows are no multiple of 128 is padded to whole tiles, unless it is the last.

    Args:
        model: any module; state dict, saving and `unfuse_projections` see the layers as before.
        groups: names of siblings in one parent, in the order of their rows.

    Returns the full names of what was fused, a tuple for each GEMM.
    """
    done = []
    for prefix, parent in list(model.named_modules()):
        for names in groups:
            for chosen in _alike(parent, names):
                weights = [getattr(parent, name).hybrid_weight() for name in chosen]
                group = FusedProjections(weights, getattr(parent, chosen[0]).w_packed.device)
                parent.add_module("_".join(("fused", *chosen)), group.train(parent.training))
                for index, name in enumerate(chosen):
                    setattr(parent, name, FusedPart(group, index).train(parent.training))
                done.append(tuple(f"{prefix}.{name}" if prefix else name for name in chosen))
    return done


def unfuse_projections(model: nn.Module) -> None:
    """Turns every fused part back into a SpenseLinear of its own, in place."""
    for parent in list(model.modules()):
        groups = {n: m for n, m in parent.named_children() if isinstance(m, FusedProjections)}
        for key, group in groups.items():
            weights = group.hybrid_weight().unstack([split.n for split in group.splits])
            parts = {
                n: m for n, m in parent.named_children() if getattr(m, "_group", None) is group
            }
            if len(parts) != len(weights):
                raise SpenseError(f"unfuse_projections: {key}: expected {len(weights)} parts")
            delattr(parent, key)
            for name, part in parts.items():
                layer = SpenseLinear.from_hybrid(weights[part._index], group.w_packed.device)
                setattr(parent, name, layer.train(part.training))


def _alike(parent: nn.Module, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The names whose layers can be one GEMM, in tuples of two or more."""
    found: list[list[str]] = []
    for name in names:
        layer = parent._modules.get(name)
        if type(layer) is not SpenseLinear or layer.split is None or hooked(layer):
            continue
        for others in found:
            if _same_input(getattr(parent, others[0]), layer):
                others.append(name)
                break
        else:
            found.append([name])
    return [tuple(names) for names in found if len(names) > 1]


def _same_input(a: SpenseLinear, b: SpenseLinear) -> bool:
    return (
        a.w_packed.device == b.w_packed.device
        and a.has_bias == b.has_bias
        and a.split.k_perm.shape == b.split.k_perm.shape
        and bool((a.split.k_perm == b.split.k_perm).all())
    )


def hooked(layer: nn.Module) -> bool:
    """Whether something hangs on this very module that would be lost with it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "_hf_hook" in vars(layer))
