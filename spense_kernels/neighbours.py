# SPDX-License-Identifier: Apache-2.0
"""Norms and activations of transformers' decoder layers that quantise what they compute.

A layer keeps its modules, names and weights; its forward pass calls `rms_norm_quantize`,
`add_rms_norm_quantize` and `silu_mul_quantize` or `gelu_mul_quantize` where it would compute a norm
or an activation, round it, and have `quantize_fp8` read it again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spense_kernels import ops
from spense_kernels.fusion import fuse_projections, hooked, unfuse_projections
from spense_kernels.linear import QuantizedRows, SpenseLinear, quantized, rows_of


class NormKind(NamedTuple):
    """How an RMSNorm class names its eps, and whether its weight counts from 1."""

    eps: str
    unit_offset: bool


_LLAMA, _GEMMA = NormKind("variance_epsilon", False), NormKind("eps", True)
NORMS = {
    "LlamaRMSNorm": _LLAMA,
    "MistralRMSNorm": _LLAMA,
    "Qwen2RMSNorm": _LLAMA,
    "Qwen3RMSNorm": _LLAMA,
    "SeedOssRMSNorm": _LLAMA,
    "Gemma3RMSNorm": _GEMMA,
}
# Layers whose attention uses its input in q_proj, k_proj and v_proj only, by what they do:
# x + attention(norm(x)), then x + mlp(norm(x)).
PRE_NORM = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "SeedOssDecoderLayer",
)
# The same with another norm behind attention and behind the mlp.
SANDWICH_NORM = ("Gemma3DecoderLayer",)
# down_proj(act_fn(gate_proj(x)) * up_proj(x))
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SeedOssMLP", "Gemma3MLP")


def fuse(model: nn.Module) -> nn.Module:
    """`fuse_projections` and `fuse_neighbours`: what models get on CUDA."""
    fuse_projections(model)
    fuse_neighbours(model)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse`."""
    unfuse_neighbours(model)
    unfuse_projections(model)
    return model


def fuse_neighbours(model: nn.Module) -> list[str]:
    """Lets norms and gated activations quantise what they compute, in place.

    Changes layers of Llama, Mistral, Qwen2, Qwen3, Seed-OSS and Gemma 3 whose projections are
    SpenseLinear of one k_perm each (q, k, v; gate, up); others, and modules with hooks, stay.
    Results differ from those before by the roundings to the model's dtype that no longer happen
    (`ops.rms_norm_quantize` states them). `unfuse_neighbours` undoes it; saving does not notice.

    Returns the names of the modules that were changed.
    """
    done = []
    for name, module in list(model.named_modules()):
        fused = _fused_class(module)
        if fused is not None:
            module.__class__ = _class_of(type(module), *fused)
            done.append(name)
    return done


def unfuse_neighbours(model: nn.Module) -> None:
    """Gives every module that `fuse_neighbours` changed its own forward pass back."""
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = module.unfused


@cache
def _class_of(base: type, fused: type, op: Callable | None) -> type:
    """The class of all modules that are changed alike."""
    own = {} if op is None else {"multiply_and_quantize": staticmethod(op)}
    return type(f"Fused{base.__name__}", (fused, base), {"unfused": base, **own})


class _Fused:
    """Mixed into the class of a module; `unfused` is the class it had.

    What `forward` depends on is found once, in `fuse_neighbours`: whatever it looked up in a module
    would be looked up by torch.compile's guards as well, before every call.
    """

    unfused: type[nn.Module]
    norms: tuple[str, ...] = ()  # children whose work `forward` does, and what they have to be
    kind: NormKind | None = None


class _PreNormLayer(_Fused):
    norms, kind = ("input_layernorm", "post_attention_layernorm"), _LLAMA

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        x = norm(self.input_layernorm, _LLAMA, hidden_states, self.self_attn.q_proj)
        x, _ = self.self_attn(hidden_states=x, **kwargs)
        into = self.mlp.gate_proj
        x, total = add_norm(self.post_attention_layernorm, _LLAMA, x, hidden_states, into)
        return total + self.mlp(x)


class _SandwichNormLayer(_Fused):
    norms, kind = ("input_layernorm", "pre_feedforward_layernorm"), _GEMMA

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        x = norm(self.input_layernorm, _GEMMA, hidden_states, self.self_attn.q_proj)
        x, _ = self.self_attn(hidden_states=x, **kwargs)
        x = self.post_attention_layernorm(x)
        into = self.mlp.gate_proj
        x, total = add_norm(self.pre_feedforward_layernorm, _GEMMA, x, hidden_states, into)
        return total + self.post_feedforward_layernorm(self.mlp(x))


