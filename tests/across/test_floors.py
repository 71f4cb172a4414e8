"""The floors of docs/design.md: folders import only folders below them.

`FLOORS` is the layout: each row is a folder of the package (or a module), from the
ground up, with the third parties that it may use. A folder that is missing from the
table fails here. Inside a folder modules import each other freely, but not in a circle.
"""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# What is read is the source, whichever Python reads it.
pytestmark = pytest.mark.one_python

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "jaxprune"
MOST_LINES = 400
MOST_ENTRIES = 18

EVERYWHERE = {"jax", "numpy", "jaxtyping", "optax"}
FLOORS: dict[str, set[str]] = {
    "arrays": {"tqdm"},
    "typing": set(),
    "leaves": set(),
    "scores": set(),
    "graph": set(),
    "masking": set(),
    "training": set(),
    "structured": {"flax", "equinox"},
    "files": {"ml_dtypes"},
    "posttraining": set(),
    "contrib": set(),
    "torch": {"ml_dtypes", "torch", "torchax"},
    "sparse": {"ml_dtypes"},
    "plot": {"matplotlib"},
    "__init__": set(),
    "lm.checkpoints": {"ml_dtypes"},
    "lm.models": {"flax", "PIL", "jinja2", "tokenizers"},
    "lm.packing": {"flax"},
    "lm.corpora": {"flax", "pyarrow"},
    "lm.measure": {"flax"},
    "lm.recovery": {"flax"},
    "lm.shrinking": {"flax"},
    "lm.vocabulary": {"flax", "tokenizers"},
    "lm.export": {"gguf"},
    "lm.report": {"jinja2", "matplotlib"},
    "lm.steps": {"flax", "tyro"},
    "lm.torch_models": {"torch", "transformers", "PIL"},
    "lm.cli": {"tyro"},
    "lm.model": set(),
    "lm.comparison": set(),
    "lm.facade": set(),
    "lm.__init__": set(),
    "__main__": set(),
}
# The library knows no model, and no file: what these need is on the ground or above.
APART = {
    "lm.models": {"arrays", "typing", "files", "lm.checkpoints"},
    "lm.report": set(),
    "files": {"arrays", "typing"},
    "lm.checkpoints": {"arrays", "typing", "leaves", "scores", "masking", "files"},
}
# Not part of what `import jaxprune` loads.
ON_DEMAND = {"lm"}
TESTS_ONLY = {"torch", "transformers", "chex"}
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "_src"}

FOLDERS = list(FLOORS)
# The folders that experiments share, from the ground up; experiments stand above them.
SHARED_BY_EXPERIMENTS = ["datasets", "gpt", "report", "harness", "tasks"]

MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))
SOURCES = [
    *MODULES,
    *EXPERIMENTS,
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]


def _name(path: Path) -> str:
    """The module's dotted name below the package: "masking.masks", "__init__"."""
    return ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)


def _floor(module: str) -> str:
    """The floor of a module or of a name in it: "masking", "lm.models"."""
    parts = module.split(".")
    wing = ".".join(parts[:2])
    return wing if wing in FLOORS else parts[0]


