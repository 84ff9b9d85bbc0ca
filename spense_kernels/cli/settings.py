# SPDX-License-Identifier: Apache-2.0
"""PruneConfig from the options of `spense prune`."""

from __future__ import annotations

import dataclasses

from spense_kernels.errors import UserError
from spense_kernels.prune import PruneConfig


def make_config(options: dict, changes: list[str]) -> PruneConfig:
    """Settings from options (None: the default) and NAME=VALUE words of `--set`.

    Raises UserError for a word that is none, an unknown name, a value of another type, a
    setting given twice, and fp8=false.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for word in changes:
        name, value = _parse(word)
        if name in given:
            raise UserError(f"--set {word}: {name} is given twice")
        given[name] = value
    config = PruneConfig(**given)
    if not config.fp8:
        raise UserError("--set fp8: expected true, for a checkpoint holds FP8 weights")
    return config


def _parse(word: str) -> tuple[str, object]:
    name, equals, text = word.partition("=")
    fields = {f.name: f for f in dataclasses.fields(PruneConfig)}
    if not equals:
        raise UserError(f"--set: expected NAME=VALUE, got {word!r}")
    if name not in fields:
        raise UserError(f"--set: no setting {name!r}; there are {', '.join(sorted(fields))}")
    return name, _value(name, text, fields[name])


def _value(name: str, text: str, field: dataclasses.Field):
    default = field.default
    if isinstance(default, bool):
        known = {"true": True, "false": False}
        if text.lower() not in known:
            raise UserError(f"--set {name}: expected true or false, got {text!r}")
        return known[text.lower()]
    if isinstance(default, str):
        return text
    if isinstance(default, tuple):
        words = [word for word in text.split(",") if word]
        if "float" in str(field.type):
            return tuple(_number(name, word, float) for word in words)
        return tuple(words)
    return _number(name, text, type(default))


def _number(name: str, text: str, kind: type):
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"--set {name}: expected {what}, got {text!r}") from None
