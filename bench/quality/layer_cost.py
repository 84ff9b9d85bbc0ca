# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory to prune one decoder layer at the shapes of a large model.

    python bench/quality/layer_cost.py --device cuda                  # Qwen3-32B, 128 x 2048 tokens
    python bench/quality/layer_cost.py --device cpu --shrink 16 --sequences 4 --length 256

One layer with random weights and a small vocabulary: the shapes cost what they cost with trained
ones. "statistics" holds the forward pass with its Hessians and the backward pass for sensitivity.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from session import SETTINGS, commit, machine

from spense_kernels.prune import PruneConfig, collect_statistics, prune_model

LAYERS = 64  # of Qwen3-32B
TARGET_SECONDS, TARGET_BYTES = 35.0, 60e9


def one_layer(shrink: int, length: int, device: str):
    """A Qwen3 model of one layer in bfloat16, every size divided by `shrink`."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=1024,
        hidden_size=5120 // shrink,
        intermediate_size=25600 // shrink,
        num_hidden_layers=1,
        num_attention_heads=max(1, 64 // shrink),
        num_key_value_heads=max(1, 8 // shrink),
        head_dim=128,
        max_position_embeddings=length,
    )
    with torch.device(device):
        model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dense-fraction", type=float, default=0.25)
    parser.add_argument("--strategy", default="staircase")
    parser.add_argument("--admm-steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict:
    """Collect and prune once; a record of times and memory."""
    torch.manual_seed(0)
    model = one_layer(options.shrink, options.length, options.device)
    tokens = torch.randint(0, 1024, (options.sequences, options.length))
    changes = {
        "strategy": options.strategy,
        "dense_fraction": options.dense_fraction,
        "admm_steps": options.admm_steps,
    }
    config = PruneConfig(**{**SETTINGS, **changes})
    cuda = options.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    statistics = collect_statistics(model, tokens, config, device=options.device)
    for layer in statistics.layers:
        layer.hessians = {name: h.to(options.device) for name, h in layer.hessians.items()}
    collected = time.monotonic()
    report = prune_model(model, tokens, config, statistics=statistics, device=options.device)
    done = time.monotonic()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "model": "one layer with the shapes of Qwen3-32B"
        + f" / {options.shrink}" * (options.shrink > 1),
        "tokens": list(tokens.shape),
        "machine": machine(options.device),
        "commit": commit(),
        "config": config.to_json(),
        "statistics_seconds": round(collected - begin, 2),
        "prune_seconds": {name: round(value, 2) for name, value in report.seconds.items()},
        "seconds": round(done - begin, 2),
        "model_minutes": round(LAYERS * (done - begin) / 60, 1),
        "peak_device_bytes": peak,
        "peak_host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "dense_fraction": report.dense_fraction,
        "targets": {"seconds": TARGET_SECONDS, "peak_device_bytes": TARGET_BYTES},
    }


def main() -> None:
    options = parse()
    text = json.dumps(measure(options), indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
