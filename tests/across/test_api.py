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

FUNCTIONS = [
    "weightings.exponential",
    "weightings.power",
    "weightings.uniform",
    "contrib.admm",
    "calibrate",
    "contrib.calibrate_gradients",
    "get_importance",
    "gradual",
    "grow.gradient",
    "grow.random",
    "keep_masks",
    "contrib.lora",
    "contrib.scale_by_density",
    "masks.apply",
    "masks.combine",
    "masks.get",
    "masks.make",
    "masks.overlap",
    "masks.pack",
    "masks.replace",
    "masks.unpack",
    "metrics",
    "pack",
    "prune",
    "prune_trained",
    "schedules.constant",
    "schedules.cubic",
    "schedules.linear",
    "schedules.once",
    "scores.averaged_magnitude",
    "scores.averaged_weight",
    "scores.magnitude",
    "scores.obd",
    "scores.random",
    "scores.taylor",
    "scores.threshold",
    "scores.preconditioned_magnitude",
    "shrink",
    "sparsity",
    "contrib.state_shardings",
    "straight_through",
    "trace",
    "track_gradients",
    "track_importance",
    "allocation.parse",
    "passes.chain",
    "tree.named_leaves",
    "axis_groups",
    "masks.above",
    "patterns.parse",
    "tree.excluding",
    "tree.explain",
    "tree.names",
    "tree.prunable",
]
CLASSES = [
    "Axes",
    "AxisGroups",
    "Importance",
    "LazyArray",
    "PackResult",
    "PruneResult",
    "ShrinkResult",
    "passes.Pass",
    "passes.Prune",
    "passes.alps",
    "passes.correct",
    "passes.magnitude",
    "passes.quantize",
    "passes.refine",
    "passes.ria",
    "passes.sparsegpt",
    "passes.wanda",
    "patterns.Block",
    "patterns.Channel",
    "patterns.NM",
    "patterns.PerOutput",
    "patterns.Unstructured",
    "allocation.ERK",
    "allocation.Global",
    "allocation.OWL",
    "allocation.PerMatrix",
    "allocation.Ranked",
    "allocation.Layer",
]
# The modules whose names are public.
NAMESPACES = [
    *("allocation", "contrib", "grow", "low_bit", "masks", "patterns", "schedules"),
    *("scores", "tree", "weightings"),
]
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


def _get(name):
    found = jaxprune
    for part in name.split("."):
        found = getattr(found, part)
    return found


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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_arguments_result_and_an_example_for_doctest(name):
    function = _get(name)
    owed = ["Args", "Returns", "Example"]
    if not inspect.signature(function).parameters:
        owed.remove("Args")
    doc = inspect.getdoc(function) or ""
    written = re.findall(r"^(Args|Returns|Example)s?:$", doc, re.MULTILINE)
    assert written == owed
    assert doctest.DocTestParser().get_examples(doc)


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_says_what_it_is(name):
    assert inspect.isclass(_get(name))
    assert inspect.getdoc(_get(name))


FILES = sorted((ROOT / "jaxprune").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_definition_is_documented(path):
    owed = {node.name: _missing_sections(node) for node in _public_definitions(path)}
    assert {name: missing for name, missing in owed.items() if missing} == {}


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
    for name in {name.split(".")[0] for name in FUNCTIONS + CLASSES}:
        assert name in names


def test_what_is_shown_is_what_is_meant():
    assert dir(jaxprune) == sorted([*jaxprune.__all__, "__version__"])
    assert sorted(jaxprune.__all__) == jaxprune.__all__
    called = {n for n in jaxprune.__all__ if callable(getattr(jaxprune, n))}
    assert called <= {*FUNCTIONS, *CLASSES}


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_namespace_shows_what_is_meant_and_all_of_it_is_documented(name):
    namespace = _get(name)
    assert dir(namespace) == sorted(namespace.__all__)
    for public in namespace.__all__:
        value = getattr(namespace, public)
        assert inspect.getdoc(value)
        assert f"::: {value.__module__}.{public}\n" in REFERENCE


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
