# SPDX-License-Identifier: Apache-2.0
"""Quality of pruned Gemma-3-270m: R(d) of many settings on held-out prose.

    python bench/quality/run.py --out bench/results/quality.json
    python bench/quality/run.py --only "uniform 25 %" "staircase 25 %" --test 24

Rows already in the output file with the same set-up are kept, so the table can be run in pieces.
R = (NLL(sparsegpt 2:4) - NLL) / (NLL(sparsegpt 2:4) - NLL(dense)); both ends without FP8. Pruned
layers with FP8 run through torch.ops.spense.hybrid_gemm with FP8 activations a token.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import torch
from corpus import Prose, load_prose
from measure import both_statistics, mean_and_error, window_losses
from session import add_r
from variants import VARIANTS

from spense_kernels.models import load_dense
from spense_kernels.prune import Statistics, prune_model, shallow_clone
from spense_kernels.prune.store import write_atomic


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.json"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--model", default="gemma-3-270m", help="what load_dense takes")
    parser.add_argument("--calibration", type=int, default=128, help="windows of 512 tokens")
    parser.add_argument("--test", type=int, default=64, help="windows of 512 tokens, at most 128")
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration windows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=None, help="names of rows")
    return parser.parse_args()


def main() -> None:
    options = parse()
    names = list(VARIANTS) if not options.only else options.only
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown:
        raise SystemExit(f"--only: no row {unknown[0]!r}; there are {list(VARIANTS)}")
    loaded = load_dense(options.model, torch.bfloat16)
    model = loaded.model.to(options.device)
    prose = cached_prose(loaded.tokenizer, options)
    results = open_results(options, prose)
    statistics = cached_statistics(model, prose.calibration, options)
    for name in names:
        if name in results["rows"]:
            continue
        print(name, flush=True)
        results["rows"][name] = run_variant(name, model, prose, statistics, options)
        add_r(results["rows"], ("test", "outside"))
        text = (json.dumps(results, indent=1) + "\n").encode()
        write_atomic(options.out, lambda file, text=text: file.write(text))
    show(results)


def open_results(options, prose) -> dict:
    """The output file's content when its set-up is the same, else a new table."""
    setup = {
        "model": "gemma-3-270m (GGUF Q4_K_M, dequantised to bfloat16)",
        "activations": "FP8 a token in rows with FP8, else bfloat16",
        "calibration_windows": options.calibration,
        "test_windows": options.test,
        "outside_windows": prose.outside.shape[0],
        "window_tokens": prose.test.shape[1],
        "softmax_tokens": prose.vocabulary.shape[0],
        "calibration_seed": options.seed,
        "k_shards": "1 unless a row says otherwise",
        "sha256": prose.hashes,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8"))
        if found["setup"] == setup:
            return found
        raise SystemExit(f"{options.out} holds another set-up; name another --out")
    machine = {"cpu": cpu_name(), "torch": torch.__version__, "device": device_name(options)}
    return {"setup": setup, "machine": machine, "rows": {}}


def cached_prose(tokenizer, options) -> Prose:
    """Windows from the cache folder, or made from the packages and kept there."""
    name = f"prose2_{options.calibration}_{options.test}_{options.seed}.pt"
    path = options.cache / name
    if path.exists():
        return Prose(**torch.load(path, weights_only=True))
    prose = load_prose(
        tokenizer, options.cache / "packages", options.calibration, options.test, seed=options.seed
    )
    write_atomic(path, lambda file: torch.save(vars(prose), file))
    return prose


def cached_statistics(model, calibration, options) -> dict[str, Statistics]:
    folder = options.cache / f"statistics2_{options.calibration}_{options.seed}"
    paths = {name: folder / f"{name}.pt" for name in ("none", "norm")}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        print("statistics", flush=True)
        for name, found in both_statistics(model, calibration, options.device).items():
            found.save(paths[name])
    return {name: Statistics.load(path) for name, path in paths.items()}


def run_variant(name: str, model, prose, statistics, options) -> dict:
    config, row = VARIANTS[name], {}
    target = shallow_clone(model)
    if config is not None:
        begin = time.monotonic()
        given = None
        if config.calibration == "static":
            given = statistics[config.token_weighting]
        report = prune_model(
            target,
            prose.calibration,
            config,
            statistics=given,
            device=options.device,
            layers_at_once=1 if options.device == "cpu" else 18,
        )
        row["prune_seconds"] = round(time.monotonic() - begin, 1)
        row["dense_fraction"] = round(report.dense_fraction, 4)
        row["mean_relative_error"] = round(report.mean_relative_error, 6)
        row["config"] = config.to_json()
    begin = time.monotonic()
    for part in ("test", "outside"):
        losses = window_losses(target, getattr(prose, part), prose.vocabulary, options.device)
        nll, error = mean_and_error(losses)
        row[part] = {"nll": nll, "stderr": error, "ppl": math.exp(nll), "window_nll": losses}
    row["evaluate_seconds"] = round(time.monotonic() - begin, 1)
    print(f"  nll {row['test']['nll']:.4f} outside {row['outside']['nll']:.4f}", flush=True)
    return row


def show(results: dict) -> None:
    print(f"{'row':45} {'NLL':>7} {'PPL':>8} {'R':>7} {'+-':>6} {'outside PPL':>12} {'prune s':>8}")
    for name, row in results["rows"].items():
        test, outside = row["test"], row["outside"]
        print(
            f"{name:45} {test['nll']:7.4f} {test['ppl']:8.2f} {test.get('r', math.nan):7.3f} "
            f"{test.get('r_stderr', math.nan):6.3f} {outside['ppl']:12.2f} "
            f"{row.get('prune_seconds', 0):8.1f}"
        )


def device_name(options) -> str:
    is_gpu = options.device.startswith("cuda")
    return torch.cuda.get_device_name(options.device) if is_gpu else options.device


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return f"{names[0]}, {os.cpu_count()} cores"
    except (OSError, IndexError):
        return platform.processor()


if __name__ == "__main__":
    main()
