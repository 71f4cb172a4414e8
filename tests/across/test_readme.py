"""README.md and docs/ keep their promises: every block of Python runs as it stands.

A block that imports is a program of its own: it gets a fresh namespace and an empty
folder, and a warning is an error as everywhere in the tests. One that imports nothing
goes on where the block before it on the page ended. A block of text right behind one of
Python is what that prints. What a page takes from examples/, ```{.python} in front, is
run by test_examples.py.
"""

import ast
import inspect
import json
import re
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import jax
import numpy as np
import pytest

import jaxprune
from tests.support.printed import assert_prints

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
# Installed by the extra `test` or by the user, not by the package itself.
OPTIONAL = {"equinox", "keras", "sklearn", "tunix"}
# Of the extra `clients`.
CLIENTS = {"keras", "tunix"}

_TEXT = README.read_text()
_BLOCK = re.compile(
    r"^```python[^\n]*\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def _imported(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def _programs():
    """Name ("page:line") to the page and the (line, source, text) of one run."""
    programs = {}
    for page in PAGES:
        text, blocks = page.read_text(), None
        for found in _BLOCK.finditer(text):
            line = text.count("\n", 0, found.start(1)) + 1
            if _imported(found[1]):
                blocks = []
                programs[f"{page.relative_to(ROOT)}:{line}"] = page, blocks
            assert blocks is not None, f"{page}:{line}: nothing is imported before"
            blocks.append((line, found[1], found[2]))
    return programs


PROGRAMS = _programs()
SOURCES = [source for _, blocks in PROGRAMS.values() for _, source, _ in blocks]


def _modules(where):
    return set().union(*(_imported(source) for _, source, _ in PROGRAMS[where][1]))


def _by_page(where):
    # README's are of the default suite, those of docs/ of the full one.
    marks = [] if where.startswith("README") else [pytest.mark.full]
    if CLIENTS & _modules(where):  # whose own warnings are no matter of ours
        marks += [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
    return pytest.param(where, marks=marks, id=where)


@pytest.mark.parametrize("where", [_by_page(where) for where in PROGRAMS])
def test_every_block_runs_as_it_stands(where, tmp_path, monkeypatch, capsys):
    page, blocks = PROGRAMS[where]
    modules = _modules(where)
    for module in modules:
        if module in OPTIONAL and not find_spec(module):
            pytest.skip(f"needs {module}")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    # Their layers add vectors to batches as NumPy does.
    ranks = "allow" if CLIENTS & modules else "raise"
    for line, source, text in blocks:
        # Empty lines in front, so that a traceback names the page's own line.
        program = compile("\n" * (line - 1) + source, str(page), "exec")
        with jax.numpy_rank_promotion(ranks):
            exec(program, names)
        printed = capsys.readouterr().out
        if text is not None:
            assert_prints(printed, text)


def test_the_first_block_prints_what_its_comments_say(capsys, tmp_path, monkeypatch):
    source = SOURCES[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(source, str(README), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    comments = re.findall(r"# (\w+ \d[\d. %]*)$", source, re.MULTILINE)
    assert [line.split()[0] for line in printed] == [c.split()[0] for c in comments]
    for line, comment in zip(printed, comments, strict=True):
        assert_prints(line, comment)


def losses_of_the_first_block(capsys, *changes):
    """Name to the losses that README's first block prints, some words replaced."""
    source = SOURCES[0]
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    exec(compile(source, str(README), "exec"), {"__name__": "__main__"})
    lines = (line.split() for line in capsys.readouterr().out.splitlines())
    return {name: [float(loss) for loss in losses] for name, *losses in lines}


@pytest.mark.full
@pytest.mark.parametrize("seed", [10, 20])
def test_with_other_seeds_the_first_block_says_the_same(seed, capsys):
    seeds = ("key(0)", f"key({seed})"), ("key(1)", f"key({seed + 1})")
    losses = losses_of_the_first_block(capsys, *seeds)
    criteria = "magnitude", "averaged_weight", "preconditioned_magnitude"
    for stage in range(2):  # pruned, retrained
        assert min(criteria, key=lambda name: losses[name][stage]) == criteria[-1]
    less = losses_of_the_first_block(capsys, *seeds, ("0.9", "0.6"))
    for name in criteria:
        np.testing.assert_allclose(less[name], less["dense"] * 2, atol=0.06)


def test_there_are_blocks_for_each_kind_of_model():
    imported = set().union(*(_imported(source) for source in SOURCES))
    assert {"jaxprune", "optax", "flax", "equinox"} <= imported


def test_readme_can_be_read_in_one_sitting():
    assert len(_TEXT.splitlines()) <= 140


def test_no_block_is_exempt_from_running():
    assert not any("no-run" in page.read_text() for page in PAGES)


def test_every_public_function_and_class_is_in_the_reference():
    pages = [*(ROOT / "docs" / "reference").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    public = [getattr(jaxprune, name) for name in jaxprune.__all__]
    public += [getattr(jaxprune.scores, name) for name in jaxprune.scores.__all__]
    names = {
        f"{each.__module__}.{each.__qualname__}"
        for each in public
        if not inspect.ismodule(each)
    }
    assert names - shown == set()


@pytest.mark.parametrize(
    "command", ["python -m experiments.scaled_down_llm", "python -m pytest"]
)
def test_a_newcomers_commands_are_there(command):
    assert command in _TEXT


def test_the_container_runs_the_commands_of_readme():
    commands = re.findall(r"^python3 -m venv .*$", _TEXT, re.MULTILINE)
    assert len(commands) == 2
    steps = (ROOT / ".devcontainer" / "Dockerfile").read_text()
    for command in commands:
        environment, install, run = command.split(" && ")
        assert f"\nRUN {environment} && {install}\n" in steps
        assert run in steps.splitlines()[-1]


def test_the_notebook_is_what_the_page_of_digits_gives():
    # Its cells are the page's blocks, which run above, one after the other.
    written = run_path(str(ROOT / "docs" / "hooks" / "notebook.py"))
    page = written["PAGE"].read_text()
    text = written["NOTEBOOK"].read_text()
    assert text == written["notebook"](page)
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    blocks = PROGRAMS[next(name for name in PROGRAMS if "/digits.md:" in name)][1]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources == [source.strip() for _, source, _ in blocks]


def test_a_formula_becomes_mathml_and_an_unknown_command_ends_the_build():
    pytest.importorskip("latex2mathml")
    on_page_content = run_path(str(ROOT / "docs/hooks/formulas.py"))["on_page_content"]
    page = r'<p>as <span class="arithmatex">\(a &lt; b\)</span>, so</p>'
    page += r'<div class="arithmatex">\[%s\]</div>'
    shown = on_page_content(page % r"\frac{a}{b}")
    assert re.sub("<[^>]+>", "", shown) == "as a&#x0003C;b, soab"
    assert 'display="block"><mrow><mfrac>' in shown
    with pytest.raises(ValueError, match=r"has no \\wrong of"):
        on_page_content(page % r"\wrong{a}")


WRITTEN = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "digits.ipynb",
    *(ROOT / name / "README.md" for name in ("examples", "experiments", "benchmarks")),
]


def test_links_into_the_checkout_lead_somewhere():
    link = re.compile(r'\]\((?!\w+:|#)([^)#\s]+)|src(?:set)?="(?!\w+:)([^"]+)"')
    broken = [
        (page.name, target)
        for page in WRITTEN
        for target in map("".join, link.findall(page.read_text()))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_the_tests_that_the_docs_name_exist():
    files = [*(ROOT / "tests").rglob("test_*.py")]
    known = {path.stem for path in files}
    for path in files:
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    pages = [*WRITTEN, *(ROOT / "docs" / "results" / "records").iterdir()]
    named = {
        (page.name, name)
        for page in pages
        for name in re.findall(r"\btest_\w+", page.read_text())
    }
    assert {pair for pair in named if pair[1] not in known} == set()
    paths = {
        (page.name, path)
        for page in pages
        for path in re.findall(r"\btests/[\w/]+\.py", page.read_text())
    }
    assert {pair for pair in paths if not (ROOT / pair[1]).exists()} == set()
