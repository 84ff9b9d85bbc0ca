# SPDX-License-Identifier: Apache-2.0
"""The `quantization_config` of a checkpoint's config.json: schema, strict parsing, writing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from spense_kernels.errors import CheckpointError

QUANT_METHOD = "spense"
VERSION = 1
ACTIVATION_SCHEME = "dynamic_per_token"
NOTE = (
    "Weights are in the spense format: without `import spense_kernels` and its load_checkpoint() "
    "a generic loader ignores them and leaves those layers random."
)


@dataclass(frozen=True)
class ModuleEntry:
    """One converted linear layer: shape [n, k], K shards, whether it has a bias."""

    n: int
    k: int
    k_shards: int
    bias: bool


@dataclass(frozen=True)
class SpenseConfig:
    """What a checkpoint says about itself.

    Attributes:
        modules: name -> ModuleEntry of every converted layer.
        modules_to_not_convert: names of the linear layers that were left as they are.
        provenance: JSON object: method, settings, calibration, seed, versions.
    """

    modules: dict[str, ModuleEntry]
    modules_to_not_convert: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that goes into config.json under `quantization_config`."""
        return {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "activation_scheme": ACTIVATION_SCHEME,
            "note": NOTE,
            "modules": {name: vars(entry) for name, entry in self.modules.items()},
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: Any) -> SpenseConfig:
        """Parses and checks; raises CheckpointError that names the key."""
        _want(data, dict, "quantization_config")
        method = data.get("quant_method")
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"quantization_config.quant_method: expected {QUANT_METHOD!r}, got {method!r}"
            )
        version = data.get("version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise CheckpointError(
                f"quantization_config.version: expected an integer >= 1, got {version!r}"
            )
        if version != VERSION:
            raise CheckpointError(
                f"quantization_config.version: this spense_kernels reads version {VERSION}, the "
                f"checkpoint has version {version}; a newer spense_kernels may read it"
            )
        scheme = data.get("activation_scheme")
        if scheme != ACTIVATION_SCHEME:
            raise CheckpointError(
                f"quantization_config.activation_scheme: expected {ACTIVATION_SCHEME!r}, "
                f"got {scheme!r}"
            )
        known = cls(modules={}).to_dict()
        _only(data, known.keys(), "quantization_config")
        modules = _want(data.get("modules"), dict, "quantization_config.modules")
        skipped = data.get("modules_to_not_convert", [])
        _want(skipped, list, "quantization_config.modules_to_not_convert")
        for name in skipped:
            _want(name, str, "quantization_config.modules_to_not_convert[...]")
        provenance = data.get("provenance", {})
        _want(provenance, dict, "quantization_config.provenance")
        entries = {name: _entry(name, value) for name, value in modules.items()}
        if not entries:
            raise CheckpointError("quantization_config.modules: expected at least one, got none")
        return cls(entries, skipped, provenance)


def check_json(value: Any, where: str) -> Any:
    """`value` as it comes back from JSON; raises CheckpointError when it is not plain JSON."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as fault:
        raise CheckpointError(f"{where}: expected plain JSON values: {fault}") from fault


def _entry(name: str, value: Any) -> ModuleEntry:
    where = f"quantization_config.modules[{name!r}]"
    _want(value, dict, where)
    _only(value, ModuleEntry.__dataclass_fields__.keys(), where)
    for key in ("n", "k", "k_shards"):
        number = value.get(key)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise CheckpointError(f"{where}.{key}: expected an integer >= 1, got {number!r}")
    _want(value.get("bias"), bool, f"{where}.bias")
    return ModuleEntry(**value)


def _want(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"{where}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _only(data: dict, known, where: str) -> None:
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise CheckpointError(f"{where}: unknown key(s) {', '.join(unknown)}")
