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
from inspect import cleandoc
from typing import Annotated, Any

import tyro

from jaxprune.arrays.console_progress import to_nowhere
from jaxprune.arrays.rules import command_words
from jaxprune.lm.cli.compact import Compact, Expand
from jaxprune.lm.cli.eval import Evaluate
from jaxprune.lm.cli.export import Export
from jaxprune.lm.cli.inspect import Inspect
from jaxprune.lm.cli.sample import Sample
from jaxprune.lm.cli.speed import Speed
from jaxprune.lm.cli.steps import Prune, Recover, Shrink, Trim
from jaxprune.lm.steps.console import Console

__all__ = ["main"]

_COMMANDS: dict[str, type[Any]] = {
    "prune": Prune,
    "shrink": Shrink,
    "trim": Trim,
    "recover": Recover,
    "eval": Evaluate,
    "inspect": Inspect,
    "compact": Compact,
    "expand": Expand,
    "export": Export,
    "sample": Sample,
    "speed": Speed,
}
_ABOUT = (
    "Prunes trained language models in Hugging Face directories.\n\n"
    "For example, with MODEL a directory of config.json and *.safetensors:\n"
    "  jaxprune inspect MODEL\n"
    "  jaxprune prune MODEL OUT --sparsity 0.5 --calibration prose.txt code.jsonl\n"
    "  jaxprune shrink MODEL OUT --ffn 0.25 --calibration prose.txt\n"
    "  jaxprune recover OUT BETTER --teacher MODEL --calibration prose.txt\n"
    "  jaxprune eval OUT --text news.txt\n"
    '  jaxprune sample OUT --prompt "Once upon a time"\n\n'
    "  jaxprune prune --help          the options of a subcommand\n"
    "  jaxprune --version             the version\n"
    "  jaxprune --tyro-write-completion bash FILE    completion for bash, zsh or fish"
)
# Options are set by their flags alone, whatever group they are in, and no value is
# spelled "None".
_STYLE = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.OmitArgPrefixes,
)

# A RuntimeError is JAX's: no such device, or none of its memory is left.
_REFUSALS = (ValueError, OSError, ImportError, MemoryError, RuntimeError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: words without the program's name; those of the process if left out.

    Returns:
      The exit code.

    Example:
      >>> from jaxprune.lm import cli
      >>> cli.main(["expand", "no-such-file", "out"])
      1
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Not an option of tyro, which would list it for each subcommand.
    if words == ["--version"]:
        print(f"jaxprune {importlib.metadata.version('jaxprune')}")
        return 0
    if not words:
        print(_ABOUT, file=sys.stderr)
        return 2
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        to_nowhere(sys.stdout)  # the reader of the pipe has seen enough
        return 0


def _run(words: list[str]) -> int:
    """The exit code of a subcommand, of help and of wrong usage."""
    try:
        command = _parse(words)
    except SystemExit as stop:
        code = stop.code or 0  # a text is wrong usage
        return code if isinstance(code, int) else 2
    except OSError as error:  # a completion script that cannot be written
        print(f"jaxprune: {error}", file=sys.stderr)
        return 1
    # From here on a failure is one sentence, and stdout has a result or nothing.
    console = Console(quiet=command.json)
    try:
        console.finish(command.run(console, words))
    except BrokenPipeError:  # an OSError, but no refusal
        raise
    except KeyboardInterrupt:
        console.note("jaxprune: interrupted")
        return 130
    except _REFUSALS as error:
        if command.debug:
            traceback.print_exc()
        # JAX's errors have several lines.
        sentence = " ".join(command_words(error).split()) or type(error).__name__
        console.fail(f"jaxprune {words[0]}: {sentence}")
        return 1
    return 0


def _parse(words: list[str]) -> Any:
    """The subcommand with its options; leaves the process for help and wrong usage."""
    if words and (command := _COMMANDS.get(words[0])):
        return tyro.cli(
            command,
            prog=f"jaxprune {words[0]}",
            description=f"{_described(command)}\n\nFor example:\n  {command.EXAMPLE}",
            args=words[1:],
            config=_STYLE,
        )
    # No subcommand: this ends in a list of them, or in a script for completion.
    choices: list[Any] = []
    for name, command in _COMMANDS.items():
        summary = _described(command).partition("\n\n")[0]
        choice = tyro.conf.subcommand(name, description=summary)
        choices.append(Annotated[command, choice])
    union: Any = functools.reduce(operator.or_, choices)
    return tyro.cli(
        union, prog="jaxprune", description=_ABOUT, args=words, config=_STYLE
    )


def _described(command: type[Any]) -> str:
    """What a subcommand's docstring says, without the section on its options."""
    text = cleandoc(command.__doc__ or "")
    return text.partition("Attributes:\n")[0].rstrip()
