# SPDX-License-Identifier: Apache-2.0
"""The typer application: its commands, its exit codes and what it does with errors."""

from __future__ import annotations

import typer
from typer.core import TyperGroup

from spense_kernels.cli import commands, guard

HELP = """Hybrid 2:4 sparse + dense FP8 weights for language models: prune, check, run.

\b
Examples:
  spense demo --out demo_out
  spense prune ./Llama-3.2-1B --out ./Llama-3.2-1B-spense --dense-fraction 0.25
  spense eval ./Llama-3.2-1B-spense --json
  spense verify ./Llama-3.2-1B-spense && spense inspect ./Llama-3.2-1B-spense

\b
Exit codes:
  0    done
  1    a check failed, or the work could not be finished (for example a full disk)
  2    an argument or an input cannot be used
  130  interrupted; nothing half written is left

Results go to stdout, progress and messages to stderr. --debug, anywhere, shows the traceback of
an error. Nothing is ever downloaded, and no file is overwritten without --force.
"""

# Options that take one or more values, as in `--text a.txt b.txt`.
LIST_OPTIONS = ("--text", "--calibration", "--prompt", "--set", "--skip", "--report-fractions")


class Group(TyperGroup):
    """Takes --debug anywhere and lets a list option have several values after it."""

    def parse_args(self, ctx, args):
        guard.debug("--debug" in args)
        return super().parse_args(ctx, spread([a for a in args if a != "--debug"]))


def spread(args: list[str]) -> list[str]:
    """`--text a b` becomes `--text a --text b`; values end at the next option."""
    out: list[str] = []
    option, values = None, 0
    for arg in args:
        if arg.startswith("-") and arg != "-":
            option, values = (arg if arg in LIST_OPTIONS else None), 0
        elif option is not None:
            if values:
                out.append(option)
            values += 1
        out.append(arg)
    return out


app = typer.Typer(
    name="spense",
    cls=Group,
    help=HELP,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def root(
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        from spense_kernels import __version__

        typer.echo(f"spense {__version__}")
        raise typer.Exit(0)


for _name, _command in commands.ALL.items():
    app.command(_name)(guard.guarded(_command))


def main() -> None:
    """Entry point of the `spense` script."""
    app(prog_name="spense")
