"""One model has one perplexity on one text, whichever subcommand measures it."""

import pytest

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import run

pytest.importorskip("tokenizers")

FEW = ["--sequences", 8, "--batch", 4, "--length", 16]
JOBS = {
    "prune": ["prune", "--method", "wanda", "--sparsity", 0.5, *FEW],
    "shrink": ["shrink", "--ffn", 0.5, *FEW],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that sees more than a window, and texts of more than are evaluated."""
    root = tmp_path_factory.mktemp("perplexity")
    tiny_hf.edit(tiny_cli.model(root / "model"), max_position_embeddings=1024)
    (root / "a.txt").write_text(tiny_cli.text(90_000))
    (root / "b.txt").write_text(tiny_cli.text(9000, seed=1))
    return root


def measured(capsys, place, out, job, *texts):
    """How the text was evaluated by a job, and what the dense model had on it."""
    words = [job[0], place / "model", out, *job[1:], *texts]
    code, record, err = run(capsys, *words)
    assert code == 0
    ((_, text),) = record["perplexity"].items()
    shown = next(line for line in err.splitlines() if line.startswith("dense: "))
    return shown.split(" on ")[0], text


@pytest.mark.full
def test_each_subcommand_measures_the_same_windows(place, tmp_path, capsys):
    code, record, err = run(capsys, "eval", place / "model", "--text", place / "b.txt")
    assert code == 0
    expected = record["texts"]["b.txt"]
    assert (expected["context"], expected["windows"]) == (512, 16)
    assert "'b.txt' may be longer; --limit 0 takes all" in err
    texts = ["--calibration", place / "a.txt", "--evaluate", place / "b.txt"]
    magnitude = ["prune", "--method", "magnitude", "--sparsity", 0.5]
    for name, job, given in (
        *((name, job, texts) for name, job in JOBS.items()),
        ("magnitude", magnitude, texts[2:]),
    ):
        shown, text = measured(capsys, place, tmp_path / name, job, *given)
        assert text["dense"]["nats"] == expected["nats"], name
        assert text["by_frequency"] == expected["by_frequency"]
        assert (text["context"], text["dense"]["windows"]) == (512, 16)
        assert shown == f"dense: perplexity {expected['perplexity']:.5g}"


@pytest.mark.full
def test_the_held_out_end_of_a_text_is_the_same_for_each_subcommand(
    place, tmp_path, capsys
):
    results = [
        measured(capsys, place, tmp_path / name, job, "--calibration", place / "a.txt")
        for name, job in JOBS.items()
    ]
    assert results[0][0] == results[1][0]
    nats = [text["dense"]["nats"] for _, text in results]
    assert nats[0] == nats[1]
    assert results[0][1]["dense"]["tokens"] == 16 * 511


def test_all_windows_are_evaluated_where_no_limit_is_asked_for(place, capsys):
    words = ["eval", place / "model", "--text", place / "b.txt", "--limit", 0]
    code, record, err = run(capsys, *words)
    assert code == 0
    assert record["texts"]["b.txt"]["tokens"] == 9000
    assert "--limit 0" not in err
