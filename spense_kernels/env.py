# SPDX-License-Identifier: Apache-2.0
"""What is installed and what would run: the facts behind `spense env`."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from spense_kernels import _load

# Environment variables that the project reads, each with the place that reads it.
VARIABLES = {
    "SPENSE_CUDA_ARCHS": "build: GPU architectures, such as 90a;100a, or none (cmake/find_cuda.py)",
    "SPENSE_REQUIRE_CUDA": "build: 1 makes a build without CUDA an error (cmake/find_cuda.py)",
    "SPENSE_NVCC": "build: the nvcc to use (cmake/find_cuda.py)",
    "SPENSE_BUILD_JOBS": "build: compilers at a time, 2 unless set (setup.py)",
    "SPENSE_CACHE": "demo: folder of the assembled model file (spense_kernels/models)",
}


def cpu_name() -> str:
    """The processor's name as the system gives it, else the machine type."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_configs() -> list[str] | None:
    """CPU configurations of hybrid_gemm that run here, best first; None without the host module."""
    try:
        from spense_kernels import _C
    except ImportError:
        return None
    return list(_C.cpu.gemm_configs())


def gpus() -> list[dict]:
    """Name, architecture and memory of each CUDA device that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": device.name,
                "arch": f"{device.major}{device.minor}",
                "memory_bytes": device.total_memory,
                "multiprocessors": device.multi_processor_count,
            }
        )
    return found


def backends() -> dict[str, str]:
    """For cpu and cuda, what hybrid_gemm would run on, or why it would not run."""
    configs = cpu_configs()
    cpu = f"runs {configs[0]}; has {', '.join(configs)}" if configs else "runs"
    reason = _load.why_no_cuda()
    if reason is None:
        built = [arch.rstrip("af") for arch in _load.build_info()["archs"]]
        present = gpus()
        if not present:
            reason = "no CUDA device here"
        elif not any(gpu["arch"] in built for gpu in present):
            archs = ", ".join(sorted({gpu["arch"] for gpu in present}))
            reason = f"built for {', '.join(built)}, but the device is {archs}"
    return {"cpu": cpu, "cuda": "runs" if reason is None else f"does not run: {reason}"}


def versions(*packages: str) -> dict[str, str]:
    """Of Python, of this build, which need not be installed, and of installed packages."""
    ours = {"python": platform.python_version(), "spense-kernels": _load.build_info()["version"]}
    return ours | {name: version(name) for name in packages}


def collect() -> dict:
    """All facts, ready for JSON: package, build, python, torch, system, cpu, gpus, backends."""
    from spense_kernels import __version__

    build = dict(_load.build_info())
    build["kernels"] = {arch: len(names) for arch, names in build["kernels"].items()}
    libraries = sorted(_load.LIBRARY_FOLDER.glob("*.so"))
    return {
        "spense_kernels": __version__,
        "build": build,
        "libraries": {path.name: path.stat().st_size for path in libraries},
        "python": platform.python_version(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "system": platform.platform(),
        "cpu": {"name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpus": gpus(),
        "backends": backends(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def report(facts: dict) -> str:
    """`collect()` as aligned lines of text."""
    build, cpu = facts["build"], facts["cpu"]
    archs = ", ".join(f"{a} ({n} kernels)" for a, n in build["kernels"].items())
    rows = [
        ("spense_kernels", facts["spense_kernels"]),
        (
            "built with",
            f"{build['compiler']}, torch {build['torch']} headers, "
            f"for torch >= {build['torch_target']}",
        ),
        (
            "CUDA archs",
            f"{archs}, CUDA {build['cuda']}" if archs else f"none: {build.get('no_cuda_because')}",
        ),
        (
            "libraries",
            ", ".join(
                f"{name} {size / 2**20:.1f} MiB" for name, size in facts["libraries"].items()
            ),
        ),
        ("python", facts["python"]),
        ("torch", f"{facts['torch']['version']}, CUDA {facts['torch']['cuda'] or 'none'}"),
        ("system", facts["system"]),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads"),
    ]
    rows += [
        ("GPU", f"{gpu['name']}, sm_{gpu['arch']}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
        for gpu in facts["gpus"]
    ]
    rows += [(f"on {device}", text) for device, text in facts["backends"].items()]
    rows += [(name, value) for name, value in facts["variables"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
