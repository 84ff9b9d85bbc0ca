# SPDX-License-Identifier: Apache-2.0
"""Our pruner beside what else could be done, in one run and one table.

    python bench/quality/baselines.py --device cuda
    python bench/quality/baselines.py --device cpu --layers 2 --calibration 8 --test 4

Masks alone (magnitude, Wanda), SparseGPT 2:4, other choices of the dense columns, and a pattern
that keeps 6 of 8 everywhere against the hybrid of equal bytes. Rows already in the output stay.
"""

from __future__ import annotations

import argparse
import time

from relaxed import STRETCHED_BYTES, TIGHT_BYTES, equal_fraction, prune_relaxed
from session import SETTINGS, Session, add_options, open_session
from variants import PLAIN

from spense_kernels.prune import PruneConfig, shallow_clone

TIGHT, STRETCHED = equal_fraction(TIGHT_BYTES), equal_fraction(STRETCHED_BYTES)


def plain(**changes) -> PruneConfig:
    return PruneConfig(**{**PLAIN, **changes})


def ours(**changes) -> PruneConfig:
    return PruneConfig(**{**SETTINGS, **changes})


# Rows of plain statistics first: two kinds of them do not fit beside each other.
ROWS: dict[str, PruneConfig] = {
    "magnitude 2:4": plain(dense_fraction=0.0, method="magnitude"),
    "wanda 2:4": plain(dense_fraction=0.0, method="wanda"),
    "wanda 25 %": plain(method="wanda"),
    "sparsegpt, random columns 25 %": plain(score="random"),
    "sparsegpt, magnitude columns 25 %": plain(score="magnitude"),
    "sparsegpt, wanda columns 25 %": plain(),
    f"sparsegpt, wanda columns {TIGHT:.1%}": plain(dense_fraction=TIGHT),
    f"sparsegpt, wanda columns {STRETCHED:.1%}": plain(dense_fraction=STRETCHED),
    "ours 2:4": ours(dense_fraction=0.0),
    "ours 25 %": ours(),
    "ours, random columns 25 %": ours(strategy="uniform", score="random"),
    "ours, magnitude columns 25 %": ours(strategy="uniform", score="magnitude"),
    "ours, uniform 25 %": ours(strategy="uniform"),
    f"ours {TIGHT:.1%}": ours(dense_fraction=TIGHT),
    f"ours {TIGHT:.1%}, no fp8": ours(dense_fraction=TIGHT, fp8=False),
    f"ours {STRETCHED:.1%}, no fp8": ours(dense_fraction=STRETCHED, fp8=False),
}
# 6 of 8, with the statistics of one of the rows above and what of its settings applies.
RELAXED: dict[str, PruneConfig] = {
    "6:8 sparsegpt": plain(dense_fraction=0.0),
    "6:8 token weights, sinks, refit": ours(dense_fraction=0.0, fp8=False),
}


def relaxed(session: Session, name: str, config: PruneConfig) -> None:
    statistics = session.statistics(0, config)
    target = shallow_clone(session.model)
    begin = time.monotonic()
    prune_relaxed(target, statistics, session.calibration(0).numel(), config, session.device)
    row = {
        "prune_seconds": round(time.monotonic() - begin, 1),
        "bytes_a_weight": {"tight": TIGHT_BYTES, "as 2:4 groups": STRETCHED_BYTES},
        "equal_fractions": {"tight": TIGHT, "as 2:4 groups": STRETCHED},
        "kept_fraction": 0.75,
        "config": config.to_json(),
    }
    session.keep(name, row, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "bench/results/quality_baselines.json")
    parser.add_argument("--only", nargs="*", default=None, help="beginnings of names of rows")
    options = parser.parse_args()
    session = open_session(options)
    session.ends()
    plan = {**ROWS, **RELAXED}
    # By statistics, plain ones first, so that each kind is collected once.
    for name in sorted(plan, key=lambda name: plan[name].token_weighting != "none"):
        wanted = options.only is None or name.startswith(tuple(options.only))
        if name in session.results["rows"] or not wanted:
            continue
        if name in RELAXED:
            relaxed(session, name, RELAXED[name])
        else:
            session.prune(name, ROWS[name], 0)


if __name__ == "__main__":
    main()
