# SPDX-License-Identifier: Apache-2.0
"""Milliseconds a step of the fine-tune takes, with and without compilation and the CUDA graph.

    python bench/quality/step_time.py --device cuda --out bench/results/finetune_h100.json
    python bench/quality/step_time.py --device cpu --shrink 10 --steps 6

A model of Gemma-3-270m's shape with random weights (2:4, a quarter of the columns dense): a step
costs what it costs with trained ones. The first third of the steps, in which everything is compiled
and captured, is told apart.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from session import commit, machine
from torch import nn

from spense_kernels.finetune import FinetuneConfig, StudentLinear, finetune

LENGTH, TEXT = 512, 64  # tokens a window, windows
KINDS = (
    ("plain", {"compile": False, "graph": False}),
    ("compiled", {"compile": True, "graph": False}),
    ("graph", {"compile": False, "graph": True}),
    ("compiled, graph", {"compile": True, "graph": True}),
    ("compiled, graph, spliced text", {"compile": True, "graph": True, "splice": 4}),
)


def dense_model(shrink: int, vocabulary: int, device: str) -> nn.Module:
    """Gemma-3-270m in bfloat16, widths divided by `shrink`."""
    config = transformers.Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=640 // shrink,
        intermediate_size=2048 // shrink // 8 * 8,
        num_hidden_layers=18 if shrink == 1 else 2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256 if shrink == 1 else 16,
        sliding_window=512,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Gemma3ForCausalLM(config).to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def student_of(teacher: nn.Module, shrink: int, vocabulary: int, device: str) -> nn.Module:
    """The same model with StudentLinear: two of four weights go, but for the first columns."""
    student = dense_model(shrink, vocabulary, device)
    student.load_state_dict(teacher.state_dict())
    for name, layer in list(student.named_modules()):
        if isinstance(layer, nn.Linear) and ".layers." in name:
            weight = layer.weight.float()
            order = weight.abs().unflatten(1, (-1, 4)).argsort(dim=-1).argsort(dim=-1)
            mask = (order >= 2).flatten(1)
            mask[:, : weight.shape[1] // 4] = True
            student.set_submodule(name, StudentLinear(weight, mask))
    return student


class Watch:
    """Stands for a progress bar; stops the time from a third of the steps to the end."""

    def __init__(self, steps: int, device: str):
        self.first, self.last, self.device = steps // 3, steps, device
        self.done, self.times = 0, []

    def start(self, stage, total):
        pass

    def finish(self):
        pass

    def advance(self, count=1):
        self.done += count
        if count and self.done in (self.first, self.last):
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            self.times.append(time.monotonic())

    def step(self) -> float:
        """Seconds."""
        return (self.times[1] - self.times[0]) / (self.last - self.first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide the widths, to try the script"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[40062, 262144])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    cuda, rows = options.device.startswith("cuda"), []
    for vocabulary in options.vocabulary:
        teacher = dense_model(options.shrink, vocabulary, options.device)
        generator = torch.Generator().manual_seed(1)
        windows = torch.randint(0, vocabulary, (TEXT, LENGTH), generator=generator)
        for name, settings in KINDS:
            student = student_of(teacher, options.shrink, vocabulary, options.device)
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            config = FinetuneConfig(steps=options.steps, batch=options.batch, **settings)
            watch = Watch(options.steps, options.device)
            report = finetune(student, teacher, windows, config, progress=watch)
            seconds = watch.step()
            row = {
                "kind": name,
                "vocabulary": vocabulary,
                "batch": options.batch,
                "ms": round(1000 * seconds, 2),
                "tokens_per_second": round(options.batch * (LENGTH - 1) / seconds),
                "start_seconds": round(report.seconds - seconds * options.steps, 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
                "last_loss": round(report.losses[-1], 5),
            }
            rows.append(row)
            print(
                f"{vocabulary:7} {name:30} {row['ms']:8.1f} ms a step "
                f"{row['tokens_per_second']:8,} tokens/s  start {row['start_seconds']:5.1f} s  "
                f"KL {row['last_loss']:.4f}",
                flush=True,
            )
            if options.out is not None:
                found = {"machine": machine(options.device), "commit": commit(), "rows": rows}
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
