"""`jaxprune prune --quantize`: few levels, and a compact file of few bits."""

import numpy as np
import pytest

from tests.support import tiny_cli
from tests.support.tiny_cli import place, run

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm import cli
from jaxprune.lm.checkpoints import levels, rewrite

__all__ = ["place"]

SMALL = ["--length", "16", "--sequences", "8"]
GROUP = 16


@pytest.fixture(scope="module")
def rounded(place):
    """A directory at 50 %, its weights integers of four bits; its place."""
    words = ["prune", str(place / "model"), str(place / "rounded"), *SMALL]
    words += ["--sparsity", "0.5", "--quantize", "int4", "--group", str(GROUP)]
    assert cli.main([*words, "--calibration", str(place / "rows.npy")]) == 0
    return place / "rounded"


@pytest.mark.full
def test_each_matrix_lies_on_levels_along_its_inputs(rounded):
    after = tiny_cli.weights(rounded)
    for name, shape in tiny_cli.MATRICES.items():
        found = levels.find_scales(after[name], levels.Grid(4, GROUP))
        assert found is not None, name
        assert found.values.shape == (shape[0], -(-shape[1] // GROUP))
        assert (after[name] == 0).sum() >= np.prod(shape) // 2


@pytest.mark.full
def test_the_record_and_the_page_say_so(rounded):
    record = rewrite.read_provenance(rounded)
    assert record["method"] == "sparsegpt"
    assert record["rounding"] == {"bits": 4, "group": GROUP}
    page = (rounded / "report.html").read_text()
    assert "to int4, a scale for 16 inputs" in page


@pytest.mark.full
def test_its_compact_file_is_smaller_and_gives_every_byte_back(place, rounded, capsys):
    code, _, _ = run(capsys, "compact", rounded, place / "rounded.compact")
    assert code == 0
    code, found, _ = run(capsys, "inspect", rounded)
    assert code == 0
    record = rewrite.read_provenance(rounded)
    promised = record["sizes"]["compact_bytes"]
    # Zeros of what was not pruned count too, where one looks for them.
    assert promised - 200 < found["totals"]["compact_bytes"] <= promised
    size = sum(np.prod(shape) for shape in tiny_cli.MATRICES.values())
    rest = record["sizes"]["dense_bytes"] - 4 * size  # float32
    zeros = record["sizes"]["zeros"]
    wanted = rest + size / 8 + (size - zeros) / 2 + 2 * size / GROUP
    assert promised == pytest.approx(wanted, abs=len(tiny_cli.MATRICES))
    code, _, _ = run(capsys, "expand", place / "rounded.compact", place / "again")
    assert code == 0
    for path in rounded.iterdir():
        assert (place / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--pattern", "8x8"], "--quantize takes unstructured, per-output and n:m"),
        (["--group", "10"], "group must be a multiple of 16 inputs, got 10"),
        (
            ["--method", "magnitude"],
            "without --calibration does no --quantize",
        ),
    ],
)
def test_what_cannot_be_rounded_is_refused_first(place, capsys, options, told):
    words = ["--sparsity", "0.5", "--quantize", "int4", *SMALL, *options]
    code, _, error = run(capsys, "prune", place / "model", place / "none", *words)
    assert code == 1
    assert told in error
    assert not (place / "none").exists()
