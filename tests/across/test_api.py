"""The public names: they are there, each says what it does, and importing is cheap."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxprune

ROOT = Path(__file__).resolve().parents[2]
INIT = ROOT / "jaxprune" / "__init__.py"

# The modules whose names are public.
NAMESPACES = [
    *("allocation", "contrib", "grow", "low_bit", "masks", "patterns"),
    *("schedules", "scores", "tree", "weightings"),
]
PUBLIC = {name: getattr(jaxprune, name) for name in jaxprune.__all__}
PUBLIC |= {
    f"{space}.{name}": getattr(PUBLIC[space], name)
    for space in (*NAMESPACES, "passes")
    for name in PUBLIC[space].__all__
}
FUNCTIONS = {name for name, value in PUBLIC.items() if inspect.isfunction(value)}
REFERENCE = "".join(
    path.read_text() for path in sorted((ROOT / "docs" / "reference").glob("*.md"))
)
# Heavy third parties stay out until the module that needs them is imported.
HEAVY = ["flax", "orbax", "tyro", "matplotlib", "torch", "tensorflow_datasets"]
BY_NAME = [
    "lm.cli",
    "lm.measure.perplexity",
    "lm.checkpoints.checkpoint_dir",
    "lm.checkpoints.compact",
    "lm.checkpoints.prune_magnitude",
    "lm.checkpoints.rewrite",
    "lm.models.generate",
    "lm.models.hf",
    "lm.report.pruned_model",
]


def _public_definitions(path):
    """Each public top-level function and class of a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, kinds) and not node.name.startswith("_")
    ]


def _missing_sections(node):
    """What a docstring owes and does not have: a function's, Google's sections."""
    doc = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        return [] if doc else ["a docstring"]
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
    returns = node.returns is not None and ast.unparse(node.returns) != "None"
    owed = {"Args": bool(arguments), "Returns": returns}
    # One line may say it all: "Whether a node stands for a leaf that was left out."
    if "\n" not in doc.strip():
        return [] if doc else ["a docstring"]
    alternatives = {"Args": r"Args", "Returns": r"Returns|Yields"}
    return [
        section
        for section, is_owed in owed.items()
        if is_owed and not re.search(rf"^({alternatives[section]}):$", doc, re.M)
    ]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_public_function_has_arguments_result_and_an_example_for_doctest(name):
    function = PUBLIC[name]
    sections = ["Args", "Returns", "Example"]
    if not inspect.signature(function).parameters:
        sections.remove("Args")
    doc = inspect.getdoc(function) or ""
    assert re.findall(r"^(Args|Returns|Example)s?:$", doc, re.MULTILINE) == sections
    assert doctest.DocTestParser().get_examples(doc)


def test_every_public_definition_is_documented():
    missing = {
        (path, node.name): sections
        for path in sorted((ROOT / "jaxprune").rglob("*.py"))
        for node in _public_definitions(path)
        if (sections := _missing_sections(node))
    }
    assert missing == {}


def test_names_are_exported_once_and_explicitly():
    statements = ast.parse(INIT.read_text()).body
    imports = [node for node in statements if isinstance(node, ast.ImportFrom)]
    aliases = [alias for node in imports for alias in node.names]
    # `jp.tree` is the public word for what is in leaves.py.
    assert {a.name: a.asname for a in aliases if a.asname != a.name} == {
        "leaves": "tree"
    }
    names = [alias.asname for alias in aliases]
    assert len(names) == len(set(names))
    assert {name.split(".")[0] for name in PUBLIC} <= {*names}


def test_dir_lists_the_public_names():
    assert dir(jaxprune) == sorted([*jaxprune.__all__, "__version__"])
    assert sorted(jaxprune.__all__) == jaxprune.__all__


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_namespace_lists_its_public_names_and_the_reference_has_them(name):
    namespace = PUBLIC[name]
    assert dir(namespace) == sorted(namespace.__all__)
    for public in namespace.__all__:
        value = getattr(namespace, public)
        assert inspect.getdoc(value)
        assert f"::: {value.__module__}.{value.__qualname__}\n" in REFERENCE


def test_every_score_is_a_criterion_of_parameters_and_importance():
    for name in jaxprune.scores.__all__:
        names = list(inspect.signature(getattr(jaxprune.scores, name)).parameters)
        assert names[:2] == ["params", "importance"]


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("pyproject.toml", 'version = "{}"'),
        ("kernels/pyproject.toml", 'version = "{}"'),
        ("kernels/jaxprune_kernels/__init__.py", '__version__ = "{}"'),
        ("CITATION.cff", "version: {}"),
        ("CHANGELOG.md", "## [{}]"),
    ],
)
def test_the_version_is_the_same_in_every_file(path, written):
    line = re.escape(written.format(jaxprune.__version__))
    assert re.search(rf"^{line}", (ROOT / path).read_text(), re.MULTILINE)


def test_importing_the_package_imports_nothing_heavy():
    program = (
        f"import sys, jaxprune;print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", BY_NAME)
def test_the_rest_is_imported_by_its_own_name(name):
    assert importlib.import_module(f"jaxprune.{name}").__doc__


def test_the_types_ship():
    assert (INIT.parent / "py.typed").exists()
