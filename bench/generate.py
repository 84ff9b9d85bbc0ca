# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of plain transformers `generate`: static cache, compiled, as its users run it.

    python bench/generate.py --model qwen3-32b --batch 1 16 --out bench/results/generate.json

Compiling all layers takes minutes, for every kind and batch; `--layers` and `--stop-after` bound
it. The file is written after every kind and batch.

After every token `generate` waits for the GPU: a step is what the host does before the CUDA graph
is launched, the graph, and a little more. How much the host adds depends on how it is called, so
each kind and batch has two rows, from the same compiled code, with transformers' loop in both:

    plain  cache_implementation="static": every call has a new cache and records new graphs
    tuned  every call is given the cache of the first (`reset`), so that one graph fits, under
           torch.compiler.set_stance(skip_guard_eval_unsafe=True), which leaves most guards out

A row's columns:

    ms             a token, between tokens 16 and 80 of a call; median of three calls
    gpu_ms         the CUDA graph without its launch, in a call of its own; median step
    call_host_ms   the host's time in the compiled model, guards and launch included; median step
    first_token_s  from the start of a call to its first token
    first_call_s   the call that compiled; the same for both rows
    graphs, breaks what torch.compile made so far; 1 and 0 unless it compiled anew

The model is transformers' own class with random weights. "spense" has SpenseLinear layers, fused as
loading onto CUDA fuses them; "dense" has FP8 layers that quantise x a row at a time and call
torch._scaled_mm, compiled with the rest of the model (what torchao's dynamic FP8 comes down to).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median

import torch
import transformers
from decoding.models import MODELS, ModelShape
from gemm.machine import add_commit, machine
from gemm.operands import random_fp8, unit_scale
from gemm.report import write_points
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Cache, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

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
SHORT, LONG = 16, 80  # new tokens after which a step is taken for steady, and at the end
REPEATS = 3
LAUNCH_CYCLES = 10_000_000  # more than the host needs to launch a graph of thousands of kernels
ROWS = ("tuned", "plain")  # in this order: what plain calls record makes later steps slower
OUTPUTS = {each.name for each in fields(GenerateDecoderOnlyOutput)}
CACHE = "cache" if "cache" in OUTPUTS else "past_key_values"  # its name as argument and output
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
    model.lm_head.weight.data[config.eos_token_id] = 0  # never the largest logit: no early end
    if kind == "spense":
        neighbours.fuse(model)
    return model.requires_grad_(False)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Call:
    """What one call of `generate` tells about itself; times in seconds."""

    cache: Cache | None = None
    marks: dict[int, float] = field(default_factory=dict)  # end of tokens 1, SHORT and LONG
    in_model: list[float] = field(default_factory=list)  # host, every step of the compiled model
    replays: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @property
    def ms(self) -> float:
        return (self.marks[LONG] - self.marks[SHORT]) / (LONG - SHORT) * 1e3

    @property
    def host_ms(self) -> float | None:
        steady = self.in_model[SHORT - 1 :]
        return median(steady) * 1e3 if steady else None

    @property
    def gpu_ms(self) -> float | None:
        steady = [a.elapsed_time(b) for a, b in self.replays[SHORT - 1 :]]
        return median(steady) if steady else None


class Marks(StoppingCriteria):
    """Notes when certain tokens are complete and stops nothing."""

    def __init__(self, call: Call, prompt: Tensor):
        self.call, self.prompt, self.start = call, prompt, time.perf_counter()

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        made = ids.shape[1] - self.prompt.shape[1]
        if made in (1, SHORT, LONG):
            wait(ids.device)
            self.call.marks[made] = time.perf_counter() - self.start
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


@contextmanager
def host_timed(model: nn.Module, call: Call) -> Iterator[None]:
    """Times what `get_compiled_call` gives `generate` for decoding."""
    compiled_call = model.get_compiled_call

    def timed_call(config) -> Callable:
        run = compiled_call(config)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = run(*args, **kwargs)
            call.in_model.append(time.perf_counter() - start)
            return result

        return timed

    model.get_compiled_call = timed_call
    try:
        yield
    finally:
        del model.get_compiled_call


@contextmanager
def replays_timed(call: Call) -> Iterator[None]:
    """Puts events before and after every replay of a CUDA graph."""
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(LAUNCH_CYCLES)  # so that the graph is there when its time begins
        before.record()
        replay(graph)
        after.record()
        call.replays.append((before, after))

    torch.cuda.CUDAGraph.replay = timed
    try:
        yield
    finally:
        torch.cuda.CUDAGraph.replay = replay


def generate(
    model: nn.Module, prompt: Tensor, cache: Cache | None = None, graphs: bool = False
) -> Call:
    """LONG tokens, greedily, with this static cache or one of its own; `graphs` times those."""
    call = Call()
    if cache is None:
        options: dict = {"cache_implementation": "static"}
    else:
        cache.reset()
        options = {CACHE: cache}
    wait(prompt.device)
    with host_timed(model, call), replays_timed(call) if graphs else nullcontext():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=LONG,
            do_sample=False,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([Marks(call, prompt)]),
            **options,
        )
    wait(prompt.device)
    call.cache = getattr(output, CACHE)
    return call


