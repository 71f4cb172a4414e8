"""The criterion that prunes during the steps after training, beside those before it."""

import json

import jax
import numpy as np
import pytest
import tyro

import jaxprune as jp
from experiments import gpt, scaled_down_llm
from experiments.datasets import load
from experiments.harness.seed_trainer import SeedTrainer
from experiments.tasks.language_model import LanguageModel
from experiments.tasks.language_task import LanguageTask
from tests.support.tiny_run import BATCH, CONTEXT, RETRAIN, flags, write_text

COLUMN = [
    *("--seeds", "0", "--criteria", "gradual", "preconditioned_magnitude"),
    *("--retrain-criteria", "gradual", "preconditioned_magnitude"),
]


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "tiny.txt")


@pytest.mark.full
@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_its_steps_end_at_the_cells_sparsity(text, tmp_path, allocation):
    out = tmp_path / "out"
    config = tyro.cli(scaled_down_llm.Config, args=flags(text, out, *COLUMN))
    corpus = load(text=text)
    shape = gpt.preset("cpu", vocab_size=len(corpus.vocabulary))
    task = LanguageTask(LanguageModel(shape), corpus)
    trainer = SeedTrainer(0, config.plan(), task, out, None, {}, None)
    dense = task.init(0)
    params, done = trainer.prune_gradually("retrain/cell", dense, 0.9, allocation)
    assert done == {"tokens": RETRAIN * BATCH * CONTEXT}
    zeros = {
        name: np.asarray(leaf) == 0
        for name, leaf in jp.tree.named_leaves(params).items()
        if jp.tree.prunable(name, leaf)
    }
    if allocation == "layer":
        assert all(x.sum() == round(0.9 * x.size) for x in zeros.values())
    total = sum(x.size for x in zeros.values())
    assert sum(x.sum() for x in zeros.values()) == round(0.9 * total)
    assert not any((np.asarray(leaf) == 0).any() for leaf in jax.tree.leaves(dense))


@pytest.mark.full
def test_before_those_steps_it_is_the_criterion_and_afterwards_it_is_not(
    text, tmp_path
):
    out = tmp_path / "out"
    arguments = flags(text, out, *COLUMN)
    scaled_down_llm.main(tyro.cli(scaled_down_llm.Config, args=arguments))
    (seed,) = json.loads((out / "results.json").read_text())["seeds"]
    gradual, ranked = (
        {c["sparsity"]: c for c in seed["cells"] if c["criterion"] == criterion}
        for criterion in ("gradual", "preconditioned_magnitude")
    )
    for sparsity, cell in gradual.items():
        assert cell["loss_pruned"] == ranked[sparsity]["loss_pruned"]
    assert gradual[0.9]["loss_retrained"] != ranked[0.9]["loss_retrained"]
    assert gradual[0.5]["loss_retrained"] is None


def test_too_few_steps_to_prune_in_are_refused(text, tmp_path):
    arguments = flags(text, tmp_path / "out", *COLUMN, "--retrain-steps", "9")
    with pytest.raises(ValueError, match="at least 10, got 9"):
        scaled_down_llm.main(tyro.cli(scaled_down_llm.Config, args=arguments))
