"""The floors of docs/design.md: imports go strictly down.

The table below is the layout. Each row is a floor, each set in it a step: a module may
import what stands on a lower step, never what stands beside or above it. A module that
is missing from the table fails here; one that is not written yet does not.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "jaxprune"
MOST_LINES = 400

FLOORS = [
    [
        {"tensorfile", "storage", "sums", "brackets", "ranks", "meshes", "program"}
        | {"stored"},
        {"directory", "tree", "views"},
        {"axes"},
        {"base"},
    ],
    [
        {
            "averages",
            "running",
            "sharding",
            "scores",
            "patterns",
            "select",
            "allocate",
            "schedules",
            "wanda",
        },
        {"highest", "reconstruction"},
    ],
    [
        {"choices", "low_rank"},
        {"masks", "importance", "sparsegpt", "alps", "tracing"},
    ],
    [
        {"pruning", "keep", "gradual", "dynamic", "structure"},
        {"methods", "shares", "stages", "journal"},
        {"calibration"},
        {"matrices"},
        {"walk"},
        {"trained"},
    ],
    [
        {"manifest", "processes", "archive", "report.results", "report.canvas"},
        {"folders", "report.figures", "report.findings", "report.page"},
        {"report.accuracy"},
        {"report.sections", "report.pruned"},
        {"checkpoint", "compact", "report.__init__"},
        {"export"},
        {"streaming"},
    ],
    [
        {"__init__", "cli.console", "cli.machine", "cli.texts", "cli.rules"},
        {"cli.costs", "cli.models", "cli.perplexity", "cli.archives", "cli.retraining"},
        {"cli.record", "cli.sampling", "cli.evaluation", "cli.inspection"},
        {"cli.job"},
        {"cli.preparation"},
        {"cli.calibrated", "cli.streamed"},
        {"cli.pruning"},
        {"cli.__init__"},
        {"cli.__main__"},
    ],
]
# What the tower may use of the floors: it stands on the ground beside both.
GROUND = {"tensorfile", "directory", "stored"}
# A tower of its own: it imports nothing of the floors, nor they of it, but the command
# puts the two together.
TOWER = [
    {
        "models.gpt_config",
        "models.linear",
        "models.attributes",
        "models.rope",
        "models.tokens",
    },
    {"models.decoder_config", "models.schemes"},
    {"models.blocks", "models.families"},
    {"models.gpt", "models.decoder", "models.matching", "models.clip"},
    {"models.loading", "models.phi3_vision"},
    {"models.generate", "models.hf", "models.pictures", "models.vision_family"},
    {"models.hf_vision"},
    {"models.__init__"},
]

EVERYWHERE = {"jax", "numpy", "jaxtyping"}
# Below floor 2 optax lends one word: the node that stands for a leaf left out.
VOCABULARY = {"optax.MaskedNode"}
OPTAX_FROM = 2
ALSO = {
    "checkpoint": {"orbax"},
    "journal": {"safetensors"},
    "tensorfile": {"ml_dtypes"},
    "walk": {"tqdm"},
    "report.accuracy": {"matplotlib"},
    "report.canvas": {"matplotlib"},
    "report.figures": {"matplotlib"},
    "report.page": {"matplotlib"},
    "report.pruned": {"matplotlib"},
    "report.sections": {"matplotlib"},
    "models.pictures": {"PIL"},
    "models.tokens": {"tokenizers"},
}
TESTS_ONLY = {"torch", "transformers", "chex"}
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "_src"}


def _steps(floors: list[list[set[str]]]) -> dict[str, tuple[int, int]]:
    return {
        module: (floor, step)
        for floor, steps in enumerate(floors)
        for step, modules in enumerate(steps)
        for module in modules
    }


PLACE = _steps(FLOORS)
TOWER_PLACE = _steps([TOWER])


def _name(path: Path) -> str:
    """The module's name below the package: "masks", "models.gpt", "__init__"."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts)


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


def _own_module(name: str) -> str:
    """The module of the package that an imported dotted name lies in."""
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        for candidate in (module, f"{module}.__init__"):
            if candidate in {**PLACE, **TOWER_PLACE}:
                return candidate
    return "__init__"


