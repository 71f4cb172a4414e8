"""The table of what goes with what says what was resolved."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def beside():
    spec = importlib.util.spec_from_file_location("beside", ROOT / ".ci" / "beside.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("refused", "obstacle"),
    [
        (set(), ""),
        # A narrower extra goes: what stands in the way is the widest's.
        ({("3.13", "[test]")}, "3.13[test]"),
        ({("3.11", e) for e in ("[test]", "[lm]", "")}, "3.11[test]"),
    ],
)
def test_what_stands_in_the_way_is_what_keeps_the_widest_extra_away(
    beside, monkeypatch, refused, obstacle
):
    def resolve(requirements, python, *, dev):
        if len(requirements) == 1:
            return beside.Resolved({"other": "1.0"}, "")
        extra = requirements[1].removeprefix("jaxprune").partition(" ")[0]
        if (python, extra) in refused:
            return beside.Resolved({}, python + extra)
        return beside.Resolved({"other": "1.0", "jax": "0.12"}, "")

    monkeypatch.setattr(beside, "resolve", resolve)
    row = beside.row(beside.Package("other", "other"))
    assert row.obstacle == obstacle
    assert row.cells()[-1] == obstacle
