# SPDX-License-Identifier: Apache-2.0
"""What the first statistics and prune of a process take, beside the second.

    python bench/quality/cold.py --device cuda --calibration 320 --validation 48

Writes and prints seconds by phase, and prints lines of the pruner where a sampling thread found it:
those that the first run takes longer at, and those where the second one spends its time.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter

import torch
from session import SENSITIVITY, add_options, open_session
from targets import best

from spense_kernels.prune import collect_statistics, prune_model, shallow_clone
from spense_kernels.prune.store import write_text

INTERVAL = 0.004  # seconds between two looks
OWN = "spense_kernels/"
WAITS = ("clock.py", "contextlib.py")  # where time of the phase around is waited for


class Sampler:
    """Seconds by innermost line of the package, while `with` it the main thread runs."""

    def __init__(self):
        self.seconds: Counter = Counter()
        self._main, self._stop = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(INTERVAL):
            place = _place(sys._current_frames()[self._main])
            now = time.monotonic()
            self.seconds[place] += now - before
            before = now


def _place(frame) -> str:
    leaf = ""
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        if OWN in name and not name.endswith(WAITS):
            where = f"{name.rpartition(OWN)[2]}:{frame.f_lineno} {code.co_name}"
            return f"{where}{' <- ' + leaf if leaf else ''}"
        if OWN not in name and not name.endswith(WAITS):
            leaf = leaf or f"{name.rpartition('/')[2]} {code.co_name}"
        frame = frame.f_back
    return leaf


def once(session, options, seed: int) -> tuple[dict[str, float], Counter]:
    """Statistics and a prune; seconds by phase and by line."""
    config = best(options.device, dense_fraction=options.fraction, seed=seed)
    if session.device != "cpu":
        config = config.replace(**SENSITIVITY)
    calibration = session.calibration(seed)
    with Sampler() as sampler:
        begin = time.monotonic()
        statistics = collect_statistics(session.model, calibration, config, device=session.device)
        middle = time.monotonic()
        report = prune_model(
            shallow_clone(session.model),
            calibration,
            config,
            statistics=statistics,
            device=session.device,
            layers_at_once=1 if session.device == "cpu" else len(statistics.layers),
        )
        if session.device != "cpu":
            torch.cuda.synchronize()
        end = time.monotonic()
    seconds = {"all": end - begin, "collect": middle - begin, "prune": end - middle}
    return seconds | statistics.seconds | report.phases, sampler.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, "bench/results/quality_cold.json")
    parser.add_argument("--fraction", type=float, default=0.25, help="dense")
    parser.add_argument("--lines", type=int, default=30, help="to print")
    options = parser.parse_args()
    session = open_session(options)
    result = {key: session.results[key] for key in ("setup", "machine", "commit")}
    (cold, cold_lines), (warm, warm_lines) = (once(session, options, seed) for seed in (0, 1))
    seconds = {
        name: {key: round(value, 2) for key, value in found.items()}
        for name, found in (("first", cold), ("second", warm))
    }
    result |= {"dense_fraction": options.fraction, "seconds": seconds}
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(f"{'phase':20} {'first':>7} {'second':>7}")
    for name, seconds in sorted(cold.items(), key=lambda x: -x[1]):
        print(f"{name:20} {seconds:7.2f} {warm.get(name, 0.0):7.2f}")
    more = Counter({name: s - warm_lines[name] for name, s in cold_lines.items()})
    for title, found in (("longer in the first", more), ("of the second", warm_lines)):
        print(f"\nseconds {title}")
        for name, seconds in found.most_common(options.lines):
            print(f"{seconds:7.2f}  {name}")


if __name__ == "__main__":
    main()
