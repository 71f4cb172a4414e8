"""What --help says: every option once, in a group, in words; an example that parses."""

import dataclasses
import re
import shlex
import subprocess
import sys
from typing import get_type_hints

import pytest

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm import cli

COMMANDS = cli._COMMANDS


def said(capsys, monkeypatch, *words):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main([*words]) == 0
    return capsys.readouterr().out


def options(command):
    """The names of a command's options, those of its groups too."""
    for name, hint in get_type_hints(command).items():
        if dataclasses.is_dataclass(hint):
            yield from options(hint)
        elif name not in ("EXAMPLE", "passes"):
            yield name


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_is_listed_once_in_words(capsys, monkeypatch, name):
    text = said(capsys, monkeypatch, name, "--help")
    positional = {"model", "models", "out", "file"}
    for option in options(COMMANDS[name]):
        flag = "--" + option.replace("_", "-")
        listed = re.findall(rf"^  {flag}\s", text, re.MULTILINE)
        assert len(listed) == (option not in positional), flag
    assert not re.search(r"None|True|False|\(default: \)|\bSTR\b|\bPATH\b|\{\}", text)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_has_an_example_that_parses(capsys, monkeypatch, name):
    example = COMMANDS[name].EXAMPLE
    assert example in said(capsys, monkeypatch, name, "--help")
    program, *words = shlex.split(example)
    assert program == "jaxprune"
    assert isinstance(cli._parse(words), COMMANDS[name])


def test_options_are_in_groups(capsys, monkeypatch):
    text = said(capsys, monkeypatch, "prune", "--help")
    groups = re.findall(r"^ (.*?) +\n -+ *$", text, re.MULTILINE)
    wanted = [f"{name} options" for name in ("calibration", "model", "pruning")]
    assert groups == ["positional arguments", "options", *wanted]


def test_the_list_of_subcommands_has_a_line_for_each(capsys, monkeypatch):
    text = said(capsys, monkeypatch, "--help")
    for name, command in COMMANDS.items():
        (line,) = re.findall(rf"^ +\W {name} +(.*?) *$", text, re.MULTILINE)
        assert command.__doc__.startswith(line)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete_subcommands_and_options(capsys, monkeypatch, shell):
    text = said(capsys, monkeypatch, "--tyro-print-completion", shell)
    assert all(name in text for name in COMMANDS)
    assert all(option in text for option in ("sparsity", "text-share", "layers"))


def test_a_completion_that_cannot_be_written_is_one_sentence(capsys, tmp_path):
    path = tmp_path / "missing" / "jaxprune"
    assert cli.main(["--tyro-write-completion", "bash", str(path)]) == 1
    error = capsys.readouterr().err
    assert "missing" in error
    assert "Traceback" not in error


@pytest.mark.full
def test_help_does_not_wait_for_what_only_reports_need():
    program = (
        "import sys\nfrom jaxprune.lm import cli\ncli.main(['--help'])\n"
        "print({'matplotlib', 'jinja2', 'tokenizers', 'pyarrow'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        (["prune", "--method"], ["magnitude", "wanda", "ria", "sparsegpt", "alps"]),
        (["prune", "--quantize"], ["int4", "int8"]),
        (["shrink", "--dtype"], ["float32", "bfloat16"]),
        (["recover", "--train"], ["all", "matrices", "norms", "lora"]),
    ],
)
def test_a_wrong_word_lists_the_choices_in_their_order(
    capsys, monkeypatch, words, choices
):
    monkeypatch.setenv("COLUMNS", "200")
    for word in ("another", "None"):
        assert cli.main([words[0], "MODEL", "OUT", words[1], word]) == 2
        assert f"Expected one of {tuple(choices)!r}" in capsys.readouterr().err
    for word in choices:
        command = cli._parse([words[0], "MODEL", "OUT", words[1], word])
        groups = [getattr(command, f.name) for f in dataclasses.fields(command)]
        name = words[1][2:].replace("-", "_")
        assert word in [getattr(group, name, None) for group in groups]
