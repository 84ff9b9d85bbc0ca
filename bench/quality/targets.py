# SPDX-License-Identifier: Apache-2.0
"""The figures to reach: one-shot and fine-tuned R at 0, 12.5, 25 and 50 % dense, several seeds.

    python bench/quality/targets.py --device cuda
    python bench/quality/targets.py --device cpu --seeds 0 --tune-seconds 0

Every row runs through torch.ops.spense.hybrid_gemm. Rows already in the output file stay, so the
table can be run in pieces.
"""

from __future__ import annotations

import argparse
import time

from session import SETTINGS, Session, add_options, open_session

from spense_kernels.finetune import FinetuneConfig, finetune, finish_student, make_student
from spense_kernels.prune import PruneConfig

FRACTIONS = (0.25, 0.125, 0.5, 0.0)
THOROUGH = {"gradient_share": 1.0, "correct": True}
TARGETS = {0.0: (0.35, None), 0.125: (0.64, 0.86), 0.25: (0.75, 0.91), 0.5: (0.89, 0.96)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "bench/results/quality_targets.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, help="dense")
    parser.add_argument("--tune-seconds", type=float, default=110, help="a fine-tune; 0 for none")
    parser.add_argument("--tune-seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--lr", type=float, default=1.5e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--splice", type=int, default=4, help="parts of a window, see FinetuneConfig"
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, help="share of tokens, see FinetuneConfig"
    )
    parser.add_argument("--interpolation", type=float, default=1.0, help="see FinetuneConfig")
    return parser.parse_args()


def best(device: str, **changes) -> PruneConfig:
    """What reaches the figures; on a CPU without what takes a backward pass over all text."""
    thorough = {} if device == "cpu" else THOROUGH
    return PruneConfig(**{**SETTINGS, **thorough, **changes})


def label(fraction: float) -> str:
    return f"staircase {100 * fraction:g} %" if fraction else "2:4"


def tuned_label(fraction: float, seed: int, options) -> str:
    part = f", interpolation {options.interpolation:g}" if options.interpolation < 1 else ""
    return f"{label(fraction)}, fine-tuned {options.tune_seconds:g} s{part}, seed {seed}"


def fill(session: Session, options) -> None:
    """All rows, the most telling first."""
    session.ends()
    rows = session.results["rows"]
    for seed in options.seeds:
        for fraction in options.fractions:
            name = f"{label(fraction)}, seed {seed}"
            tuned = tuned_label(fraction, seed, options)
            tunes = options.tune_seconds > 0 and seed in options.tune_seeds and fraction > 0
            if name in rows and (not tunes or tuned in rows):
                continue
            config = best(options.device, dense_fraction=fraction, seed=seed)
            row, pruned = session.prune(name, config, seed)
            if tunes:
                tune(session, tuned, pruned, row["dense_fraction"], options)
        name = f"25 %, without correct, seed {seed}"
        if name not in rows and options.device != "cpu":
            session.prune(name, best(options.device, correct=False, seed=seed), seed)
    seed = options.seeds[0]
    others = (
        ("k_shards 2", {"k_shards": 2}),
        ("uniform", {"strategy": "uniform"}),
        ("without fp8", {"fp8": False}),
        ("without the mask search", {"admm_steps": 0}),
    )
    for note, change in others:
        name = f"25 %, {note}, seed {seed}"
        if name not in rows:
            session.prune(name, best(options.device, **change, seed=seed), seed)


def tune(session: Session, name: str, pruned, dense_fraction: float, options) -> None:
    """Fine-tune as many steps as fit the time."""
    student = make_student(pruned)
    config = FinetuneConfig(
        minutes=options.tune_seconds / 60, batch=options.batch, lr=options.lr, warmup=40,
        splice=options.splice, noise=options.noise,
        interpolation=options.interpolation,
    )  # fmt: skip
    begin = time.monotonic()
    report = finetune(student, session.model, session.training(), config)
    steps = report.config.steps
    row = {
        "tune_seconds": round(time.monotonic() - begin, 1),
        "steps": steps,
        "tokens": report.tokens,
        "train_kl": [round(x, 4) for x in report.losses[:: max(1, steps // 20)]],
        "dense_fraction": dense_fraction,
        "config": {"fp8": True},
        "finetune_config": report.config.to_json(),
    }
    session.keep(name, row, finish_student(student).to(session.device))


def show(rows: dict, options) -> None:
    """Means over seeds against the targets; of fine-tunes, those that `options` ask for."""
    print(f"\n{'dense':>8} {'one-shot':>9} {'target':>7} {'fine-tuned':>11} {'target':>7}")
    for fraction, (shot, tuned) in sorted(TARGETS.items()):
        cells = []
        for tunes in (False, True):
            names = [
                tuned_label(fraction, seed, options) if tunes else f"{label(fraction)}, seed {seed}"
                for seed in options.seeds
            ]
            found = [rows[name]["test"]["r"] for name in names if name in rows]
            cells.append(f"{sum(found) / len(found):.3f} ({len(found)})" if found else "-")
        print(f"{fraction:8.1%} {cells[0]:>9} {shot:7.2f} {cells[1]:>11} {tuned or '-':>7}")


def main() -> None:
    options = parse()
    session = open_session(options)
    fill(session, options)
    show(session.results["rows"], options)


if __name__ == "__main__":
    main()