class _GatedMlp(_Fused):
    multiply_and_quantize: Callable  # one of the ops below

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        rows = [t.reshape(-1, t.shape[-1]) for t in (gate, up)]
        x8, scale = self.multiply_and_quantize(*rows, self.down_proj.gather)
        return self.down_proj(QuantizedRows(x8, scale, tuple(gate.shape), gate.dtype, []))


def norm(layer: nn.Module, kind: NormKind, x: Tensor, into: SpenseLinear) -> QuantizedRows:
    """What the RMSNorm `layer` of that kind makes of x, quantised for `into`."""
    if hooked(layer):  # since the model was fused; offloading brings the weight by a hook
        return quantized(layer(x), into.gather)
    x8, scale = ops.rms_norm_quantize(
        rows_of(x),
        layer.weight,
        into.gather,
        eps=getattr(layer, kind.eps),
        unit_offset=kind.unit_offset,
    )
    return QuantizedRows(x8, scale, tuple(x.shape), x.dtype, [])


def add_norm(
    layer: nn.Module, kind: NormKind, x: Tensor, residual: Tensor, into: SpenseLinear
) -> tuple[QuantizedRows, Tensor]:
    """The same of x + residual, and that sum."""
    if hooked(layer):
        total = residual + x
        return quantized(layer(total), into.gather), total
    x8, scale, total = ops.add_rms_norm_quantize(
        rows_of(x),
        rows_of(residual),
        layer.weight,
        into.gather,
        eps=getattr(layer, kind.eps),
        unit_offset=kind.unit_offset,
    )
    return QuantizedRows(x8, scale, tuple(x.shape), x.dtype, []), total.view(x.shape)


def _gelu_tanh(gate: Tensor, up: Tensor, gather: Tensor | None) -> tuple[Tensor, Tensor]:
    return ops.gelu_mul_quantize(gate, up, gather, approximate="tanh")


# (activation, op)
_ACTIVATIONS: tuple[tuple[Callable[[Tensor], Tensor], Callable], ...] = (
    (F.silu, ops.silu_mul_quantize),
    (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh),
    (F.gelu, ops.gelu_mul_quantize),
)


def _gated_op(function: nn.Module) -> Callable | None:
    """The op for the activation that this module computes, which its values tell."""
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, device="cpu")
    try:
        y = function(x)
    except (RuntimeError, TypeError):
        return None
    for known, op in _ACTIVATIONS:
        if torch.allclose(y, known(x), rtol=0, atol=1e-9):
            return op
    return None


def _fused_class(module: nn.Module) -> tuple[type, Callable | None] | None:
    """The mixin for this module and the op that it needs, or None where it has to stay as it is."""
    name = type(module).__name__
    if hooked(module):
        return None
    if name in GATED_MLPS:
        op = _gated_op(module.act_fn)
        if op is None or not _spense(module, "down_proj"):
            return None
        return _GatedMlp, op
    if name in PRE_NORM:
        fused = _PreNormLayer
    elif name in SANDWICH_NORM:
        fused = _SandwichNormLayer
    else:
        return None
    norms = [getattr(module, norm_name) for norm_name in fused.norms]
    if any(NORMS.get(type(part).__name__) != fused.kind or hooked(part) for part in norms):
        return None
    attention, mlp = module.self_attn, module.mlp
    if type(mlp).__name__ not in GATED_MLPS or hooked(attention) or hooked(mlp):
        return None
    same = _spense(attention, "q_proj", "k_proj", "v_proj") and _spense(mlp, "gate_proj", "up_proj")
    return (fused, None) if same else None


def _spense(parent: nn.Module, *names: str) -> bool:
    """Whether these children are SpenseLinear layers that take x in one and the same order."""
    layers = [getattr(parent, name) for name in names]
    if not all(isinstance(layer, SpenseLinear) and not hooked(layer) for layer in layers):
        return False
    if any(layer.split is None for layer in layers):
        return False
    first = layers[0].k_gather
    return all(
        layer.k_gather is first
        or (layer.k_gather.device == first.device and torch.equal(layer.k_gather, first))
        for layer in layers[1:]
    )
