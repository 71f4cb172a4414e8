"""The command `jaxprune`: prune, evaluate and pack models that lie in directories.

Each subcommand is a frozen dataclass of options with a `run`. Exit codes: 0 done, 1
refused or failed (one sentence on stderr), 2 wrong usage, 130 interrupted.
"""

import functools
import importlib.metadata
import operator
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from jaxprune.arrays.console_progress import to_nowhere
from jaxprune.lm.cli import option_groups, parse
from jaxprune.lm.cli.compact import Compact, Expand
from jaxprune.lm.cli.console import Console
from jaxprune.lm.cli.eval import Evaluate
from jaxprune.lm.cli.inspect import Inspect
from jaxprune.lm.cli.prune import Prune
from jaxprune.lm.cli.sample import Sample
from jaxprune.lm.cli.shrink import Shrink

__all__ = ["main"]

_COMMANDS: dict[str, type[Any]] = {
    "prune": Prune,
    "shrink": Shrink,
    "eval": Evaluate,
    "inspect": Inspect,
    "compact": Compact,
    "expand": Expand,
    "sample": Sample,
}
_ABOUT = (
    "Prunes trained language models in Hugging Face directories.\n\n"
    "For example:\n"
    "  jaxprune inspect MODEL\n"
    "  jaxprune prune MODEL OUT --sparsity 0.5 --calibration prose.txt code.jsonl\n"
    "  jaxprune prune --help          the options of a subcommand\n"
    "  jaxprune --version             the version\n"
    "  jaxprune --tyro-write-completion bash FILE    completion for bash, zsh or fish"
)
# Options are set by their flags alone, and no value is spelled "None".
_STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)

# A RuntimeError is JAX's: no such device, or none of its memory is left.
_REFUSALS = (ValueError, OSError, ImportError, MemoryError, RuntimeError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name; those of the process if left out.

    Returns:
      The exit code.

    Example:
      >>> from jaxprune import cli
      >>> cli.main(["expand", "no-such-file", "out"])
      1
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"jaxprune {importlib.metadata.version('jaxprune')}")
        return 0
    try:
        code = _ran(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        to_nowhere(sys.stdout)  # who reads has seen enough
        return 0


def _ran(arguments: list[str]) -> int:
    """The exit code of a subcommand, of help and of wrong usage."""
    try:
        command = _parsed(arguments)
    except SystemExit as stop:
        code = stop.code or 0  # a text is wrong usage
        return code if isinstance(code, int) else 2
    console = Console(quiet=command.json)
    try:
        console.finish(command.run(console, arguments))
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        console.note("jaxprune: interrupted")
        return 130
    except _REFUSALS as error:
        if command.debug:
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        console.fail(f"jaxprune {arguments[0]}: {parse.spoken(text)}")
        return 1
    return 0


def _parsed(arguments: list[str]) -> Any:
    """The subcommand with its options; leaves the process for help and wrong usage."""
    if arguments and (command := _COMMANDS.get(arguments[0])):
        twin = option_groups.nested(command, whole=True)
        prog = f"jaxprune {arguments[0]}"
        filled = tyro.cli(twin, prog=prog, args=arguments[1:], config=_STYLE)
        return option_groups.flat(command, filled)
    # No subcommand: this ends in a list of them, or in a script for completion.
    twins: list[Any] = [
        Annotated[
            option_groups.nested(command, whole=False), tyro.conf.subcommand(name)
        ]
        for name, command in _COMMANDS.items()
    ]
    any_of_them: Any = functools.reduce(operator.or_, twins)
    return tyro.cli(
        any_of_them,
        prog="jaxprune",
        description=_ABOUT,
        args=arguments,
        config=_STYLE,
    )