def violations(module: str, source: str) -> list[str]:
    """What a module imports and may not, one sentence each."""
    in_tower, in_cli = module in TOWER_PLACE, module.startswith("cli.")
    places = TOWER_PLACE if in_tower else PLACE
    if module not in places:
        return [f"{module} is not in the table of floors; give it its place there"]
    found = []
    for name in _imports(module, source):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names:
            continue
        if top == PACKAGE:
            other = _own_module(name)
            shared = in_tower and other in GROUND
            if shared or (in_cli and other in TOWER_PLACE):
                continue
            if other not in places:
                found.append(f"{module} and {other} stand in different towers")
            elif places[other] >= places[module]:
                found.append(f"{module} imports {other}, which is not below it")
            continue
        allowed = EVERYWHERE | ALSO.get(module, set())
        allowed |= {"flax"} if in_tower or in_cli else set()
        allowed |= {"tyro", "tqdm"} if in_cli else set()
        if not in_tower and places[module][0] >= OPTAX_FROM:
            allowed |= {"optax"}
        if top not in allowed and (in_tower or name not in VOCABULARY):
            found.append(f"{module} imports {name}, which does not belong there")
    return found


MODULES = sorted((ROOT / PACKAGE).rglob("*.py"), key=_name)
SOURCES = [
    *MODULES,
    *sorted((ROOT / "experiments").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]
# An `__init__.py` of a folder of modules may be empty; then it stands nowhere.
WRITTEN = [path for path in MODULES if path.read_text().strip()]


@pytest.mark.parametrize("path", WRITTEN, ids=_name)
def test_imports_go_strictly_down(path):
    assert violations(_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("masks", "from jaxprune import pruning"),
        ("masks", "from jaxprune.training.track import track_importance"),
        ("masks", "import jaxprune.masking.masks"),
        ("masks", "from . import keep"),
        ("masks", "from .keep import keep_masks"),
        ("masks", "def late():\n    from jaxprune import report"),
        ("masks", "import jaxprune"),
        ("tree", "from jaxprune.typing import Params"),
        ("select", "from jaxprune.scores.from_training import magnitude"),
        ("pruning", "from jaxprune.models import gpt"),
        ("models.gpt", "from jaxprune import masks"),
        ("models.gpt", "from ..base import Params"),
        ("models.gpt", "from . import generate"),
        ("models.gpt", "import optax"),
        ("scores", "import optax"),
        ("scores", "from optax import MaskedNode, adam"),
        ("masks", "from flax import nnx"),
        ("keep", "import orbax.checkpoint as ocp"),
        ("checkpoint", "import matplotlib.pyplot as plt"),
        ("checkpoint", "import tensorflow_datasets"),
        ("export", "import torch"),
        ("report.results", "from jaxprune import report"),
        ("report.figures", "from . import page"),
        ("pruning", "from experiments.report import results"),
        ("brand_new", "import jax"),
    ],
)
def test_an_import_that_climbs_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("base", "from jaxprune.arrays.axes import Axes"),
        ("scores", "from optax import MaskedNode"),
        ("masks", "import optax\nfrom jaxprune import allocate, select, tree"),
        ("keep", "from .masks import apply as apply"),
        ("checkpoint", "from orbax.checkpoint import v1 as ocp\nimport json"),
        ("report.page", "from experiments.report import canvas\nimport matplotlib"),
        ("report.__init__", "from .sections import charts\nfrom . import results"),
        ("models.generate", "from jaxprune.models.gpt import GPT"),
        ("models.gpt", "from flax import nnx\nfrom jaxtyping import Array, Float"),
        ("__init__", "from . import masks as masks\nfrom .keep import keep_masks"),
    ],
)
def test_an_import_that_goes_down_is_allowed(module, source):
    assert violations(module, source) == []


def test_importing_the_package_leaves_the_report_and_checkpoints_to_their_users():
    source = (ROOT / PACKAGE / "__init__.py").read_text()
    floors = {PLACE[_own_module(name)][0] for name in _imports("__init__", source)}
    assert max(floors) < PLACE["checkpoint"][0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_holds_one_idea(path):
    lines = path.read_text().count("\n")
    assert lines <= MOST_LINES
    assert not DRAWERS & set(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_references_are_for_tests_and_benchmarks_only(path):
    if path.parent.name == "benchmarks":
        return
    tops = {name.split(".")[0] for name in _imports("cli", path.read_text())}
    assert not tops & TESTS_ONLY


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_the_package_raises_and_never_asserts(path):
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
