# SPDX-License-Identifier: Apache-2.0
"""Tells transformers about our checkpoints as soon as, and only if, transformers can load models.

transformers has no entry point for quantization methods, and importing the module that holds its
tables takes seconds that users of the ops alone should not pay. So `install` registers at once
where that module is loaded already; otherwise it leaves a finder on `sys.meta_path` that waits for
this one module, registers right after its import, and goes away.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings

TABLES = "transformers.quantizers.auto"


def install() -> None:
    """Registers now or when transformers loads its tables; again is harmless."""
    if TABLES in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    try:
        # Registers at its end; where it is what made transformers load, it is on its way there.
        importlib.import_module("spense_kernels.hf")
    except Exception as fault:
        # Raising here would break transformers for every other model.
        warnings.warn(
            f"spense_kernels: this transformers cannot load spense checkpoints: {fault}; "
            "spense_kernels.load_checkpoint() may",
            stacklevel=2,
        )


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the other finders find TABLES and adds a step to its execution."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != TABLES:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in list(sys.meta_path):
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def then_register(module, execute=execute):
                    execute(module)
                    _register()

                spec.loader.exec_module = then_register
                return spec
        return None
