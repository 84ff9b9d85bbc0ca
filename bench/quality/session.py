# SPDX-License-Identifier: Apache-2.0
"""Model, text, statistics and results that targets.py and explore.py share."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import draw_calibration, draw_validation, load_prose, training_windows
from measure import mean_and_error, window_losses
from torch import Tensor

from spense_kernels.models import load_dense
from spense_kernels.prune import (
    PruneConfig,
    Statistics,
    collect_statistics,
    prune_model,
    shallow_clone,
)
from spense_kernels.prune.store import write_atomic

PARTS = ("validation", "test", "outside")
# More search than the defaults: a prune of the demo model still takes seconds on a GPU.
SETTINGS = {
    "strategy": "staircase",
    "search_rounds": 100,
    "search_rows": 1024,
    "refit_steps": 20,
}
# What a GPU can afford beside that: a backward pass over every position of all sequences.
SENSITIVITY = {"sensitivity_sequences": 1024, "sensitivity_stride": 1, "sensitivity_batch": 8}


@dataclass
class Session:
    """One run of a script.

    Attributes:
        model: dense bfloat16 model on the device.
        windows: int64 [S, L] by part.
        count: calibration windows.
        results: what stands in `out`.
    """

    model: torch.nn.Module
    vocabulary: Tensor
    pools: dict[str, Tensor]
    windows: dict[str, Tensor]
    device: str
    out: Path
    count: int
    results: dict

    def __post_init__(self):
        self._statistics: dict[tuple, Statistics] = {}

    def calibration(self, seed: int, count: int | None = None) -> Tensor:
        return draw_calibration(self.pools, count or self.count, seed)

    def training(self) -> Tensor:
        return training_windows(self.pools)

    def statistics(self, seed: int, config: PruneConfig, count: int | None = None) -> Statistics:
        """Of one calibration draw; the last one is kept, on the device."""
        key = (seed, count or self.count, config.token_weighting, config.needs_gradients)
        key += (
            config.gradient_power if config.gradient_share else None,
            config.sensitivity_sequences,
            config.sensitivity_stride,
        )
        if key not in self._statistics:
            self._statistics.clear()
            begin = time.monotonic()
            found = collect_statistics(
                self.model, self.calibration(seed, count), config, device=self.device
            )
            for layer in found.layers:
                layer.hessians = {k: h.to(self.device) for k, h in layer.hessians.items()}
            if found.gradients is not None:
                known = found.gradients.hessians
                found.gradients.hessians = {k: h.to(self.device) for k, h in known.items()}
            self._statistics[key] = found
            taken = time.monotonic() - begin
            print(f"  statistics {taken:.1f} s: {_listed(found.seconds)}", flush=True)
        return self._statistics[key]

    def prune(self, name: str, config: PruneConfig, seed: int, count: int | None = None):
        """Prune a copy, measure it, keep the row. Returns (row, pruned model)."""
        if self.device != "cpu":
            config = config.replace(**SENSITIVITY)
        statistics = self.statistics(seed, config, count)
        target = shallow_clone(self.model)
        begin = time.monotonic()
        report = prune_model(
            target,
            self.calibration(seed, count),
            config,
            statistics=statistics,
            device=self.device,
            layers_at_once=1 if self.device == "cpu" else len(statistics.layers),
        )
        row = {
            "prune_seconds": round(time.monotonic() - begin, 1),
            "dense_fraction": round(report.dense_fraction, 4),
            "mean_relative_error": round(report.mean_relative_error, 6),
            "calibration_windows": count or self.count,
            "calibration_seed": seed,
            "config": config.to_json(),
        }
        row["phase_seconds"] = {name: round(s, 2) for name, s in report.phases.items()}
        print(f"  prune {row['prune_seconds']} s: {_listed(report.phases)}", flush=True)
        target.to(self.device)
        self.keep(name, row, target)
        return row, target

    def keep(self, name: str, row: dict, model) -> None:
        """Measure the model and write the row."""
        for part in PARTS:
            losses = window_losses(model, self.windows[part], self.vocabulary, self.device)
            nll, error = mean_and_error(losses)
            losses = [round(x, 5) for x in losses]
            row[part] = {"nll": nll, "stderr": error, "ppl": math.exp(nll), "window_nll": losses}
        row["commit"] = commit()
        self.results["rows"][name] = row
        add_r(self.results["rows"], PARTS)
        text = (json.dumps(self.results, indent=1) + "\n").encode()
        write_atomic(self.out, lambda file: file.write(text))
        shown = " ".join(f"{part} {row[part].get('r', math.nan):.4f}" for part in PARTS)
        print(f"{name:44} R {shown}  {row.get('prune_seconds', 0):.1f} s", flush=True)

    def ends(self) -> None:
        """The rows that R is measured against."""
        if "dense" not in self.results["rows"]:
            self.keep("dense", {}, self.model)
        if "sparsegpt 2:4" not in self.results["rows"]:
            self.prune("sparsegpt 2:4", PruneConfig.sparsegpt(), 0)


def _listed(seconds: dict[str, float]) -> str:
    """Phases, the longest first."""
    return ", ".join(f"{n} {s:.1f}" for n, s in sorted(seconds.items(), key=lambda x: -x[1]))


def open_session(options, status: str | None = None) -> Session:
    """Load everything that `options` (model, cache, out, device, calibration, test) asks for.

    Rows that stand in the output file with the same set-up stay.
    """
    loaded = load_dense(options.model, torch.bfloat16)
    prose = load_prose(
        loaded.tokenizer, options.cache / "packages", options.calibration, options.test
    )
    model = loaded.model
    if options.layers:
        model.model.layers = model.model.layers[: options.layers]
        model.config.num_hidden_layers = options.layers
    vocabulary = prose.vocabulary
    reduce_vocabulary(model, vocabulary)
    pools = {name: torch.searchsorted(vocabulary, pool) for name, pool in prose.pools.items()}
    seen = draw_calibration(pools, options.calibration, 0)
    windows = {
        "validation": draw_validation(pools, seen, options.validation),
        "test": torch.searchsorted(vocabulary, prose.test),
        "outside": torch.searchsorted(vocabulary, prose.outside),
    }
    setup = {
        "model": f"{options.model} (dequantised to bfloat16)",
        "activations": "FP8 a token in rows with FP8, else bfloat16",
        "calibration_windows": options.calibration,
        "validation_windows": options.validation,
        "test_windows": options.test,
        "outside_windows": prose.outside.shape[0],
        "window_tokens": prose.test.shape[1],
        "softmax_tokens": prose.vocabulary.shape[0],
        "calibration_seed": "named in the rows",
        "k_shards": "1 unless a row says otherwise",
        "sha256": prose.hashes,
        **({"layers": options.layers} if options.layers else {}),
        **({"status": status} if status else {}),
    }
    results = {"setup": setup, "machine": machine(options.device), "commit": commit(), "rows": {}}
    if options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8"))
        if found["setup"] != setup:
            raise SystemExit(f"{options.out} holds another set-up; name another --out")
        results = found
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return Session(
        model.to(options.device), torch.arange(len(vocabulary)), pools, windows, options.device,
        options.out, options.calibration, results,
    )  # fmt: skip


def reduce_vocabulary(model, vocabulary: Tensor) -> None:
    """Leave only these tokens (sorted ids) in embedding and head: most of a small model's cost."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    embedding.weight = torch.nn.Parameter(embedding.weight[vocabulary], requires_grad=False)
    embedding.num_embeddings, embedding.padding_idx = len(vocabulary), None
    weight = embedding.weight if tied else head.weight[vocabulary]
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    head.out_features = model.config.vocab_size = len(vocabulary)


def add_options(parser, out: str) -> None:
    """Options that both scripts have."""
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--cache", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--model", default="gemma-3-270m", help="what load_dense takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calibration", type=int, default=128, help="windows of 512 tokens")
    parser.add_argument("--validation", type=int, default=32, help="windows of 512 tokens")
    parser.add_argument("--test", type=int, default=64, help="windows of 512 tokens, at most 128")
    parser.add_argument("--layers", type=int, help="only the first layers: to try the script")


def add_r(rows: dict, parts) -> None:
    """Fill R of every row, with its error from the windows, where both ends are there."""
    if "dense" not in rows or "sparsegpt 2:4" not in rows:
        return
    for part in parts:
        low, high = rows["sparsegpt 2:4"][part], rows["dense"][part]
        gap = low["nll"] - high["nll"]
        for row in rows.values():
            entry = row[part]
            entry["r"] = (low["nll"] - entry["nll"]) / gap
            # First order: error of the ratio of two means over the same windows.
            triples = zip(low["window_nll"], high["window_nll"], entry["window_nll"], strict=True)
            spread = [((a - c) - entry["r"] * (a - b)) / gap for a, b, c in triples]
            entry["r_stderr"] = mean_and_error(spread)[1]


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None
