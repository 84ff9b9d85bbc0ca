# SPDX-License-Identifier: Apache-2.0
"""The work behind `spense prune`: text, model, plan, run, and what to tell about them."""

from __future__ import annotations

from pathlib import Path

import torch

from spense_kernels import cost, evaluate
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
from spense_kernels.prune import PruneConfig, PruneReport, prune_model
from spense_kernels.prune.groups import decoder_layers
from spense_kernels.report.speed import group_names, planned_speed, speed_of_pruned

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


def planned(loaded: LoadedModel, config: PruneConfig, batch: int) -> dict:
    """What would be pruned: names, shapes, bytes at one width everywhere. Writes nothing.

    Args:
        batch: tokens a decode step, of the modelled speed.
    """
    layers = []
    prefix, decoder = decoder_layers(loaded.model)
    for index, layer in enumerate(decoder):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                layers.append(_planned_layer(f"{prefix}.{index}.{name}", module, config))
    weights = sum(x["n"] * x["k"] for x in layers)
    speed = {}
    if cost.available():
        speed["speed"] = planned_speed(loaded.model, config, batch).to_json()
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
        **speed,
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
    if "speed" in plan:
        lines.append(speed_line(plan["speed"]))
    return "\n".join(lines)


def speed_line(speed: dict) -> str:
    """The modelled speed for a terminal."""
    return (
        f"modelled decode on an H100, {speed['batch']} tokens a step, these layers alone: "
        f"{speed['us']:.1f} us, {speed['speedup']:.3f} times as fast as dense FP8"
    )


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
    batch: int,
    target: float | None,
) -> dict:
    """Prune in place, save, and return what `--json` prints.

    Args:
        batch: tokens a decode step, of the modelled speed.
        target: speed-up that the dense fraction was chosen for, or None.
    """
    groups = group_names(loaded.model, config.skip)
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
    result = result_of(loaded, loaded.model, report, out, text)
    if cost.available():
        result["speed"] = speed_of_pruned(loaded.model, groups, batch).to_json()
    note_target(result, target)
    return result


def note_target(result: dict, target: float | None) -> None:
    """Keep the target; say so when a staircase's padding cost more than its budget allowed."""
    if target is None:
        return
    result["target_speedup"] = target
    reached = result["speed"]["speedup"]
    if reached < target:
        say(f"spense: note: the widths chosen are modelled at {reached:.3f}, below {target:g}")


def result_of(loaded: LoadedModel, model, report: PruneReport, out: Path | None, text: dict):
    """What `--json` prints of a pruned model."""
    return {
        "source": loaded.source,
        "out": None if out is None else str(out),
        "settings": report.config.to_json(),
        "calibration": text,
        "totals": totals(model),
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
        + (f"{speed_line(result['speed'])}\n" if "speed" in result else "")
        + f"next: spense verify {result['out']}; spense eval {result['out']}"
    )
