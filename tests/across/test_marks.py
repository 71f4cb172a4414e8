"""Tests bear the marks by which `.ci/run` shares them out between Pythons."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests").rglob("test_*.py"))
TORCH = {"torch", "transformers", "tests.support.torch_phi3_vision"}


def _needs_torch(node: ast.AST) -> bool:
    """Whether a piece of source skips itself where torch is not installed."""
    source = ast.unparse(node)
    return any(f"pytest.importorskip('{name}')" in source for name in TORCH)


def unmarked(source: str) -> list[str]:
    """Tests that torch is needed for, themselves or by a helper, and say not so."""
    module = ast.parse(source)
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    statements = [node for node in module.body if node not in functions]
    marks = [
        ast.unparse(node.value)
        for node in statements
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    if any("pytest.mark.parity" in mark for mark in marks):
        return []
    helpers = {node.name for node in functions if _needs_torch(node)}
    everywhere = any(_needs_torch(node) for node in statements)
    return [
        test.name
        for test in functions
        if test.name.startswith("test_")
        and (everywhere or helpers & {test.name, *_names(test)})
        and "pytest.mark.parity" not in map(ast.unparse, test.decorator_list)
    ]


def _names(function: ast.FunctionDef) -> set[str]:
    """Arguments (fixtures) of a function, and the names that it reads."""
    read = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return read | {argument.arg for argument in function.args.args}


def test_comparisons_with_torch_are_marked_parity():
    """Else the Python with torch runs it only where it is of the default suite."""
    missing = {path: unmarked(path.read_text()) for path in FILES}
    assert {path: names for path, names in missing.items() if names} == {}


def test_a_comparison_without_the_mark_is_found():
    call = 'pytest.importorskip("torch")'
    test = "def test_it(pair):\n    pair()"
    helper = f"def pair():\n    {call}"
    assert unmarked(f"{helper}\n{test}") == ["test_it"]
    assert unmarked(f"torch = {call}\n{test}") == ["test_it"]
    assert unmarked(f"{helper}\n@pytest.mark.parity\n{test}") == []
    assert unmarked(f"pytestmark = pytest.mark.parity\n{helper}\n{test}") == []
    assert unmarked(f'def pair():\n    pytest.importorskip("sklearn")\n{test}') == []
