# SPDX-License-Identifier: Apache-2.0
"""One line for a user's mistake, a traceback only for a bug, and no silent overwrite."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from pathlib import Path

import typer

from spense_kernels.errors import CheckpointError, SpenseError, UserError

OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

_state = {"debug": False}


def debug(on: bool) -> None:
    _state["debug"] = on


def guarded(command):
    """Wrap a command so that its errors become exit codes (see app.HELP)."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as error:
            return _fail(INTERRUPTED, "interrupted; nothing half written is left", error)
        except SpenseError as error:
            return _fail(_code(error), str(error), error)
        except OSError as error:
            return _fail(FAILED, _os_text(error), error)
        except Exception as error:
            if _full_disk(error):
                return _fail(FAILED, f"cannot write: {error}", error)
            raise

    return run


def _code(error: SpenseError) -> int:
    """A write that failed is no mistake of the user's arguments."""
    unwritten = isinstance(error, CheckpointError) and isinstance(error.__cause__, OSError)
    return FAILED if unwritten else MISTAKE


def _fail(code: int, text: str, error: BaseException):
    if _state["debug"]:
        raise error
    typer.echo(f"spense: error: {' '.join(text.split())}", err=True)
    raise typer.Exit(code)


def _os_text(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"no space left on the device{where}; nothing half written is left"
    return f"{error.strerror or error}{where}"


def _full_disk(error: Exception) -> bool:
    """Libraries in Rust and C++ wrap the system's error; the text is what remains of it."""
    text = str(error)
    return any(os.strerror(code) in text for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT))


def new_directory(path: Path, force: bool, option: str = "--out") -> Path:
    """Check, before any work, that a result may be written to this folder."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{option} {path}: a dangling symbolic link")
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path}: exists and is not a folder")
    if path.exists() and any(path.iterdir()) and not force:
        raise UserError(f"{option} {path}: exists and is not empty; pass --force to replace it")
    parent = _existing_parent(path)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: no permission to write in {parent}")
    return path


def check_replaceable(path: Path) -> None:
    """Raise UserError when something other than a spense checkpoint stands at `path`."""
    from spense_kernels.models import is_spense_checkpoint

    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not is_spense_checkpoint(path):
        raise UserError(f"{path}: holds no spense checkpoint, so --force does not replace it")


def need_space(path: Path, size: int) -> None:
    """Raise UserError when the file system of `path` has less than `size` bytes left."""
    free = shutil.disk_usage(_existing_parent(path)).free
    if free < size:
        raise UserError(
            f"--out {path}: needs about {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left"
        )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
