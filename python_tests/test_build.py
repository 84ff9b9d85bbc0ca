# SPDX-License-Identifier: Apache-2.0
"""What the build made: architectures, symbols of the libraries, and errors of the loader."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spense_kernels import _load, env, ops

ROOT = Path(__file__).parents[1]
OP_LIBRARIES = ("spense_ops_cpu", "spense_ops_cuda")
ALL_LIBRARIES = (*OP_LIBRARIES, "spense_cuda")


def cmake_script(name: str):
    """A module of cmake/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "cmake" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library(name: str) -> Path:
    path = _load.LIBRARY_FOLDER / f"lib{name}.so"
    if not path.is_file():
        assert not _load.build_info()["archs"], f"{path.name} is missing from a CUDA build"
        pytest.skip(f"built without CUDA: {_load.build_info()['no_cuda_because']}")
    return path


def undefined_symbols(path: Path) -> list[str]:
    """Demangled names that the library expects from others."""
    if not shutil.which("nm"):
        pytest.skip("needs nm (binutils)")
    listing = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout
    return [line.split(None, 1)[1] for line in listing.splitlines()]


def exported_symbols(path: Path) -> list[str]:
    if not shutil.which("nm"):
        pytest.skip("needs nm (binutils)")
    listing = subprocess.run(
        ["nm", "-D", "-C", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout
    return [line.split(None, 2)[2] for line in listing.splitlines()]


def test_archs_are_the_requested_ones():
    asked = os.environ.get("SPENSE_CUDA_ARCHS")
    if not asked:
        pytest.skip("SPENSE_CUDA_ARCHS names no request to compare with")
    expected = [] if asked == "none" else asked.split(";")
    assert _load.build_info()["archs"] == expected


def test_every_built_arch_has_kernels_in_the_library():
    kernels = cmake_script("build_info").kernels_by_arch(library("spense_cuda"))
    archs = _load.build_info()["archs"]
    assert sorted(kernels) == sorted(arch.rstrip("af") for arch in archs)
    for arch, names in _load.build_info()["kernels"].items():
        assert names == kernels[arch.rstrip("af")]
        assert any("quantize" in name for name in names), f"{arch} has no quantize kernel"


def test_sm90_has_gemm_kernels():
    library("spense_cuda")
    names = _load.build_info()["kernels"].get("90a")
    if names is None:
        pytest.skip("not built for 90a")
    assert any("gemm" in name for name in names)


@pytest.mark.parametrize("name", OP_LIBRARIES)
def test_op_libraries_use_the_stable_abi_only(name):
    symbols = undefined_symbols(library(name))
    assert any(s.startswith("aoti_torch_") for s in symbols)
    foreign = [s for s in symbols if s.startswith(("Py", "_Py", "c10::", "at::", "torch::"))]
    assert foreign == []


def test_kernel_library_knows_no_torch():
    symbols = undefined_symbols(library("spense_cuda"))
    assert [s for s in symbols if "torch" in s or s.startswith(("Py", "_Py", "c10::"))] == []
    assert [s for s in symbols if s.startswith("cuda")] == [], "the CUDA runtime must be linked in"


@pytest.mark.parametrize("name", ALL_LIBRARIES)
def test_libraries_export_only_our_names(name):
    # Beside those: weak instances from the C++ library and from torch's headers, and the linker's.
    known = ("spense::", "std::", "torch::", "typeinfo ", "vtable ", "guard variable ")
    linker = ("__bss_start", "_edata", "_end")
    symbols = exported_symbols(library(name))
    foreign = [s for s in symbols if not s.startswith(known) and s not in linker]
    assert foreign == []


def test_libraries_ask_for_no_symbol_newer_than_the_target():
    # These four came with torch 2.13; a build that forgets TORCH_TARGET_VERSION needs them.
    newer = ("torch_exception_get_what", "torch_new_stable_ivalue", "torch_delete_stable_ivalue")
    for name in OP_LIBRARIES:
        path = _load.LIBRARY_FOLDER / f"lib{name}.so"
        if path.is_file():
            assert [s for s in undefined_symbols(path) if s.startswith(newer)] == []


def test_missing_library_is_named(tmp_path):
    with pytest.raises(
        ImportError, match=r"libspense_ops_cpu\.so: expected a library, got no such"
    ):
        _load.load_library("spense_ops_cpu", tmp_path)


def test_damaged_library_is_named(tmp_path):
    (tmp_path / "libspense_ops_cpu.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"libspense_ops_cpu\.so: expected a library that loads"):
        _load.load_library("spense_ops_cpu", tmp_path)


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.13.0", "3.0.1"])
def test_torch_new_enough(version):
    _load.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0", "nightly"])
def test_torch_too_old(version):
    with pytest.raises(ImportError, match=rf"torch: expected version >= 2.11, got {version}"):
        _load.check_torch(version)


@pytest.mark.parametrize(
    "again",
    [
        "importlib.reload(spense_kernels.ops)",
        "sys.modules.pop('spense_kernels.ops'); importlib.import_module('spense_kernels.ops')",
        "[sys.modules.pop(n) for n in list(sys.modules) if n.startswith('spense_kernels')]; "
        "gc.collect(); importlib.import_module('spense_kernels')",
    ],
)
def test_importing_twice_is_harmless(again):
    code = (
        "import gc, importlib, sys, torch, spense_kernels.ops\n"
        f"{again}\n"
        "x8, scale = torch.ops.spense.quantize_fp8(torch.ones(2, 16))\n"
        "assert scale.shape == (2,)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_env_reports_the_build():
    facts = env.collect()
    assert facts["build"]["archs"] == _load.build_info()["archs"]
    assert facts["torch"]["version"] == torch.__version__
    text = env.report(facts)
    for arch in facts["build"]["archs"]:
        assert f"{arch} (" in text
    assert facts["build"]["archs"] or "CUDA archs" in text
    assert "libspense_ops_cpu.so" in text
    assert set(facts["backends"]) == {"cpu", "cuda"}


def run_find_cuda(question: str, **variables: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SPENSE_")}
    script = ROOT / "cmake" / "find_cuda.py"
    return subprocess.run(
        [sys.executable, script, question],
        capture_output=True,
        text=True,
        check=False,
        env=clean | variables,
    )


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SPENSE_CUDA_ARCHS": "75"}, "expected a list of 90a, 100a; got '75'"),
        ({"SPENSE_CUDA_ARCHS": "none", "SPENSE_REQUIRE_CUDA": "1"}, "contradict"),
        ({"SPENSE_CUDA_ARCHS": "90a", "SPENSE_NVCC": "/nowhere/nvcc"}, "an nvcc that runs"),
    ],
)
def test_build_requests_that_cannot_be_met_fail(variables, words):
    done = run_find_cuda("--archs", **variables)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stdout == ""


def test_old_nvcc_is_refused(tmp_path):
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.1'\n")
    old.chmod(0o755)
    done = run_find_cuda("--archs", SPENSE_CUDA_ARCHS="90a", SPENSE_NVCC=str(old))
    assert done.returncode == 1
    assert "expected version >= 12.8" in done.stderr


def test_demanded_cuda_without_a_compiler_is_an_error(monkeypatch):
    find_cuda = cmake_script("find_cuda")
    monkeypatch.setattr(find_cuda, "candidates", list)
    monkeypatch.delenv("SPENSE_NVCC", raising=False)
    for variable, value in (("SPENSE_CUDA_ARCHS", "90a"), ("SPENSE_REQUIRE_CUDA", "1")):
        monkeypatch.setenv(variable, value)
    with pytest.raises(
        find_cuda.NotPossible, match=r"CUDA is demanded, but no nvcc >= 12\.8 found"
    ):
        find_cuda.find_archs()


def test_schemas_carry_the_tags_of_compiled_ops():
    for name in ops.SCHEMAS:
        tags = getattr(torch.ops.spense, name).default.tags
        assert torch.Tag.pt2_compliant_tag in tags
        assert torch.Tag.needs_exact_strides in tags
