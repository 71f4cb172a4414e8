"""`jaxprune shrink --search`: the loss divides a budget over neurons, heads, layers."""

import json

import numpy as np
import pytest

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import run

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.files import atomic

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    tiny_hf.random_folder("llama", root / "llama", "float32")
    return root


@pytest.fixture(scope="module")
def rows(place):
    """Twelve sequences, nine of which a search calibrates on and three judge."""
    ids = tiny_hf.tokens(12, 16)
    for name, own in (("all", ids), ("first", ids[:9])):
        np.save(place / f"{name}.npy", own)
    return ids


SEARCH = (
    "--speed-rounds",
    0,
    "--length",
    16,
    "--batch",
    3,
    "--any-perplexity",
    "--budget",
    0.75,
)


def test_a_budget_is_divided_by_the_loss_on_the_last_quarter(place, rows, capsys):
    words = (*SEARCH, "--search", "--calibration", place / "all.npy")
    words = (*words, "--sequences", 12)
    code, record, _ = run(capsys, "shrink", place / "llama", place / "m", *words)
    assert code == 0
    tried = {(row["layers"], row["heads"]): row["nats"] for row in record["search"]}
    assert set(tried) > {(2, 1.0), (2, 0.5), (2, 0.0)}
    best = min(tried, key=tried.get)
    assert len(record["layers"]["kept"]) == best[0]
    assert (
        json.loads((place / "m" / "config.json").read_text())["num_hidden_layers"]
        == best[0]
    )
    # One way again, by a command and a file of its own.
    words = (*SEARCH, "--calibration", place / "first.npy", "--sequences", 9)
    assert run(capsys, "shrink", place / "llama", place / "n", *words)[0] == 0
    expected = tiny_cli.nats(place / "n", rows[9:]).mean()
    assert tried[2, 1.0] == pytest.approx(expected, rel=1e-4)


def test_a_search_of_a_budget_goes_on_where_it_was_killed(
    place, rows, capsys, monkeypatch
):
    words = (*SEARCH, "--search", "--calibration", place / "all.npy")
    words = (*words, "--sequences", 12)
    replace = atomic.replace_json

    def dies(path, content):
        replace(path, content)
        if path.name == "search.json" and len(content["tried"]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "replace_json", dies)
        assert run(capsys, "shrink", place / "llama", place / "o", *words)[0] == 130
    noted = place / ".o.work" / "search.json"
    tried = json.loads(noted.read_text())["tried"]
    tried[0]["nats"] = 1.0  # what no way has here: it shows that none is tried again
    replace(noted, {"tried": tried})
    code, record, _ = run(capsys, "shrink", place / "llama", place / "o", *words)
    assert code == 0
    assert record["search"][:2] == tried
    assert len(record["search"]) > 3
    assert record["layers"]["kept"] == [0, 1]
