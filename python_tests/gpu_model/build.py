# SPDX-License-Identifier: Apache-2.0
"""Compiles the model with the kernels' source into a program, with g++ alone.

python_tests/gpu_model/build.py OUT [sm100|sm90]      then: OUT --list; OUT --config NAME
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# Objects that see no header of the kernels, and those that do.
MACHINE = ("machine", "operands", "tensor_core", "wgmma", "leaves", "run")
PRODUCT = ("format/pack", "format/status", "heuristics/cost", "heuristics/gemm", "heuristics/sm100")
PRECOMPILED = "precompiled.h"
FLAGS = ("-std=c++20", "-ffp-contract=off", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE")


def why_not() -> str | None:
    """None where the model can be built and run, else the reason for a skip."""
    if not shutil.which("g++"):
        return "needs g++"
    return None if sys.platform == "linux" else "needs Linux"


def jobs() -> int:
    return max(1, min(4, len(os.sched_getaffinity(0))))


def run(*command: object) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")


class Model:
    """Objects of one build folder; `overlay` holds files that stand before those of csrc."""

    def __init__(self, folder: Path, overlay: Path | None = None, precompiled: Path | None = None):
        self.folder = folder
        self.overlay = overlay
        self.precompiled = precompiled
        folder.mkdir(parents=True, exist_ok=True)

    def precompile(self) -> Path:
        """A header that saves half the time of a kernel's compilation."""
        header = self.folder / PRECOMPILED
        shutil.copy(HERE / PRECOMPILED, header)
        out = f"{header}.gch"
        run("g++", "-O1", *FLAGS, *self.includes(), "-x", "c++-header", header, "-o", out)
        return header

    def includes(self) -> list[object]:
        roots = [*([self.overlay] if self.overlay else []), HERE / "shim", HERE, CSRC]
        return [word for root in roots for word in ("-I", root)]

    def compile(self, source: Path, *defines: str) -> Path:
        out = self.folder / f"{source.parent.name}_{source.stem}.o"
        first = ["-O1", "-include", self.precompiled] if self.precompiled else ["-O3"]
        run("g++", *FLAGS, *first, *self.includes(), *defines, "-c", source, "-o", out)
        return out

    def product_source(self, name: str) -> Path:
        own = self.overlay / f"{name}.cpp" if self.overlay else None
        return own if own and own.is_file() else CSRC / f"{name}.cpp"

    def machine_objects(self) -> list[Path]:
        with ThreadPoolExecutor(jobs()) as pool:
            return list(pool.map(self.compile, [HERE / f"{m}.cpp" for m in MACHINE]))

    def product_objects(self) -> list[Path]:
        sources = [HERE / "problem.cpp", *(self.product_source(p) for p in PRODUCT)]
        with ThreadPoolExecutor(jobs()) as pool:
            return list(pool.map(self.compile, sources))

    def kernels(self, arch: str, configs: tuple[str, ...] = ()) -> Path:
        defines = [f'-DMODEL_CONFIGS="{" ".join(configs)}"'] if configs else []
        return self.compile(HERE / f"run_{arch}.cpp", *defines)

    def link(self, name: str, objects: list[Path]) -> Path:
        program = self.folder / name
        run("g++", *objects, "-o", program)
        return program


def build(folder: Path, arch: str) -> Path:
    model = Model(folder)
    objects = [*model.machine_objects(), *model.product_objects(), model.kernels(arch)]
    return model.link(f"run_{arch}", objects)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    target = Path(sys.argv[1])
    shutil.copy(build(target.with_suffix(".build"), (sys.argv[2:] or ["sm100"])[0]), target)
