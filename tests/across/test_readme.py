"""README.md keeps its promises: every block of Python runs as it stands.

Each block is a program of its own: it gets a fresh namespace and an empty folder, and
a warning is an error as everywhere in the tests.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
# Installed by the extra `test` or by the user, not by the package itself.
OPTIONAL = {"equinox"}

_TEXT = README.read_text() if README.exists() else ""
_BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = {
    f"line {_TEXT.count(chr(10), 0, found.start(1)) + 1}": found[1]
    for found in _BLOCK.finditer(_TEXT)
}


def _imported(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("where", BLOCKS)
def test_every_block_runs_as_it_stands(where, tmp_path, monkeypatch):
    source = BLOCKS[where]
    for module in _imported(source) & OPTIONAL:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    # Empty lines in front, so that a traceback names README's own line.
    above = "\n" * (int(where.removeprefix("line ")) - 1)
    exec(compile(above + source, str(README), "exec"), {"__name__": "__main__"})


def test_there_are_blocks_for_each_kind_of_model():
    imported = set().union(*map(_imported, BLOCKS.values()))
    assert {"jaxprune", "optax", "flax", "equinox"} <= imported


def test_no_block_is_exempt_from_running():
    assert "no-run" not in _TEXT


@pytest.mark.parametrize(
    "command", ["python -m experiments.scaled_down_llm", "python -m pytest"]
)
def test_a_newcomers_commands_are_there(command):
    assert command in _TEXT


def test_links_into_the_checkout_lead_somewhere():
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", _TEXT)
    targets += re.findall(r'src(?:set)?="(?!\w+:)([^"]+)"', _TEXT)
    assert [target for target in targets if not (ROOT / target).exists()] == []
