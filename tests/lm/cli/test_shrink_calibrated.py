"""`jaxprune shrink --calibration`: what stays makes up for what is gone."""

import numpy as np
import pytest

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import shrink

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.posttraining import solvers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of two layers and six sequences."""
    root = tmp_path_factory.mktemp("calibrated")
    tiny_hf.random_folder("llama", root / "llama", "float32")
    np.save(root / "rows.npy", tiny_hf.tokens(6, 16))
    return root


@pytest.mark.full
def test_with_a_calibration_the_weights_of_those_left_make_up_for_the_others(
    place, capsys
):
    words = ("--ffn", 0.5, "--calibration", place / "rows.npy")
    words = (*words, "--length", 16, "--sequences", 5, "--batch", 3)
    code, record, _ = shrink(capsys, place / "llama", place / "j", *words)
    assert code == 0
    rows = {row["name"]: row for row in record["units"]["weights"]}
    assert list(rows) == [f"layers/{i}/mlp/down/kernel" for i in range(2)]
    before, after = tiny_cli.weights(place / "llama"), tiny_cli.weights(place / "j")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.{{}}_proj.weight"
        kept = record["units"]["kept"][f"layers/{layer}/mlp/down/kernel:0"]
        up, down = before[name.format("up")], before[name.format("down")]
        np.testing.assert_array_equal(after[name.format("up")], up[kept])
        assert (after[name.format("down")] != down[:, kept]).mean() > 0.9


@pytest.mark.full
def test_neurons_that_were_removed_are_not_removed_again(place, capsys, monkeypatch):
    words = ("--ffn", 0.5, "--calibration", place / "rows.npy")
    words = (*words, "--length", 16, "--sequences", 5, "--batch", 3)
    assert shrink(capsys, place / "llama", place / "at-once", *words)[0] == 0
    remove, calls = solvers.units.remove_from_all, []

    def dies(*arguments, **options):
        calls.append("killed")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return remove(*arguments, **options)

    def noted(*arguments, **options):
        calls.append("resumed")
        return remove(*arguments, **options)

    monkeypatch.setattr(solvers.units, "remove_from_all", dies)
    assert shrink(capsys, place / "llama", place / "in-two", *words)[0] == 130
    monkeypatch.setattr(solvers.units, "remove_from_all", noted)
    assert shrink(capsys, place / "llama", place / "in-two", *words)[0] == 0
    assert calls == ["killed", "killed", "resumed"]  # the second of two layers alone
    expected = tiny_cli.weights(place / "at-once")
    for name, value in tiny_cli.weights(place / "in-two").items():
        np.testing.assert_array_equal(value, expected[name])
