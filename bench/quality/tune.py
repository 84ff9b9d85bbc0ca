# SPDX-License-Identifier: Apache-2.0
"""Settings of the fine-tune beside each other, on validation pages that are not in its text.

    python bench/quality/tune.py --device cuda --calibration 320 --validation 48
    python bench/quality/tune.py --device cuda --settings base "lr 1e-4" --share 0/2

One model is pruned once; each setting tunes a copy of it. Points between the start and the end (see
FinetuneConfig.interpolation) are measured beside, from the same run. With --share I/N the run takes
every Nth setting, for as many GPUs.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from corpus import hold_out, training_windows
from session import Session, add_options, open_session
from targets import best, label

from spense_kernels.finetune import FinetuneConfig, finetune, make_student, student_layers

# By name: how FinetuneConfig differs, with "times" as many steps beside.
SETTINGS = {
    "base": {},
    "lr 1e-4": {"lr": 1e-4},
    "lr_end 0.5": {"lr_end": 0.5},
    "lr 7e-5": {"lr": 7e-5},
    "steps x0.6": {"times": 0.6},
    "lr 1e-4, lr_end 0.5": {"lr": 1e-4, "lr_end": 0.5},
    "lr 3e-4, lr_end 0.5": {"lr": 3e-4, "lr_end": 0.5},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "bench/results/quality_tune.json")
    parser.add_argument("--fraction", type=float, default=0.5, help="dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--interpolations", type=float, nargs="*", default=[0.85])
    parser.add_argument("--share", default="0/1", help="I/N: every Nth setting from I on")
    return parser.parse_args()


def fill(session: Session, options) -> None:
    session.pools, session.windows["validation"] = hold_out(session.pools, options.validation)
    session.ends()
    first, step = (int(part) for part in options.share.split("/"))
    config = best(options.device, dense_fraction=options.fraction, seed=options.seed)
    start = f"{label(options.fraction)}, seed {options.seed}"
    row, pruned = session.prune(start, config, options.seed)
    student = make_student(pruned)
    known = {"dense_fraction": row["dense_fraction"], "config": {"fp8": True}}
    for setting in options.settings[first::step]:
        name = f"{start}, {setting}, {options.steps} steps"
        if name not in session.results["rows"]:
            tune(session, name, student, known, dict(SETTINGS[setting]), options)


def tune(session: Session, name: str, student, known: dict, changes: dict, options) -> None:
    """Tune a copy of the student and measure it, as FP8 is in its forward pass already."""
    steps = round(options.steps * changes.pop("times", 1))
    windows = training_windows(session.pools)
    config = FinetuneConfig(
        **{"steps": steps, "batch": 16, "lr": 1.5e-4, "warmup": 40, "splice": 4, **changes}
    )
    tuned = copy.deepcopy(student)
    weights = [layer.weight for layer in student_layers(tuned).values()]
    starts = [layer.weight.detach() for layer in student_layers(student).values()]
    begin = time.monotonic()
    report = finetune(tuned, session.model, windows, config)
    found = {
        **known,
        "tune_seconds": round(time.monotonic() - begin, 1),
        "steps": steps,
        "tokens": report.tokens,
        "train_kl": [round(x, 4) for x in report.losses[:: max(1, steps // 20)]],
        "finetune_config": config.to_json(),
        "training_windows": len(windows),
    }
    session.keep(name, found, tuned)
    print(f"  {found['tune_seconds']} s, KL {found['train_kl'][-3:]}", flush=True)
    ends = [weight.detach().clone() for weight in weights]
    for share in options.interpolations:
        with torch.no_grad():
            for weight, first, end in zip(weights, starts, ends, strict=True):
                weight.copy_(first.lerp(end, share))
        session.keep(f"{name}, interpolation {share:g}", dict(known), tuned)


def main() -> None:
    options = parse()
    fill(open_session(options), options)


if __name__ == "__main__":
    main()
