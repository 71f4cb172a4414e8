"""The project's own source is held to the aims of `benchmarks.house`."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks import house

# What is read is the source, whichever Python reads it.
pytestmark = pytest.mark.one_python

PACKAGE = house.PARTS["package"].files()
# What is no noun phrase: "seed: of the rounding" says whose it is and not what it is.
NO_NOUN = {"of", "as", "for", "to", "by", "in", "from", "given"}
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*):\s*(.*)$", re.DOTALL)
MOST_NAMESAKES = 3

HAND_COUNTED = '''# Licence of somebody, at the head: no comment on the code.
"""A docstring
of two lines."""

import os


def read(path, *, own=None):  # a comment beside code
    """One line."""
    # a comment of its own
    if path is None:
        raise ValueError(
            "path must be given"
        )
    found = os.stat(path)
    rules = [excludes("mesh", "refine", "no")]
    return found, rules, own


def _hidden(a, b, c):
    return a
'''


def test_figures_are_those_counted_by_hand():
    module = house.Module(HAND_COUNTED)
    assert len(module.code) == 10
    assert module.comments == 2
    assert len(module.raising()) == 4
    names = ["path", "own", "found", "rules", "a", "b", "c"]
    assert sorted(module.names()) == sorted(names)
    assert [module.body(function) for function in module.functions()] == [7, 1]
    assert module.pairs() == 1


def test_a_function_is_known_by_its_body_without_comments_and_docstrings():
    source = 'def f():\n    """Doc."""\n    # why\n\n    return 1\n'
    module = house.Module(source)
    assert module.body(module.functions()[0]) == 1


@pytest.mark.parametrize(
    ("figures", "missed"),
    [
        ({"words": 4.1}, ["core: words 4.1, at most 4"]),
        ({"comments": 5.9}, ["core: comments 5.9, at least 6"]),
        ({"words": 4.0, "comments": 6.0, "most_args": 10}, []),
        ({"pairs": 11}, ["core: pairs 11, at most 10"]),
    ],
)
def test_a_figure_over_its_aim_is_named(figures, missed):
    good = house.Figures(100, 0.0, 0.0, 9.0, 3, 5, 20, 40, 0, 0)
    assert house.misses({"core": good._replace(**figures)}) == missed


@pytest.mark.full
@pytest.mark.parametrize("part", ["core", "lm", "experiments", "benchmarks"])
def test_names_say_what_a_value_is(part):
    (aim,) = (aim for aim in house.AIMS if aim.figure == "words")
    assert aim.miss(house.measure_part(house.PARTS[part])) == ""


def entries(docstring: str) -> list[tuple[str, str]]:
    """The entries of a docstring's section `Args:`, each a name and its text."""
    lines = docstring.splitlines()
    if "Args:" not in (stripped := [line.strip() for line in lines]):
        return []
    start = stripped.index("Args:")
    depth = len(lines[start]) - len(lines[start].lstrip())
    found: list[str] = []
    for line in lines[start + 1 :]:
        if not line.strip():
            break
        inside = len(line) - len(line.lstrip()) - depth
        if inside <= 2 and ENTRY.match(line.strip()):
            found.append(line.strip())
        else:  # an entry goes on
            found[-1] += f" {line.strip()}"
    return [ENTRY.match(entry).groups() for entry in found]


def without_noun(source: str) -> list[str]:
    """The entries of all sections `Args:` that do not begin with a noun phrase."""
    nodes = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bad = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, nodes):
            continue
        for name, text in entries(ast.get_docstring(node) or ""):
            if not text or text.split()[0].rstrip(",;:.").lower() in NO_NOUN:
                bad.append(f"{getattr(node, 'name', 'module')}({name}): {text}")
    return bad


def test_an_entry_that_names_nothing_is_seen():
    source = '''def f(a, b, c, d):
    """Does it.

    Args:
      a: rng seed of the rounding.
      b: of the rounding,
        in words.
      c:
      **d: as of `g`.

    Returns:
      of: no entry.
    """
'''
    assert without_noun(source) == [
        "f(b): of the rounding, in words.",
        "f(c): ",
        "f(**d): as of `g`.",
    ]


@pytest.mark.parametrize(
    "path", PACKAGE, ids=lambda path: str(path.relative_to(house.ROOT))
)
def test_arguments_are_described_by_what_they_are(path: Path):
    assert without_noun(path.read_text("utf-8")) == []


def test_functions_of_modules_have_names_of_their_own():
    assert house.namesakes(PACKAGE, MOST_NAMESAKES + 1) == {}


def test_functions_that_are_called_by_name_are_no_namesakes(tmp_path, monkeypatch):
    monkeypatch.setattr(house, "ROOT", tmp_path)
    sources = {
        f"{house.FAMILIES}/a.py": "def _fields(): ...\n",
        f"{house.COMMANDS}/b.py": "def run(): ...\ndef main(): ...\n",
        "jaxprune/c.py": "def run(): ...\ndef __dir__(): ...\nasync def cut(): ...\n",
        "jaxprune/d.py": "def cut(): ...\nclass A:\n    def cut(self): ...\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    files = [tmp_path / name for name in sources]
    assert house.namesakes(files, 1) == {
        "run": ["jaxprune/c.py"],
        "cut": ["jaxprune/c.py", "jaxprune/d.py"],
    }
    assert list(house.namesakes(files, 2)) == ["cut"]


@pytest.mark.full
def test_the_command_prints_a_row_for_each_part_and_checks(monkeypatch, capsys):
    benchmarks = {"benchmarks": house.PARTS["benchmarks"]}
    monkeypatch.setattr(house, "PARTS", benchmarks)
    house.main(house.Config())
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["part", "code", "words"]
    assert row.split()[0] == "benchmarks"
    monkeypatch.setattr(house, "AIMS", (house.Aim("code", most=1),))
    with pytest.raises(SystemExit, match=r"benchmarks: code .* at most 1"):
        house.main(house.Config(check=True))
