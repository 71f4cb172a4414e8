"""A refusal is one sentence without a full stop: the rule, the value, the way out.

The tables lie beside the tests of their folders (tests/support/refusals.py); what is
raised nowhere but in the source is read there.
"""

import ast
import importlib
from pathlib import Path

import pytest

from tests.support.refusals import faults

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted((ROOT / "tests").rglob("refused_*.py"))
SOURCES = sorted((ROOT / "jaxprune").rglob("*.py"))


def _rows():
    """("folder: what is wrong", row) of every table."""
    for path in TABLES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        folder = ".".join(path.parent.relative_to(ROOT / "tests").parts)
        for name, row in importlib.import_module(module).REFUSED.items():
            yield f"{folder}: {name}", row


ROWS = dict(_rows())


@pytest.mark.parametrize("name", ROWS)
def test_it_is_refused_in_one_sentence(name):
    row = ROWS[name]
    with pytest.raises(row.error, match=row.says) as raised:
        row.call()
    assert type(raised.value) is row.error
    assert faults(str(raised.value)) == []


def _text(node):
    """A message as far as the source has it, with {} for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or "{}") + (_text(node.right) or "{}")
    return None


RULES = {"Rule": 1, "within": 3}  # argument: the sentence


def sentences(source):
    """(line, message) of each exception and rule of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            messages = node.exc.args[:1]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in RULES:
            # Then a hint, where there is one: the way out.
            messages = node.args[RULES[ast.unparse(node.func)] :][:2]
        else:
            continue
        for text in filter(None, map(_text, messages)):
            yield node.lineno, text


def test_no_error_of_the_source_ends_with_a_full_stop():
    wrong = {
        (path, line): text
        for path in SOURCES
        for line, text in sentences(path.read_text())
        if {*faults(text)} - {"it says no rule", "it is empty"}
    }
    assert wrong == {}


def test_a_sentence_that_is_none_is_found():
    assert faults("rank must be positive, got 0; give rank=1") == []
    assert faults("Rank must be positive.") == ["it ends with a full stop"]
    assert faults("rank must be positive. Give rank=1") == [
        "it is more than a sentence"
    ]
    assert faults("rank\nis 0") == ["it is more than a line"]
    assert faults("bad rank: 0") == ["it says no rule"]
    rule = 'rules = [Rule("a", "a needs b.", "give b.")]'
    assert [text for _, text in sentences(rule)] == ["a needs b.", "give b."]
    assert [*sentences('raise ValueError(f"a {b} c" + d)')] == [(1, "a {} c{}")]
