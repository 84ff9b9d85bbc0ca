# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the Python side. Ops raise RuntimeError with the same kind of text."""


class SpenseError(ValueError):
    """Base of all; the message names function, argument, what was expected and what came."""


class FormatError(SpenseError):
    """Arrays that do not form a legal hybrid weight or tile stream."""


class CheckpointError(SpenseError):
    """A checkpoint that is incomplete, inconsistent or damaged."""


class PruneError(SpenseError):
    """Pruning cannot go on with this model, calibration or setting."""


class UserError(SpenseError):
    """A mistake on the command line; shown without a traceback."""


def first_line(error: BaseException) -> str:
    """First line of an error's text, or the name of its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
