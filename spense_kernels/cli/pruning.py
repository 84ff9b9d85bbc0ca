# SPDX-License-Identifier: Apache-2.0
"""The work behind `spense prune`: text, model, plan, run, and what to tell about them."""

from __future__ import annotations

from pathlib import Path

import torch

from spense_kernels import evaluate
from spense_kernels.checkpoint import save_checkpoint
from spense_kernels.cli.options import enough
from spense_kernels.demo.facts import provenance
from spense_kernels.demo.layers import totals
from spense_kernels.demo.report import readable_bytes
from spense_kernels.demo.steps import say
from spense_kernels.evaluate.text import read_text
from spense_kernels.format import Split
from spense_kernels.layout import GRANULE
from spense_kernels.models import LoadedModel, load_dense
from spense_kernels.progress import Bars
from spense_kernels.prune import PruneConfig, prune_model
from spense_kernels.prune.groups import decoder_layers

SHARDED_K = 4096  # layers this wide get shards, so that tensor parallelism can cut them
SHARDS = 8


def documents(paths: list[Path] | None) -> tuple[tuple[str, ...], str]:
    """Calibration documents and a name for them."""
    if paths:
        return tuple(read_text(p) for p in paths), ", ".join(p.name for p in paths)
    corpus = evaluate.python_docs()
    return corpus.calibration, corpus.name


def load(source: str, dtype: torch.dtype | None) -> LoadedModel:
    """The dense model; its licence notice goes to stderr."""
    loaded = load_dense(source, dtype)
    if loaded.licence_notice:
        say(loaded.licence_notice + "\n")
    return loaded


def default_shards(model, asked: int | None) -> int:
    """--k-shards, or 8 for models whose hidden size reaches 4096, else 1."""
    if asked is not None:
        return asked
    return SHARDS if (getattr(model.config, "hidden_size", 0) or 0) >= SHARDED_K else 1


def planned(loaded: LoadedModel, config: PruneConfig) -> dict:
    """What would be pruned: names, shapes, bytes at one width everywhere. Writes nothing."""
    layers = []
    prefix, decoder = decoder_layers(loaded.model)
    for index, layer in enumerate(decoder):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                layers.append(_planned_layer(f"{prefix}.{index}.{name}", module, config))
    weights = sum(x["n"] * x["k"] for x in layers)
    return {
        "source": loaded.source,
        "settings": config.to_json(),
        "totals": {
            "layers": len(layers),
            "weights": weights,
            "dense_fraction": sum(x["n"] * x["k"] * x["dense_fraction"] for x in layers) / weights,
            "packed_bytes": sum(x["packed_bytes"] for x in layers),
            "bf16_bytes": 2 * weights,
        },
        "layers": layers,
    }


def _planned_layer(name: str, module: torch.nn.Linear, config: PruneConfig) -> dict:
    n, k = module.weight.shape
    shards = config.k_shards if k % (GRANULE * config.k_shards) == 0 else 1
    split = Split.from_fraction(n, k, config.dense_fraction, None, shards)
    return {
        "name": name,
        "n": n,
        "k": k,
        "k_shards": shards,
        "dense_fraction": split.dense_fraction,
        "packed_bytes": split.packed_bytes,
    }


def show_plan(plan: dict) -> str:
    """The plan for a terminal."""
    total = plan["totals"]
    lines = [
        f"{x['name']:<44} {x['n']:>6} x {x['k']:<6} shards {x['k_shards']}  "
        f"dense {x['dense_fraction']:6.2%}"
        for x in plan["layers"]
    ]
    note = " (a staircase moves dense columns between layers)"
    lines.append(
        f"{total['layers']} layers, {total['dense_fraction']:.2%} dense, "
        f"{readable_bytes(total['packed_bytes'])} packed instead of "
        f"{readable_bytes(total['bf16_bytes'])} in bf16"
        + (note if plan["settings"]["strategy"] == "staircase" else "")
    )
    return "\n".join(lines)


def windows(tokenizer, texts, samples: int, length: int, seed: int) -> torch.Tensor:
    pool = evaluate.windows(tokenizer, texts, length)
    return evaluate.pick(enough(pool, samples, "calibration", length), samples, seed)


def checkpoint_size(model) -> int:
    """Bytes the checkpoint can take at most: the model as it stands."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def run(
    loaded: LoadedModel,
    chosen: torch.Tensor,
    config: PruneConfig,
    device: str,
    work_dir: Path | None,
    out: Path,
    force: bool,
    text_name: str,
) -> dict:
    """Prune in place, save, and return what `--json` prints."""
    with Bars(indent="") as bars:
        report = prune_model(
            loaded.model, chosen, config, progress=bars, work_dir=work_dir, device=device
        )
    text = {"name": text_name, "windows": list(chosen.shape)}
    save_checkpoint(
        loaded.model,
        out,
        tokenizer=loaded.tokenizer,
        provenance=provenance(report, loaded.source, text),
        overwrite=force,
    )
    return {
        "source": loaded.source,
        "out": str(out),
        "settings": config.to_json(),
        "calibration": text,
        "totals": totals(loaded.model),
        "layers": [
            {
                "name": m.name,
                "rel_error": m.relative_error,
                "dense_fraction": m.dense_fraction,
                "dead_inputs": m.dead_inputs,
            }
            for m in report.modules
        ],
        "notes": report.notes,
        "seconds": report.seconds,
    }


def text(result: dict) -> str:
    """The result for a terminal."""
    total = result["totals"]
    errors = sorted((layer["rel_error"], layer["name"]) for layer in result["layers"])
    mean = sum(error for error, _ in errors) / len(errors)
    return (
        f"{result['out']}: {total['layers']} layers, {total['dense_fraction']:.2%} dense, "
        f"{readable_bytes(total['packed_bytes'])} packed "
        f"({total['packed_bytes'] / total['weights']:.3f} byte a weight)\n"
        f"relative output error: mean {mean:.4f}, largest {errors[-1][0]:.4f} in {errors[-1][1]}\n"
        f"next: spense verify {result['out']}; spense eval {result['out']}"
    )
