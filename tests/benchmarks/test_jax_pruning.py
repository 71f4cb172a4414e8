"""A cell of the tables of real models: pruned, then distilled, and what it prints."""

import json

import numpy as np
import pytest

from benchmarks import jax_pruning
from tests.support import tiny_cli

pytest.importorskip("tokenizers")


@pytest.mark.full
def test_a_distillation_helps_and_leaves_the_zeros(tmp_path, capsys):
    folder = tiny_cli.model(tmp_path / "model")
    np.save(tmp_path / "ids.npy", tiny_cli.ids(8 * 24).reshape(8, 24))
    np.save(tmp_path / "held_out.npy", tiny_cli.ids(4 * 24, seed=1).reshape(4, 24))

    def cell(steps):
        jax_pruning.main(
            jax_pruning.Config(
                folder,
                "magnitude",
                tmp_path / "ids.npy",
                evaluate=(f"words={tmp_path / 'held_out.npy'}",),
                sparsity=0.9,
                distill=steps,
                distill_learning_rate=1e-2,
            )
        )
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    pruned, distilled = cell(0), cell(8)
    for tree in (pruned, distilled):
        assert tree["zeros"] == pytest.approx(0.9, abs=1e-3)
    loss = [
        np.log(tree["perplexities"]["after"]["words"]) for tree in (pruned, distilled)
    ]
    assert loss[1] < loss[0] - 0.01
