"""The main job's numbers are what they say, and its folder is for this job alone."""

import csv
import json
import re

import jax
import numpy as np
import optax
import pytest
import tyro

import jaxprune as jp
from experiments import gpt, scaled_down_llm
from experiments.datasets import load
from experiments.harness import checkpoint, training
from experiments.harness.optimizer import optimizer
from experiments.tasks.language_model import LanguageModel
from jaxprune.files import atomic
from tests.support import oracles
from tests.support.tiny_run import (
    CELLS,
    CONTEXT,
    RETRAIN,
    RETRAINED,
    SEEDS,
    STEPS,
    TOKENS,
    files,
    flags,
    metrics,
    snapshot,
    undisturbed,
    write_text,
)

# All read one run that trains.
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def run():
    return undisturbed()


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run.out / "results.json").read_text())


def test_every_cell_and_every_file_is_there(run, results):
    out = run.out
    assert {"config.json", "metrics.jsonl", "results.csv", "report.html"} < files(out)
    assert not [name for name in files(out) if "partial" in name]
    assert [seed["seed"] for seed in results["seeds"]] == [*SEEDS]
    for seed in results["seeds"]:
        cells = seed["cells"]
        assert [(c["criterion"], c["sparsity"]) for c in cells] == CELLS
        assert {c["allocation"] for c in cells} == {"global"}
        retrained = [c for c in cells if c["loss_retrained"] is not None]
        assert [(c["criterion"], c["sparsity"]) for c in retrained] == [RETRAINED]
        assert seed["dense"]["steps"] == STEPS
        assert seed["control"]["steps"] == STEPS + RETRAIN


def test_the_csv_has_the_numbers_of_the_results(run, results):
    with open(run.out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    cells = [
        (
            *(cell[name] for name in ("criterion", "sparsity", "loss_pruned")),
            *(seed[name]["loss"] for name in ("dense", "control")),
        )
        for seed in results["seeds"]
        for cell in seed["cells"]
    ]
    columns = ("criterion", "sparsity", "loss_pruned", "dense_loss", "control_loss")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        tuple(map(str, cell)) for cell in cells
    ]


def test_the_record_has_every_step_of_every_stage_once(run, results):
    entries = metrics(run.out)
    stages = ["train", "control", "retrain/preconditioned_magnitude-global-0.9"]
    expected = [
        (seed, stage, step)
        for seed in SEEDS
        for stage in stages
        for step in (range(STEPS + 1) if stage == "train" else range(1, RETRAIN + 1))
    ]
    assert [(e["seed"], e["phase"], e["step"]) for e in entries] == expected
    for number, seed in enumerate(results["seeds"]):
        of_seed = [e for e in entries if e["seed"] == number and e["phase"] == "train"]
        assert seed["curve"] == [
            {name: e[name] for name in ("step", "loss", "validation_loss")}
            for e in of_seed[1:]
        ]


def test_progress_counts_every_stage(run):
    config = tyro.cli(scaled_down_llm.Config, args=flags(run.text, run.out))
    for seed in SEEDS:
        folder = run.out / f"seed-{seed}"
        results = [*folder.glob("*.json"), *folder.glob("prune/*.json")]
        results += folder.glob("retrain/*.json")
        assert len(results) == config.plan().stages()


def test_seeds_are_runs_of_their_own(results):
    first, second = results["seeds"]
    assert first["dense"] != second["dense"]
    assert first["curve"] != second["curve"]


@pytest.fixture(scope="module")
def corpus(run):
    return load(text=run.text)


@pytest.fixture(scope="module")
def model(corpus):
    return LanguageModel(gpt.preset("cpu", vocab_size=len(corpus.vocabulary)))


@pytest.fixture(scope="module")
def mean_loss(model, corpus):
    """Parameters to the mean over the first TOKENS targets, in float64."""
    tokens = corpus.validation.astype(np.int32)[: TOKENS + 1]
    inputs, targets = tokens[:-1].reshape(-1, CONTEXT), tokens[1:].reshape(-1, CONTEXT)
    forward = jax.jit(lambda params: model.bind(params)(inputs))

    def mean(params):
        logits = np.asarray(forward(jax.device_get(params)), np.float64)
        logits -= logits.max(-1, keepdims=True)
        normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(normal, targets[..., None], -1).mean()

    return mean


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def trained(request, run, results, model):
    """A seed's results, and what its last checkpoint holds, found by hand."""
    folder = run.out / f"seed-{request.param}" / "train"
    tx = optimizer(optax.constant_schedule(0.0), track=("square",))
    state = checkpoint.restore(folder, training.abstract(model.shapes, tx)).state
    return results["seeds"][request.param], state


def prunable(params):
    named = jp.tree.named_leaves(params).items()
    return {n: np.asarray(x) for n, x in named if jp.tree.prunable(n, x)}


def kept_by_hand(scores, sparsity):
    kept = oracles.keep_global([*scores.values()], sparsity)
    return dict(zip(scores, kept, strict=True))


def scores_by_hand(criterion, state):
    weights = {n: np.abs(x) for n, x in prunable(state.params).items()}
    if criterion == "magnitude":
        return weights
    square = jp.tree.named_leaves(jp.get_importance(state.opt_state).square)
    # float32 as in the package, so that ties and neighbours are ranked alike.
    power = np.float32(0.25)
    return {n: x * np.asarray(square[n]) ** power for n, x in weights.items()}


def test_the_dense_loss_is_that_of_the_checkpoint(trained, mean_loss):
    seed, state = trained
    assert seed["dense"]["loss"] == pytest.approx(mean_loss(state.params), rel=1e-5)
    assert seed["curve"][-1]["validation_loss"] == pytest.approx(
        seed["dense"]["loss"], rel=1e-6
    )


