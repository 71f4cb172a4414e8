"""The command `jaxprune`: prune, evaluate and pack models that lie in directories.

Each subcommand is a frozen dataclass of options with a `run`. Exit codes: 0 done, 1
refused or failed (one sentence on stderr), 2 wrong usage, 130 interrupted.
"""

import contextlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import tyro

from jaxprune.cli import parse
from jaxprune.cli.compact import Compact, Expand
from jaxprune.cli.console import Console
from jaxprune.cli.eval import Evaluate
from jaxprune.cli.inspect import Inspect
from jaxprune.cli.prune import Prune
from jaxprune.cli.sample import Sample
from jaxprune.cli.shrink import Shrink

__all__ = ["main"]

Command: TypeAlias = (
    Annotated[Prune, tyro.conf.subcommand("prune")]
    | Annotated[Shrink, tyro.conf.subcommand("shrink")]
    | Annotated[Evaluate, tyro.conf.subcommand("eval")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Compact, tyro.conf.subcommand("compact")]
    | Annotated[Expand, tyro.conf.subcommand("expand")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
)

_REFUSALS = (ValueError, OSError, ImportError, MemoryError)


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
        command: Command = tyro.cli(
            Command,  # type: ignore[arg-type]
            prog="jaxprune",
            description="Prunes trained language models in Hugging Face directories. "
            "--version prints the version.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    console = Console(quiet=command.json)
    try:
        console.finish(command.run(console, arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has seen enough; what is still held must go somewhere.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
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
