"""What goes with a unit, under the names of a checkpoint, and how it is compared."""

import importlib.util

import numpy as np
import pytest

from benchmarks import torch_pruning_groups
from benchmarks.torch_pruning_groups import Config

LAYER = "model.layers.0."


def test_without_the_package_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch-pruning"):
        torch_pruning_groups.main(Config())


def test_a_unit_goes_with_its_rows_and_columns_of_the_checkpoint():
    config = {"model_type": "llama", **torch_pruning_groups.FAMILIES["llama"]}
    groups, _ = torch_pruning_groups.axis_groups(config)
    gate = np.zeros((80, 48), bool)
    gate[0] = True
    names = ("gate_proj", "up_proj", "down_proj")
    neuron = {f"{LAYER}mlp.{name}.weight": gate for name in names}
    neuron[f"{LAYER}mlp.down_proj.weight"] = gate.T
    assert groups["neuron"].keys() == neuron.keys()
    for name, removed in neuron.items():
        np.testing.assert_array_equal(groups["neuron"][name], removed)
    # The first of three key heads of 8 features, and the two query heads that share it.
    rows = {name: removed.any(1).sum() for name, removed in groups["head"].items()}
    attention = f"{LAYER}self_attn."
    counts = {"q": 16, "k": 8, "v": 8}
    expected = {f"{attention}{x}_proj.weight": n for x, n in counts.items()}
    assert rows == {**expected, f"{attention}o_proj.weight": 48}
    assert groups["head"][f"{attention}o_proj.weight"].any(0).sum() == 16
    # The embedding, norms and every matrix beside the residual stream.
    assert len(groups["width"]) == 1 + 2 * (2 + 4 + 3) + 1 + 1


def test_what_takes_too_long_is_given_up():
    def work():
        with torch_pruning_groups.within(0.05):
            while True:
                pass

    with pytest.raises(TimeoutError, match="not within"):
        work()


def test_too_little_and_too_much_are_told_apart():
    one, two = np.array([True, False]), np.array([True, True])
    ours = {"a": one, "b": two, "c": one}
    differences = torch_pruning_groups.difference(ours, {"a": one, "b": one, "d": one})
    assert differences == {
        "all": ["a", "b", "c"],
        "missing": ["b", "c"],
        "extra": ["d"],
    }
    roles = dict.fromkeys(torch_pruning_groups.ROLES, differences)
    answers = {"all groups": "7 in 0.10 s", **roles, "width": "no"}
    table = torch_pruning_groups.agreement_table(
        {"x": {"ours": 1.0, "theirs": answers}}
    )
    cell = "too little of 2 of 3 tensors, too much of 1"
    assert table.splitlines()[2] == f"| x | 1.00 | 7 in 0.10 s | {cell} | {cell} | no |"
