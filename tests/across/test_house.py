"""The project's own source is held to the aims of `benchmarks.house`."""

import ast
import collections
import re

import pytest

from benchmarks import house

# What is read is the source, whichever Python reads it.
pytestmark = pytest.mark.one_python

PACKAGE = house.PARTS["core"].files() + house.PARTS["lm"].files()
# Not a noun phrase: "seed: of the rounding" says whose it is and not what it is.
NO_NOUN = {"of", "as", "for", "to", "by", "in", "from", "given"}
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*):\s*(.*)$", re.DOTALL)
FAMILIES = "jaxprune/lm/models/hf/families"
COMMANDS = "jaxprune/lm/cli"
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
    rules = [excludes("mesh", "stream", "no")]
    return found, rules, own


def _hidden(a, b, c):
    return a


def check_all(x):  # those of a list
    return x


class Settings(TypedDict):
    one: int
    two: int


def solve(x, **settings: Unpack[Settings]):
    return x
'''


def test_counts_agree_with_counts_by_hand(tmp_path, monkeypatch):
    module = house.Module(HAND_COUNTED)
    assert len(module.code) == 17
    assert module.comments == 3
    assert len(module.refusals()) == 7
    names = [*("path", "own", "found", "rules", "a", "b", "c", "x", "one", "two")]
    assert sorted(module.names()) == sorted([*names, "x", "settings"])
    assert [module.body(function) for function in module.functions()] == [7, 1, 1, 1]
    assert house.typed_dicts([module]) == {"Settings": 2}
    monkeypatch.setattr(house, "ROOT", tmp_path)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "module.py").write_text(HAND_COUNTED)
    figures = house.measure_part(house.Part("part"))
    assert figures.most_args == 3
    assert figures.dialect == round(1000 * 2 / 6, 1)


def test_bodies_are_counted_without_comments_and_docstrings():
    source = 'def f():\n    """Doc."""\n    # why\n\n    return 1\n'
    module = house.Module(source)
    assert module.body(module.functions()[0]) == 1


@pytest.mark.parametrize(
    ("figures", "missed"),
    [
        ({"words": 4.1}, ["core: words 4.1, at most 4"]),
        ({"comments": 5.9}, ["core: comments 5.9, at least 6"]),
        ({"words": 4.0, "comments": 6.0, "most_args": 10}, []),
        ({"code": 11_501}, ["core: code 11501, at most 11500"]),
        ({"refusals": 8.1}, ["core: refusals 8.1, at most 8"]),
    ],
)
def test_a_figure_over_its_aim_is_named(figures, missed, monkeypatch):
    monkeypatch.setattr(house, "PENDING", frozenset())
    good = house.Figures(100, 0.0, 0.0, 9.0, 3, 5, 20, 40, 0)
    assert house.misses({"core": good._replace(**figures)}) == missed


def test_a_pending_aim_is_silent_until_it_is_met(monkeypatch):
    monkeypatch.setattr(house, "PENDING", frozenset(["core words"]))
    good = house.Figures(100, 0.0, 0.0, 9.0, 3, 5, 20, 40, 0)
    assert house.misses({"core": good._replace(words=5.0)}) == []
    (sentence,) = house.misses({"core": good})
    assert sentence.startswith("core: words meets its aim")


@pytest.mark.full
@pytest.mark.parametrize("part", house.PARTS)
def test_figures_meet_their_aims(part):
    assert house.misses({part: house.measure_part(house.PARTS[part])}) == []


def entries(docstring: str) -> list[tuple[str, str]]:
    """The entries of a docstring's section `Args:`, each a name and its text."""
    lines = docstring.splitlines()
    if "Args:" not in (stripped := [line.strip() for line in lines]):
        return []
    start = stripped.index("Args:")
    depth = len(lines[start]) - len(lines[start].lstrip())
    texts: list[str] = []
    for line in lines[start + 1 :]:
        if not line.strip():
            break
        inside = len(line) - len(line.lstrip()) - depth
        if inside <= 2 and ENTRY.match(line.strip()):
            texts.append(line.strip())
        else:  # an entry goes on
            texts[-1] += f" {line.strip()}"
    return [ENTRY.match(entry).groups() for entry in texts]


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


def test_entries_without_a_noun_are_listed():
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


def test_arguments_are_described_by_nouns():
    bad = {path: without_noun(path.read_text("utf-8")) for path in PACKAGE}
    assert {path: entries for path, entries in bad.items() if entries} == {}


def namesakes(files, least: int) -> dict[str, list[str]]:
    """Name to the files of its functions, for names of at least `least` functions.

    Functions that are looked up by their name do not count: `main`, what a subcommand
    runs, those of a family's module, and names between double underscores.
    """
    owners = collections.defaultdict(list)
    for path in files:
        file = path.relative_to(house.ROOT).as_posix()
        for node in ast.parse(path.read_text("utf-8")).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            runs_subcommand = node.name == "run" and file.startswith(f"{COMMANDS}/")
            special = node.name.startswith("__") or node.name == "main"
            if not (runs_subcommand or special or file.startswith(f"{FAMILIES}/")):
                owners[node.name].append(file)
    return {name: paths for name, paths in owners.items() if len(paths) >= least}


def test_functions_of_modules_have_distinct_names():
    assert namesakes(PACKAGE, MOST_NAMESAKES + 1) == {}


def test_functions_that_are_looked_up_by_name_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(house, "ROOT", tmp_path)
    sources = {
        f"{FAMILIES}/a.py": "def _fields(): ...\n",
        f"{COMMANDS}/b.py": "def run(): ...\ndef main(): ...\n",
        "jaxprune/c.py": "def run(): ...\ndef __dir__(): ...\nasync def cut(): ...\n",
        "jaxprune/d.py": "def cut(): ...\nclass A:\n    def cut(self): ...\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    files = [tmp_path / name for name in sources]
    assert namesakes(files, 1) == {
        "run": ["jaxprune/c.py"],
        "cut": ["jaxprune/c.py", "jaxprune/d.py"],
    }
    assert list(namesakes(files, 2)) == ["cut"]


@pytest.mark.full
def test_the_command_prints_a_row_for_each_part_and_checks(monkeypatch, capsys):
    benchmarks = {"benchmarks": house.PARTS["benchmarks"]}
    monkeypatch.setattr(house, "PARTS", benchmarks)
    house.main(house.Config())
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["part", "code", "words"]
    assert row.split()[0] == "benchmarks"
    monkeypatch.setattr(house, "AIMS", (house.Aim("code", most=1),))
    monkeypatch.setattr(house, "PENDING", frozenset())
    with pytest.raises(SystemExit, match=r"benchmarks: code .* at most 1"):
        house.main(house.Config(check=True))