def _imports(module: str, source: str) -> Iterator[str]:
    """The dotted names that a module imports, `from a import b` as "a.b"."""
    package = [PACKAGE, *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """What a module imports and may not, one sentence each."""
    own = _floor(module)
    if own not in FLOORS:
        return [f"{own} is not in the table of floors; give it its place there"]
    found = []
    for name in _imports(module, source):
        top, *rest = name.split(".")
        if top in sys.stdlib_module_names:
            continue
        if top != PACKAGE:
            if top not in EVERYWHERE | FLOORS[own]:
                found.append(f"{module} imports {name}, which does not belong there")
            continue
        folder = _floor(".".join(rest))
        folder = folder if folder in FLOORS else "__init__"
        if folder == own:
            continue
        if FOLDERS.index(folder) >= FOLDERS.index(own):
            found.append(f"{module} imports {name}, which is not below it")
        elif own in APART and folder not in APART[own]:
            found.append(f"{module} imports {name}, which {own} must not know")
        elif any(part.startswith("_") and part != "__init__" for part in rest):
            found.append(f"{module} imports {name}, which is private to its folder")
    return found


def circles(sources: dict[str, str]) -> list[str]:
    """The modules of a circle of imports, or nothing.

    Args:
      sources: dotted name below the package to source, all of one folder.
    """
    graph = {}
    for module, source in sources.items():
        below = {
            candidate
            for name in _imports(module, source)
            for candidate in sources
            if candidate != module
            and not candidate.endswith("__init__")
            and (name + ".").startswith(f"{PACKAGE}.{candidate}.")
        }
        graph[module] = below
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def climbs(folder: str, source: str) -> list[str]:
    """What a folder that experiments share imports of those that are not below it."""
    below = SHARED_BY_EXPERIMENTS[: SHARED_BY_EXPERIMENTS.index(folder) + 1]
    return [
        name
        for name in _imports("", source)
        if name.startswith("experiments.") and name.split(".")[1] not in below
    ]


@pytest.mark.parametrize("folder", SHARED_BY_EXPERIMENTS)
def test_what_experiments_share_imports_what_is_below_it(folder):
    paths = [p for p in EXPERIMENTS if p.parent == ROOT / "experiments" / folder]
    assert paths
    assert [x for p in paths for x in climbs(folder, p.read_text())] == []
    assert climbs("harness", "from experiments.tasks import language_model")
    assert climbs("report", "def late():\n    from experiments import recovery")


def test_imports_go_down():
    assert [x for p in MODULES for x in violations(_name(p), p.read_text())] == []


@pytest.mark.parametrize("floor", sorted({_floor(_name(path)) for path in MODULES}))
def test_modules_of_a_floor_import_each_other_in_no_circle(floor):
    names = {_name(path): path for path in MODULES if _floor(_name(path)) == floor}
    assert circles({name: path.read_text() for name, path in names.items()}) == []


def test_a_circle_is_found():
    sources = {
        "arrays.topk.a": "from jaxprune.arrays.topk import b",
        "arrays.topk.b": "from jaxprune.arrays.topk.c import number",
        "arrays.topk.c": "from .a import one",
    }
    assert len(circles(sources)) == 4


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("masking.masks", "from jaxprune.training.track import track_importance"),
        ("masking.masks", "from jaxprune import prune"),
        ("masking.masks", "import jaxprune"),
        ("masking.masks", "def late():\n    from jaxprune.lm.report import page"),
        ("masking.masks", "from jaxprune.arrays.topk.thresholds import _count"),
        ("arrays.topk.thresholds", "from ...masking import masks"),
        ("arrays.tree", "from jaxprune.typing import Params"),
        ("lm.models.decoder.model", "from jaxprune import masking"),
        ("lm.models.decoder.model", "from jaxprune.masking import masks"),
        ("lm.models.hf.loading", "from jaxprune.posttraining import passes"),
        ("lm.report.page", "from jaxprune.lm.checkpoints import rewrite"),
        ("masking.masks", "from flax import nnx"),
        ("training.keep_masks", "import orbax.checkpoint as ocp"),
        ("lm.checkpoints.compact", "import matplotlib.pyplot as plt"),
        ("lm.checkpoints.rewrite", "import torch"),
        ("brand_new.module", "import jax"),
    ],
)
def test_an_import_that_climbs_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("typing", "from jaxprune.arrays.axes import Axes"),
        ("masking.masks", "import optax\nfrom jaxprune.arrays.topk import thresholds"),
        ("masking.masks", "from .patterns import NM"),
        (
            "lm.models.hf.loading",
            "from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir",
        ),
        ("lm.report.page", "from jaxprune.lm.report import canvas\nimport matplotlib"),
        (
            "lm.models.decoder.model",
            "from flax import nnx\nfrom jaxtyping import Array",
        ),
        ("__init__", "from jaxprune.masking import masks as masks"),
    ],
)
def test_an_import_that_goes_down_is_allowed(module, source):
    assert violations(module, source) == []


def test_importing_the_package_leaves_models_and_reports_to_their_users():
    source = (ROOT / PACKAGE / "__init__.py").read_text()
    folders = {name.split(".")[1] for name in _imports("__init__", source)}
    assert not folders & ON_DEMAND


def test_the_top_of_the_package_is_one_glance():
    entries = [
        entry
        for entry in (ROOT / PACKAGE).iterdir()
        if not entry.name.startswith("__pycache__")
    ]
    assert len(entries) <= MOST_ENTRIES


def test_the_map_names_modules_that_there_are():
    design = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| `([\w/]+)/` \| (.*?) \| [^|]*\|$", design, re.MULTILINE)
    assert len(rows) > 20
    for folder, text in rows:
        paths = (ROOT / PACKAGE / folder).rglob("*")
        modules = {path.stem for path in paths if path.suffix in ("", ".py")}
        # A column of the table of primitives, and an attribute of config.json.
        modules |= {"resize", "model_type"}
        assert {*re.findall(r"`([a-z_0-9]+)`", text)} <= modules, folder


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}))
def test_a_folder_documents_its_idea_and_lists_its_names(folder):
    tree = ast.parse((folder / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assigned = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    listed = set(ast.literal_eval(assigned["__all__"]))
    own = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    own |= {path.parent.name for path in folder.glob("*/__init__.py")}
    # A list of modules is one of all of them.
    assert not listed <= own or listed == own


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in EXPERIMENTS}), ids=lambda path: path.name
)
def test_a_folder_of_the_experiments_lists_all_that_it_has(folder):
    body = ast.parse((folder / "__init__.py").read_text()).body
    (listed,) = (ast.literal_eval(x.value) for x in body if isinstance(x, ast.Assign))
    bound = {a.name for x in body if isinstance(x, ast.ImportFrom) for a in x.names}
    bound |= {x.name for x in body if isinstance(x, ast.FunctionDef)}
    modules = {
        path.stem
        for path in folder.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__", "__main__"}
    assert modules <= set(listed) <= modules | bound


def test_a_file_holds_one_idea():
    paths = SOURCES
    long = [path for path in paths if path.read_text().count("\n") > MOST_LINES]
    assert long == []
    assert [p for p in SOURCES if DRAWERS & {*p.relative_to(ROOT).parts, p.stem}] == []


def test_torch_is_for_tests_benchmarks_and_its_adapters():
    adapters = (ROOT / PACKAGE / "torch", ROOT / PACKAGE / "lm" / "torch_models")
    importers = [
        path
        for path in SOURCES
        if path.parent.name != "benchmarks" and path.parent not in adapters
        for name in _imports("cli", path.read_text())
        if name.split(".")[0] in TESTS_ONLY
    ]
    assert importers == []


def test_the_package_raises_and_never_asserts():
    trees = {path: ast.walk(ast.parse(path.read_text())) for path in MODULES}
    assert [
        p for p, t in trees.items() if any(isinstance(n, ast.Assert) for n in t)
    ] == []