def measure(model: nn.Module, batch: int, context: int, device: torch.device) -> list[dict]:
    """The rows of a model that has not generated since the last `forget`."""
    prompt = torch.randint(3, model.config.vocab_size, (batch, context), device=device)
    counters.clear()
    start = time.perf_counter()
    cache = generate(model, prompt).cache
    first = time.perf_counter() - start
    print(f"  first call {first:.1f} s", flush=True)
    rows = []
    for row in ROWS:
        own = cache if row == "tuned" else None
        stance = {"skip_guard_eval_unsafe": True} if row == "tuned" else {}
        # Compiling anew, with all layers, would take the time of all other points.
        with torch.compiler.set_stance("fail_on_recompile", **stance):
            calls = [generate(model, prompt, own) for _ in range(REPEATS)]
            gpu_ms = generate(model, prompt, own, graphs=True).gpu_ms
        ms = median(call.ms for call in calls)
        host_ms = [call.host_ms for call in calls if call.host_ms is not None]
        rows.append(
            {
                "host": row,
                "ms": round(ms, 4),
                "tokens_per_s": round(batch / ms * 1e3, 1),
                "gpu_ms": None if gpu_ms is None else round(gpu_ms, 4),
                "call_host_ms": round(median(host_ms), 4) if host_ms else None,
                "first_token_s": round(median(call.marks[1] for call in calls), 4),
                "first_call_s": round(first, 1),
                "graphs": counters["stats"]["unique_graphs"],
                "breaks": sum(counters["graph_break"].values()),
            }
        )
    return rows


def text_of(row: dict, batch: int, points: list[dict]) -> str:
    """One line, with the speed against dense where that is among the points."""
    alike = {"kind": "dense", "batch": batch, "host": row["host"]}
    ratios = [p["ms"] / row["ms"] for p in points if alike.items() <= p.items()]
    text = f"{row['host']} {row['ms']:8.3f} ms/token {row['tokens_per_s']:9.1f} tokens/s"
    if row["gpu_ms"] is not None:
        text += f", graph {row['gpu_ms']:.3f} ms"
    if row["call_host_ms"] is not None:
        text += f", host in the model {row['call_host_ms']:.3f} ms"
    return text + "".join(f", {ratio:.3f}x" for ratio in ratios)


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
        begin = time.perf_counter()
        model = build(shape, kind, args.dense, device)
        wait(device)
        print(f"{shape.name} {kind}: built in {time.perf_counter() - begin:.1f} s", flush=True)
        for batch in args.batch:
            where = f"{kind:<7} batch {batch:>3}, context {args.context}"
            if late(where):
                continue
            point = {"model": shape.name, "layers": shape.layers, "kind": kind, "batch": batch}
            point |= {"dense": args.dense if kind == "spense" else None, "context": args.context}
            try:
                rows = measure(model, batch, args.context, device)
            except RuntimeError as fault:  # the others are timed all the same
                failures += 1
                print(f"{shape.name} {where}: FAILED: {first_line(fault)}", flush=True)
                continue
            finally:
                forget(device)
            for row in rows:
                print(f"{shape.name} {where}: {text_of(row, batch, points)}", flush=True)
                points.append(point | row)
            if args.out:
                write_points(args.out, run, points)
        del model
        forget(device)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
