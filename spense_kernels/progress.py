# SPDX-License-Identifier: Apache-2.0
"""Progress bars on stderr, with the time that is left."""

from __future__ import annotations

import sys

_FORMAT = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]"


def bar(total: int, what: str, indent: str = "  "):
    """A tqdm bar over `total` steps; use as a context manager and call .update(n).

    On a terminal it redraws in place; in a log it prints a line every 15 seconds at most.
    """
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=indent + what,
        bar_format=_FORMAT,
        file=sys.stderr,
        mininterval=0.2 if on_terminal else 15.0,
        miniters=1,
        ncols=None if on_terminal else 90,
        ascii=None if on_terminal else True,
        leave=True,
    )


class Bars:
    """One bar a stage, for functions that report start(stage, total), advance(count), finish()."""

    def __init__(self, indent: str = "  "):
        self.indent = indent
        self._bar = None

    def start(self, stage: str, total: int) -> None:
        self.finish()
        self._bar = bar(total, stage, self.indent)

    def advance(self, count: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.finish()
