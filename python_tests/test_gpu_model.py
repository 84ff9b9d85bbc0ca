# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels' own source, run on a model of the hardware (gpu_model), without a GPU: bitwise
results for every config, and a failure for every fault that is put into the SM100 kernel. That the
SM90 kernels, which have run on the hardware, are right on it too is what speaks for the model."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from gpu_model import build
from gpu_model.mutations import ALL, EQUIVALENT, MUTATIONS, Mutation

ARCHS = ("sm100", "sm90")
PROBLEMS = 11  # of each config, problem.cpp
TIMEOUT = 300
REASON = build.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def configs(arch: str) -> list[str]:
    lines = (build.CSRC / "heuristics" / f"{arch}_instances.def").read_text().splitlines()
    return [line[9:].split(",")[0].strip() for line in lines if line.startswith("INSTANCE(")]


def execute(program: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [program, *words], capture_output=True, text=True, check=False, timeout=TIMEOUT
    )


class Common(NamedTuple):
    """What all programs share: objects that see no header of the product, and those that do."""

    precompiled: Path
    machine: list[Path]
    product: list[Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gpu_model")


@pytest.fixture(scope="module")
def common(folder) -> Common:
    model = build.Model(folder / "common")
    model.precompiled = model.precompile()
    return Common(model.precompiled, model.machine_objects(), model.product_objects())


@pytest.fixture(scope="module")
def programs(folder, common) -> dict[str, Path]:
    def one(arch: str) -> Path:
        model = build.Model(folder / arch, precompiled=common.precompiled)
        objects = [*common.machine, *common.product, model.kernels(arch)]
        return model.link(f"run_{arch}", objects)

    with ThreadPoolExecutor(build.jobs()) as pool:
        return dict(zip(ARCHS, pool.map(one, ARCHS), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_programs_have_every_config(programs, arch):
    names = execute(programs[arch], "--list").stdout.split()
    assert list(dict.fromkeys(name.split(":")[0] for name in names)) == configs(arch)


def check_bitwise(program: Path, config: str, *words: str) -> int:
    done = execute(program, "--config", config, *words)
    assert done.returncode == 0, done.stdout.splitlines()[-1] + done.stderr
    return done.stdout.count("ok  ")


@pytest.mark.parametrize("config", configs("sm100"))
def test_sm100_is_bitwise_right(programs, config):
    # What is under way proceeds late, early or by chance.
    assert check_bitwise(programs["sm100"], config) == 3 * PROBLEMS


@pytest.mark.parametrize("config", configs("sm90"))
def test_sm90_is_bitwise_right(programs, config):
    # Once or, with whole tiles and with cut ones, twice.
    assert check_bitwise(programs["sm90"], config, "--pace", "random") in (PROBLEMS, 2 * PROBLEMS)


# --- mutations -----------------------------------------------------------------------------------


def mutated_file(mutation: Mutation, overlay: Path) -> None:
    text = (build.CSRC / mutation.file).read_text()
    assert text.count(mutation.old) == 1, f"{mutation.name}: found {text.count(mutation.old)} times"
    target = overlay / mutation.file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text.replace(mutation.old, mutation.new))


def run_mutant(mutation: Mutation, folder: Path, common: Common) -> tuple[int, str]:
    """Exit code and last line of the model with that fault; -1 where it does not compile."""
    overlay = folder / "overlay"
    mutated_file(mutation, overlay)
    model = build.Model(folder / "objects", overlay, common.precompiled)
    try:
        product = common.product
        if mutation.file.startswith(("heuristics/", "format/")):
            product = model.product_objects()
        kernels = model.kernels("sm100", (mutation.config,))
        program = model.link("run", [*common.machine, *product, kernels])
    except RuntimeError as problem:
        return -1, str(problem)
    done = execute(program)
    return done.returncode, (done.stdout.splitlines() or [done.stderr])[-1]


@pytest.fixture(scope="module")
def outcomes(folder, common) -> dict[str, tuple[int, str]]:
    def one(numbered: tuple[int, Mutation]) -> tuple[str, tuple[int, str]]:
        number, mutation = numbered
        return mutation.name, run_mutant(mutation, folder / f"mutant{number}", common)

    with ThreadPoolExecutor(build.jobs()) as pool:
        return dict(pool.map(one, enumerate(ALL)))


def test_there_are_enough_mutations():
    names = [m.name for m in ALL]
    assert len(set(names)) == len(names)
    assert len(MUTATIONS) >= 30


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_model_notices(outcomes, mutation):
    code, line = outcomes[mutation.name]
    assert code == 1, line
    assert line.startswith("FAIL"), line


@pytest.mark.parametrize("mutation", EQUIVALENT, ids=lambda m: m.name)
def test_equivalent_mutations_are_right(outcomes, mutation):
    code, line = outcomes[mutation.name]
    assert code == 0, line
