# SPDX-License-Identifier: Apache-2.0
"""Settings of the fine-tune beside each other, validation windows held out of its text.

    python bench/quality/tune.py --device cuda --calibration 320 --validation 48
    python bench/quality/tune.py --device cuda --settings base resample --share 0/2

One model is pruned once; each setting tunes a copy of it by as many steps. With --share I/N the run
takes every Nth setting, for as many GPUs.
"""

from __future__ import annotations

import argparse
import copy
import time

from corpus import CUTS, training_windows
from session import Session, add_options, open_session
from targets import best, label

from spense_kernels.finetune import FinetuneConfig, finetune, finish_student, make_student

# By name: how FinetuneConfig differs, with "cuts" of the books and "times" as many steps beside.
SETTINGS = {
    "base": {},
    "drawn 0.3": {"resample": 0.3},
    "even books, drawn 0.3": {"resample": 0.3, "cuts": (4, 4)},
    "even books": {"cuts": (4, 4)},
    "drawn 0.6": {"resample": 0.6},
    "lr 1e-4": {"lr": 1e-4},
    "noise 0.1": {"noise": 0.1},
    "drawn 0.3, longer": {"resample": 0.3, "times": 1.6},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "bench/results/quality_tune.json")
    parser.add_argument("--fraction", type=float, default=0.5, help="dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1150)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--share", default="0/1", help="I/N: every Nth setting from I on")
    return parser.parse_args()


def fill(session: Session, options) -> None:
    session.ends()
    first, step = (int(part) for part in options.share.split("/"))
    config = best(options.device, dense_fraction=options.fraction, seed=options.seed)
    start = f"{label(options.fraction)}, seed {options.seed}"
    row, pruned = session.prune(start, config, options.seed)
    student = make_student(pruned).to("cpu")
    for setting in options.settings[first::step]:
        name = f"{start}, {setting}, {options.steps} steps"
        if name in session.results["rows"]:
            continue
        changes = dict(SETTINGS[setting])
        windows = training_windows(
            session.pools, changes.pop("cuts", CUTS), without=session.windows["validation"]
        )
        steps = round(options.steps * changes.pop("times", 1))
        config = FinetuneConfig(
            **{"steps": steps, "batch": 16, "lr": 1.5e-4, "warmup": 40, "splice": 4, **changes}
        )
        tuned = copy.deepcopy(student)
        begin = time.monotonic()
        report = finetune(tuned, session.model, windows, config)
        found = {
            "tune_seconds": round(time.monotonic() - begin, 1),
            "steps": steps,
            "tokens": report.tokens,
            "train_kl": [round(x, 4) for x in report.losses[:: max(1, steps // 20)]],
            "dense_fraction": row["dense_fraction"],
            "config": {"fp8": True},
            "finetune_config": config.to_json(),
            "training_windows": len(windows),
        }
        session.keep(name, found, finish_student(tuned).to(session.device))
        print(f"  {found['tune_seconds']} s, KL {found['train_kl'][-3:]}", flush=True)


def main() -> None:
    options = parse()
    fill(open_session(options), options)


if __name__ == "__main__":
    main()
