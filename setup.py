# SPDX-License-Identifier: Apache-2.0
"""Hands the native build to CMake (csrc/CMakeLists.txt). What is built is decided in cmake/."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    """The program `name` of this Python's environment, else of PATH."""
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            for candidate in (Path(folder) / "data" / "bin" / name, Path(folder) / "bin" / name):
                if candidate.is_file():
                    return str(candidate)
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if not found:
        raise SystemExit(f"spense_kernels: the build needs {name}: pip install {name}")
    return found


def cuda_requirements() -> list[str]:
    """Header packages that an isolated build must fetch, none for a build without CUDA."""
    query = [sys.executable, str(ROOT / "cmake" / "find_cuda.py"), "--archs"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = (ROOT / "cmake" / "requirements-cuda.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")] if found.stdout.strip() else []


class CMakeBuild(build_ext):
    """Configures, builds and installs all native targets in one CMake run."""

    def run(self) -> None:
        inplace = self.inplace or self.editable_mode
        base = ROOT if inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake, ninja = tool("cmake"), tool("ninja")
        self.call(
            cmake,
            *("-S", ROOT / "csrc", "-B", build, "-G", "Ninja"),
            *("-U", "SPENSE_ARCHS*", "-U", "SPENSE_NVCC*"),  # the environment may have changed
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={base / 'spense_kernels'}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DSPENSE_VERSION={self.distribution.get_version()}",
        )
        self.call(cmake, "--build", build, "--parallel", os.environ.get("SPENSE_BUILD_JOBS", "2"))
        self.call(cmake, "--install", build)

    @staticmethod
    def call(*command: object) -> None:
        words = [str(word) for word in command]
        print("spense_kernels:", " ".join(words), flush=True)
        if subprocess.run(words, check=False).returncode:
            raise SystemExit(f"spense_kernels: this command failed: {' '.join(words)}")


setup(
    # Named so that wheels carry a platform tag; CMake makes it with the libraries.
    ext_modules=[Extension("spense_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=cuda_requirements(),
)
