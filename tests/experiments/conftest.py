"""Runs of the experiments are of a model that compiles in a fraction of the time."""

import runpy
import sys
from collections.abc import Iterator

import pytest

from experiments import gpt
from experiments.report import page
from tests.support.tiny_job import SMALL
from tests.support.tiny_run import MODULE


@pytest.fixture(scope="module", autouse=True)
def small_preset() -> Iterator[None]:
    """The preset "cpu" is `SMALL`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpt.PRESETS, "cpu", SMALL)
        yield


@pytest.fixture
def numbers_alone(monkeypatch) -> None:
    """No report is written: it is a fifth of so small a run, and not looked at."""
    monkeypatch.setattr(page, "write", lambda results, directory, report: "")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m experiments.scaled_down_llm` without the process's start."""

    def execute(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [MODULE, *arguments])
            patch.delitem(sys.modules, MODULE)
            try:
                runpy.run_module(MODULE, run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code
        printed = capsys.readouterr()
        # A text given to sys.exit is printed by the interpreter, as status 1.
        errors = printed.err + (status if isinstance(status, str) else "")
        return (1 if isinstance(status, str) else status), printed.out, errors

    return execute