@pytest.mark.parametrize(("criterion", "sparsity"), CELLS)
def test_a_cell_is_the_loss_with_the_lowest_scores_at_zero(
    trained, mean_loss, criterion, sparsity
):
    seed, state = trained
    kept = kept_by_hand(scores_by_hand(criterion, state), sparsity)
    names, structure = jp.tree.names(state.params), jax.tree.structure(state.params)
    leaves = [
        np.where(kept.get(name, True), leaf, 0).astype(np.float32)
        for name, leaf in zip(names, jax.tree.leaves(state.params), strict=True)
    ]
    params = jax.tree.unflatten(structure, leaves)
    cell = seed["cells"][CELLS.index((criterion, sparsity))]
    assert cell["loss_pruned"] == pytest.approx(mean_loss(params), rel=1e-4)
    assert cell["sparsity_by_leaf"].keys() == kept.keys()
    shares = {name: 1 - mask.mean() for name, mask in kept.items()}
    assert cell["sparsity_by_leaf"] == pytest.approx(shares, abs=1e-4)
    removed = sum(round(s * kept[n].size) for n, s in cell["sparsity_by_leaf"].items())
    size = sum(mask.size for mask in kept.values())
    assert removed == round(sparsity * size)
    assert cell["achieved"] == removed / size


def test_samples_go_on_from_the_validation_text(trained, model, corpus):
    seed, _ = trained
    assert [sample["label"] for sample in seed["samples"]] == [
        "dense",
        "preconditioned_magnitude, 90% removed",
        "preconditioned_magnitude, 90% removed, retrained",
        "magnitude, 90% removed",
    ]
    length = model.config.context // 4
    prompt = corpus.vocabulary.decode(corpus.validation[:length])
    for sample in seed["samples"]:
        assert sample["text"].startswith(prompt)
        assert len(sample["text"]) == length + 8


def test_costs_are_counted(results):
    leaves = results["model"]["leaves"]
    sizes = {name: leaf["size"] for name, leaf in leaves.items()}
    masked = {name for name, leaf in leaves.items() if leaf["prunable"]}
    assert results["model"]["parameters"] == sum(sizes.values())
    assert results["model"]["prunable"] == sum(sizes[name] for name in masked)
    for cost, cell in zip(results["costs"], results["seeds"][0]["cells"], strict=False):
        assert cost["sparsity"] == cell["sparsity"]
        assert cost["bytes_dense"] == 4 * sum(sizes.values())
        zeros = round(cell["achieved"] * results["model"]["prunable"])
        bits = sum(-(-sizes[name] // 8) for name in masked)
        assert cost["bytes_packed"] == cost["bytes_dense"] - 4 * zeros + bits
        assert cost["flops_kept"] < cost["flops_dense"]
    assert [cost["sparsity"] for cost in results["costs"]] == [0.5, 0.9]


@pytest.mark.usefixtures("numbers_alone")
def test_retraining_has_a_learning_rate_of_its_own(run, tmp_path):
    less = [
        "--seeds",
        "0",
        "--criteria",
        "preconditioned_magnitude",
        "--sparsities",
        "0.9",
    ]
    less += ["--retrain-learning-rate", "1e-12"]
    args = flags(run.text, tmp_path / "run", *less)
    scaled_down_llm.main(tyro.cli(scaled_down_llm.Config, args=args))
    (seed,) = json.loads((tmp_path / "run" / "results.json").read_text())["seeds"]
    (cell,) = seed["cells"]
    assert seed["control"]["loss"] == pytest.approx(seed["dense"]["loss"], abs=1e-6)
    assert cell["loss_retrained"] == pytest.approx(cell["loss_pruned"], abs=1e-6)


def test_a_finished_run_says_so_and_changes_no_file(run, command):
    before = snapshot(run.out)
    status, output, errors = command(*flags(run.text, run.out))
    assert status == 0
    assert "is finished" in output
    assert str(run.out) in output
    assert not errors
    assert snapshot(run.out) == before


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        (["--steps", "13"], ["steps"]),
        (["--learning-rate", "0.5"], ["learning_rate", "retrain_learning_rate"]),
        (["--retrain-learning-rate", "0.5"], ["retrain_learning_rate"]),
        (["--criteria", "preconditioned_magnitude", "random"], ["criteria"]),
        (["--seeds", "0"], ["seeds"]),
    ],
)
def test_another_configuration_in_the_folder_is_refused_by_its_fields(
    run, command, changed, fields
):
    refused(command, run.out, flags(run.text, run.out, *changed), fields)


@pytest.mark.parametrize(
    ("characters", "fields"),
    [
        ("ABCDEFGHIJ KLMNOP.\n", ["fingerprint"]),
        ("abcdefghij klmnopqrs.\n", ["fingerprint", "vocabulary"]),
    ],
)
def test_another_text_in_the_folder_is_refused_by_its_fields(
    run, command, tmp_path, characters, fields
):
    other = write_text(tmp_path / run.text.name, characters)
    refused(command, run.out, flags(other, run.out), fields)


def refused(command, folder, arguments, fields):
    before = snapshot(folder)
    status, output, errors = command(*arguments)
    assert status == 1
    assert not output
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert str(folder) in errors
    assert re.findall(r"(\w+) was .*? and is ", errors) == fields
    assert snapshot(folder) == before


def test_a_second_process_in_the_folder_is_refused(run, command):
    out = run.out
    before = snapshot(out)
    with atomic.locked(out):
        status, _, errors = command(*flags(run.text, out))
    assert status == 1
    assert errors.startswith("error: ")
    assert f"another run writes to '{out}'; wait for it" in errors
    assert snapshot(out) == before
