# SPDX-License-Identifier: Apache-2.0
"""The linear layers that the sweep times, and how they are named on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A weight [n, k]; `group` is the model it belongs to."""

    group: str
    name: str
    n: int
    k: int

    @property
    def label(self) -> str:
        return f"{self.group}.{self.name}" if self.group else self.name


def _model(group: str, **layers: tuple[int, int]) -> tuple[Layer, ...]:
    return tuple(Layer(group, name, *shape) for name, shape in layers.items())


# Fused projections, as inference engines run them.
MODELS = {
    "qwen3-32b": _model(
        "qwen3-32b", qkv=(10240, 5120), o=(5120, 8192), gate_up=(51200, 5120), down=(5120, 25600)
    ),
    "seed-oss-36b": _model(
        "seed-oss-36b",
        qkv=(12288, 5120),
        o=(5120, 10240),
        gate_up=(55296, 5120),
        down=(5120, 27648),
    ),
}
TOKENS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
HUNGRY_TOKENS = 1024  # from here on clocks fall, which slows all runs of a problem

# Shapes that a fit of the cost model leaves out by default. HELD_OUT has been part of some fits
# all the same, UNSEEN never: bench/refit.py's judge is what it has not seen.
HELD_OUT = [(7168, 2048), (2112, 7168), (28672, 8192), (6144, 4096)]
HELD_OUT += [(4096, 14336), (18432, 7168), (3072, 8192), (7168, 4608)]
UNSEEN = [(11008, 4096), (4096, 11008), (8192, 8192), (14336, 4096)]


@dataclass(frozen=True)
class Grid:
    """A set of problems under a name."""

    layers: list[str]  # as parse_layers takes them
    m: list[int]
    dense: list[float]


GRIDS = {
    # Between the sizes that the targets name, the choice has to be as good.
    "smooth": Grid(
        ["qwen3-32b"],
        [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512],
        [0.0, 0.125, 0.25, 0.375, 0.5],
    ),
    "unseen": Grid([f"{n}x{k}" for n, k in UNSEEN], [1, 3, 24, 48, 96, 200, 768, 3000], [0.25]),
}


def parse_layers(words: list[str]) -> list[tuple[Layer, ...]]:
    """Groups of layers from words: a model, one of its layers (qwen3-32b.o), NxK, or held-out.

    Layers of a model that are named together form one group, in the model's order.
    """
    chosen: dict[str, list[Layer]] = {}
    for word in words:
        if word == "held-out":
            for n, k in HELD_OUT:
                chosen.setdefault(f"{n}x{k}", []).append(Layer("", f"{n}x{k}", n, k))
        elif match := re.fullmatch(r"(\d+)x(\d+)", word):
            chosen.setdefault(word, []).append(Layer("", word, int(match[1]), int(match[2])))
        else:
            model, _, name = word.partition(".")
            found = [x for x in MODELS.get(model, ()) if name in ("", x.name)]
            if not found:
                names = ", ".join(x.label for layers in MODELS.values() for x in layers)
                raise SystemExit(
                    f"--layers: expected {', '.join(MODELS)}, held-out, NxK or one of {names}, "
                    f"got {word}"
                )
            chosen.setdefault(model, []).extend(found)
    return [
        tuple(x for x in MODELS.get(group, layers) if x in layers)
        for group, layers in chosen.items()
    ]


def is_model(layers: tuple[Layer, ...]) -> bool:
    """Whether these are all layers of a model, so that their sum means something."""
    return layers in MODELS.values()
