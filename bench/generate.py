# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of plain transformers `generate`: static cache, compiled, as its users run it.

    python bench/generate.py --model qwen3-32b --batch 1 16 --out bench/results/generate.json

Compiling all layers takes minutes on one core, for every kind and batch; `--layers` and
`--stop-after` bound it. The file is written after every point.

The model is transformers' own class with random weights. "spense" has SpenseLinear layers, fused as
loading onto CUDA fuses them; "dense" has FP8 layers that quantise x a row at a time and call
torch._scaled_mm, compiled with the rest of the model (what torchao's dynamic FP8 comes down to).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from decoding.models import MODELS, ModelShape
from gemm.machine import add_commit, machine
from gemm.operands import random_fp8, unit_scale
from gemm.report import write_points
from torch import Tensor, nn

from spense_kernels import SpenseLinear, neighbours
from spense_kernels.checkpoint.skeleton import parameters_on_meta, set_tensor
from spense_kernels.errors import first_line
from spense_kernels.format import HybridWeight, Split
from spense_kernels.layout import LEGAL_NIBBLES

KINDS = ("dense", "spense")
CLASSES = {
    "qwen3-32b": ("Qwen3ForCausalLM", "Qwen3Config"),
    "seed-oss-36b": ("SeedOssForCausalLM", "SeedOssConfig"),
    "tiny": ("Qwen3ForCausalLM", "Qwen3Config"),
}
FP8 = torch.float8_e4m3fn
SHORT, LONG = 16, 80  # new tokens of two runs; their difference leaves prompt and overhead out
REPEATS = 3
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class DenseFp8(nn.Module):
    """y = x @ W.T with FP8 weights scaled a row and x quantised a row at a time."""

    def __init__(self, n: int, k: int, bias: bool, device: torch.device):
        super().__init__()
        self.register_buffer("weight8", random_fp8(n, k, device=device).view(FP8))
        self.register_buffer("scale", torch.full((1, n), unit_scale(k), device=device))
        bias_values = torch.zeros(n, dtype=torch.bfloat16, device=device) if bias else None
        self.register_buffer("bias", bias_values)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / 448
        x8 = (rows.float() / scale).clamp(-448, 448).to(FP8)
        if x.device.type == "cpu":
            y = (x8.float() @ self.weight8.float().t() * scale * self.scale).to(x.dtype)
        else:
            y = torch._scaled_mm(
                x8,
                self.weight8.t(),
                scale_a=scale,
                scale_b=self.scale,
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


def random_spense(
    n: int, k: int, bias: bool, device: torch.device, d: float, order: Tensor
) -> SpenseLinear:
    """A complete layer with random legal contents, columns in this order; k % 16 == 0."""
    split = Split.from_fraction(n, k, d, k_perm=order)
    values, indices, dense = split.payload_bytes()
    pairs = [low | high << 4 for low in LEGAL_NIBBLES for high in LEGAL_NIBBLES]
    legal = torch.tensor(pairs, dtype=torch.uint8, device=device)
    weight = HybridWeight(
        split,
        random_fp8(values, device=device),
        legal[torch.randint(len(legal), (indices,), device=device)],
        random_fp8(dense, device=device),
        torch.full((n,), unit_scale((k + split.widths[0]) // 2), device=device),
        torch.zeros(n, device=device) if bias else None,
    )
    return SpenseLinear.from_hybrid(weight, device)


def build(shape: ModelShape, kind: str, d: float, device: torch.device) -> nn.Module:
    """transformers' model of this shape with random weights on the device, in eval mode."""
    model_class, config_class = (getattr(transformers, name) for name in CLASSES[shape.name])
    own = {"attention_out_bias": False} if shape.name == "seed-oss-36b" else {}
    config = config_class(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        attention_bias=shape.qkv_bias and shape.name == "seed-oss-36b",
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **own,
    )
    with parameters_on_meta():
        model = model_class._from_config(config, dtype=torch.bfloat16).eval()
    orders: dict[str, Tensor] = {}
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        n, k = linear.out_features, linear.in_features
        parent, _, leaf = name.rpartition(".")
        if kind == "dense":
            layer = DenseFp8(n, k, linear.bias is not None, device)
        else:
            key = f"{parent}.{SAME_INPUT.get(leaf, leaf)}"
            order = torch.arange(k) if leaf == "down_proj" else torch.randperm(k)
            order = orders.setdefault(key, order)
            layer = random_spense(n, k, linear.bias is not None, device, d, order)
        model.set_submodule(name, layer)
    for parameter in list(model.parameters()):
        fresh = torch.randn(parameter.shape, dtype=parameter.dtype, device=device)
        scale = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        set_tensor(model, parameter, fresh.mul_(scale))
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    if kind == "spense":
        neighbours.fuse(model)
    return model.requires_grad_(False)


def seconds_of(model: nn.Module, prompt: Tensor, new_tokens: int, static: bool) -> float:
    device = prompt.device
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        **({"cache_implementation": "static"} if static else {}),
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert tokens.shape[1] == prompt.shape[1] + new_tokens
    return time.perf_counter() - start


def measure(model: nn.Module, batch: int, context: int, device: torch.device) -> dict:
    """Of a model that has not generated since the last `forget`."""
    vocabulary = model.config.vocab_size
    prompt = torch.randint(3, vocabulary, (batch, context), device=device)
    static = device.type == "cuda"
    # The first compiles and captures; every later one captures anew, as it has a cache of its own.
    first = seconds_of(model, prompt, LONG, static)
    print(f"  first call {first:.1f} s", flush=True)
    short, long = (
        min(seconds_of(model, prompt, count, static) for _ in range(REPEATS))
        for count in (SHORT, LONG)
    )
    ms = (long - short) / (LONG - SHORT) * 1e3
    return {
        "ms": round(ms, 4),
        "tokens_per_s": round(batch / ms * 1e3, 1),
        "prompt_and_overhead_s": round(short - SHORT * ms / 1e3, 4),
        "first_call_s": round(first, 1),
    }


def forget(device: torch.device) -> None:
    """Drops compiled code: for another batch size it would be compiled with that size unknown."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-32b", choices=CLASSES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--dense", type=float, default=0.25)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stop-after", type=float, help="seconds after which no point begins")
    parser.add_argument("--out", type=Path)
    add_commit(parser)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    start = time.perf_counter()
    device = torch.device(args.device)
    shape = MODELS[args.model]
    shape = replace(shape, layers=args.layers or shape.layers)
    run = machine(device, args.commit) | {"transformers": transformers.__version__}
    points: list[dict] = []
    failures = 0

    def late(what: str) -> bool:
        over = args.stop_after is not None and time.perf_counter() - start > args.stop_after
        if over:
            print(f"{shape.name} {what}: left out, time is up", flush=True)
        return over

    for kind in sorted(args.kinds, key=KINDS.index):
        if late(kind):
            continue
        model = build(shape, kind, args.dense, device)
        print(f"{shape.name} {kind}: built, {time.perf_counter() - start:.1f} s", flush=True)
        for batch in args.batch:
            where = f"{kind:<7} batch {batch:>3}, context {args.context}"
            if late(where):
                continue
            point = {"model": shape.name, "layers": shape.layers, "kind": kind, "batch": batch}
            point |= {"dense": args.dense if kind == "spense" else None, "context": args.context}
            try:
                point |= measure(model, batch, args.context, device)
            except RuntimeError as fault:  # the others are timed all the same
                failures += 1
                print(f"{shape.name} {where}: FAILED: {first_line(fault)}", flush=True)
                continue
            finally:
                forget(device)
            rival = [p for p in points if p["kind"] == "dense" and p["batch"] == batch]
            ratio = f"{rival[0]['ms'] / point['ms']:.3f}x" if rival else ""
            points.append(point)
            if args.out:
                write_points(args.out, run, points)
            print(
                f"{shape.name} {where}: {point['ms']:8.3f} ms/token "
                f"{point['tokens_per_s']:9.1f} tokens/s {ratio} "
                f"(first call {point['first_call_s']:.0f} s)",
                flush=True,
            )
        del model
        forget(device)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
