# SPDX-License-Identifier: Apache-2.0
"""Which idea helps: one change after another, kept when the validation loss falls.

    python bench/quality/explore.py --device cuda --seconds 300

The test windows are measured beside, and decide nothing.
"""

from __future__ import annotations

import argparse
import time

from session import SETTINGS, add_options, open_session

from spense_kernels.prune import PruneConfig

LEAST = 0.0003  # nats on the validation windows; less is a tie
# (name, changed settings, calibration windows or None for no change), most promising first.
IDEAS = (
    ("320 windows", {}, 320),
    ("shrinkage .03", {"shrinkage": 0.03}, None),
    ("curve refit 8", {"curve_refit_steps": 8}, None),
    ("640 windows", {}, 640),
    ("gradient share .5", {"gradient_share": 0.5}, None),
    ("widths 0 1/4 1", {"widths": (0.0, 0.25, 1.0)}, None),
    ("widths 0 1/4 1/2 3/4 1", {"widths": (0.0, 0.25, 0.5, 0.75, 1.0)}, None),
    ("widths 0 1/8 1/4 1/2 1", {"widths": (0.0, 0.125, 0.25, 0.5, 1.0)}, None),
    ("shrinkage .1", {"shrinkage": 0.1}, None),
    ("mask search 60", {"admm_steps": 60}, None),
    ("64 sequences for the backward pass", {"sensitivity_sequences": 64}, None),
    ("damping .002", {"damping": 0.002}, None),
    ("search 300 x 2048", {"search_rounds": 300, "search_rows": 2048}, None),
    ("refit 40", {"refit_steps": 40}, None),
    ("activation columns", {"score": "activation"}, None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "bench/results/quality_explore.json")
    parser.add_argument("--seconds", type=float, default=300, help="no new idea after that")
    parser.add_argument("--dense-fraction", type=float, default=0.25)
    parser.add_argument("--only", nargs="*", default=None, help="beginnings of names of ideas")
    options = parser.parse_args()
    session = open_session(options, "exploratory: every choice is made on the validation windows")
    session.ends()
    begin = time.monotonic()
    settings, count = {**SETTINGS, "dense_fraction": options.dense_fraction}, options.calibration
    row, _ = session.prune("s0 start", PruneConfig(**settings), 0)
    best, kept = row["validation"]["nll"], []
    for number, (name, change, windows) in enumerate(IDEAS, start=1):
        if options.only is not None and not name.startswith(tuple(options.only)):
            continue
        if time.monotonic() - begin > options.seconds:
            print(f"stopped before {name!r}")
            break
        tried = {**settings, **change}
        row, _ = session.prune(f"s{number} + {name}", PruneConfig(**tried), 0, windows or count)
        if row["validation"]["nll"] < best - LEAST:
            best, settings, count = row["validation"]["nll"], tried, windows or count
            kept.append(name)
            print("   kept", flush=True)
    print("kept:", ", ".join(kept) or "nothing")


if __name__ == "__main__":
    main()
