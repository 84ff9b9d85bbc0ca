# SPDX-License-Identifier: Apache-2.0
"""The arrows between folders, file sizes, and what must not stand in any file."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from spense_kernels import env

ROOT = Path(__file__).parents[1]
MAX_LINES = 400

# Which folders of csrc/ a folder may include; itself always.
CSRC_ARROWS = {
    "core": set(),
    "device": {"core"},
    "format": {"core"},
    "heuristics": {"core", "format"},
    "cpu": {"core", "format", "heuristics"},
    "cuda": {"core", "format", "heuristics", "device", "sm90", "sm100"},
    "sm90": {"core", "format", "heuristics", "device"},
    "sm100": {"core", "format", "heuristics", "device"},
    "bindings": {"core", "format", "heuristics", "cpu"},
    "torch": {"core", "format", "heuristics", "cpu", "cuda"},
}
# Which modules of spense_kernels a module may import.
BASE = {"errors", "layout", "_load", "_fake", "ops", "env"}
WEIGHTS = BASE | {"format", "quant"}
FUSED = WEIGHTS | {"linear", "fusion", "neighbours"}
MODELS = FUSED | {"checkpoint", "models", "evaluate", "progress"}
PYTHON_ARROWS = {
    "errors": set(),
    "layout": set(),
    "progress": set(),
    "_load": {"errors"},
    "_fake": {"layout"},
    "ops": {"_fake", "_load", "errors"},
    "env": {"_load"},
    "cost": BASE | {"format"},
    "quant": {"errors", "layout", "format", "ops"},
    "format": BASE | {"quant"},
    "linear": WEIGHTS,
    "fusion": WEIGHTS | {"linear"},
    "neighbours": WEIGHTS | {"linear", "fusion"},
    "checkpoint": FUSED,
    "models": MODELS - {"evaluate"},
    "evaluate": MODELS,
    "prune": MODELS,
    "finetune": MODELS | {"prune"},
    "hf": MODELS | {"prune"},
    "vllm": WEIGHTS | {"checkpoint"},
    "_register": set(),
    "testing": MODELS,
    "demo": MODELS | {"prune"},
    "report": MODELS | {"prune", "demo", "cost"},
    "cli": MODELS | {"prune", "finetune", "demo", "report", "cost"},
}


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, committed or about to be."""
    command = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "--"]
    done = subprocess.run([*command, *patterns], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def code_files() -> list[Path]:
    suffixes = ("*.py", "*.h", "*.cpp", "*.cu", "*.cuh", "*.cmake", "*.in", "*.def")
    return tracked(*suffixes)


def test_csrc_includes_follow_the_arrows():
    wrong = []
    for path in tracked("csrc/*.h", "csrc/*.cpp", "csrc/*.cu", "csrc/*.cuh", "csrc/*.in"):
        folder = path.relative_to(ROOT / "csrc").parts[0]
        for target in re.findall(r'#include "([a-z0-9_]+)/', path.read_text()):
            if target != folder and target not in CSRC_ARROWS[folder]:
                wrong.append(f"{path.relative_to(ROOT)} includes {target}/")
    assert wrong == []


def test_torch_headers_stay_in_csrc_torch():
    heads = re.compile(r"#include [<\"](torch/(?!checks)|ATen/|c10/|Python\.h)")
    wrong = [
        str(path.relative_to(ROOT))
        for path in tracked("csrc/*.h", "csrc/*.cpp", "csrc/*.cu", "csrc/*.cuh")
        if path.parent.name != "torch" and heads.search(path.read_text())
    ]
    assert wrong == []


def test_plain_folders_know_no_cuda():
    wrong = [
        str(path.relative_to(ROOT))
        for path in tracked("csrc/core/*", "csrc/format/*", "csrc/cpu/*", "csrc/heuristics/*")
        if re.search(r"#include [<\"](cuda|cute/|cutlass/)", path.read_text())
    ]
    assert wrong == []


def imported_modules(path: Path) -> set[str]:
    """First-level modules of spense_kernels that a file imports at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
            if node.module == "spense_kernels":
                names = [f"spense_kernels.{alias.name}" for alias in node.names]
        parts = (name.split(".") for name in names)
        found |= {p[1] for p in parts if p[0] == "spense_kernels" and len(p) > 1}
    return found - {"__version__", "_C"}


def test_python_imports_follow_the_arrows():
    wrong = []
    package = ROOT / "spense_kernels"
    for path in tracked("spense_kernels/*.py"):
        module = path.relative_to(package).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        allowed = PYTHON_ARROWS[module] | {module}
        wrong += [
            f"{path.relative_to(ROOT)} imports {target}"
            for target in sorted(imported_modules(path) - allowed)
        ]
    assert wrong == []


def test_only_packed_weights_call_ops_from_format():
    wrong = [
        path.name
        for path in tracked("spense_kernels/format/*.py")
        if "ops" in imported_modules(path) and path.name != "packed.py"
    ]
    assert wrong == []


def test_run_time_does_not_need_the_host_module():
    users = [
        path.relative_to(ROOT).as_posix()
        for path in tracked("spense_kernels/*.py")
        if re.search(r"import _C\b|spense_kernels\._C\b", path.read_text())
    ]
    # env.py can do without it; cost.py plans a prune. No forward pass needs either.
    assert users == ["spense_kernels/cost.py", "spense_kernels/env.py"]


def test_no_file_is_too_long():
    long = {}
    for path in [*code_files(), *tracked("Makefile", "*.md", ".ci/run")]:
        lines = len(path.read_text().splitlines())
        if lines > (150 if path == ROOT / "setup.py" else MAX_LINES):
            long[str(path.relative_to(ROOT))] = lines
    assert long == {}


def test_every_source_names_its_licence():
    wrong = [
        str(path.relative_to(ROOT))
        for path in code_files()
        if path.read_text().strip()
        and "SPDX-License-Identifier: Apache-2.0" not in path.read_text()[:200]
    ]
    assert wrong == []


def test_environment_variables_are_listed():
    read = re.compile(
        r"(?:environ(?:\.get|\.setdefault|\.pop)?[\[(]|getenv\()\s*[\"'](SPENSE_[A-Z_]+)"
    )
    used = {
        name
        for path in [*tracked("spense_kernels/*.py", "cmake/*.py", "csrc/*"), ROOT / "setup.py"]
        for name in read.findall(path.read_text(errors="replace"))
    }
    assert used <= set(env.VARIABLES), "missing in spense_kernels/env.py"
    readme = (ROOT / "README.md").read_text()
    assert [name for name in env.VARIABLES if f"`{name}`" not in readme] == []


def test_no_machine_paths():
    # Written apart, so that this file does not find itself.
    folders = "|".join(["wor" + "k", "roo" + "t", "hom" + "e", "tm" + "p", "opt/" + "dev"])
    pattern = re.compile(rf"(?:^|[ '\"=(`])/(?:{folders})/")
    wrong = []
    for path in [*code_files(), *tracked("*.md", "*.toml", "Makefile", ".ci/*", "*.json", "*.txt")]:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert wrong == []


def test_links_of_pages_lead_somewhere_and_every_picture_is_shown():
    pages = tracked("*.md")
    linked = {
        (page.parent / link).resolve()
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text(encoding="utf-8"))
    }
    assert [str(path) for path in linked if not path.exists()] == []
    pictures = {path.resolve() for path in (ROOT / "docs" / "images").iterdir()}
    assert pictures - linked == set()
    assert set((ROOT / "docs").glob("*.md")) - linked == set()
