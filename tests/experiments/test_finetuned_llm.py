"""`python -m experiments.finetuned_llm` on a tiny directory, against plain NumPy."""

import csv
import dataclasses
import functools
import json
import math
import shlex

import jax
import numpy as np
import optax
import pytest
import tyro
from flax import nnx
from safetensors.numpy import save_file

import jaxprune as jp
from experiments import finetuned_llm
from experiments.harness import checkpoint, stages, training
from experiments.harness.optimizer import optimizer
from experiments.report import results as results_
from experiments.tasks import tiny_directory
from jaxprune.lm.models import hf
from tests.support import oracles
from tests.support.tiny_run import snapshot, write_text

LENGTH, STEPS, RETRAIN, TOKENS, BOS = 16, 6, 3, 70, 256
SPARSITY = 0.5
CRITERIA = (
    "movement",
    "preconditioned_magnitude",
    "sparsegpt_preconditioned_magnitude",
)
MODEL = {  # its matrices are of one shape, which a solver compiles once
    **tiny_directory.CONFIG,
    "intermediate_size": 32,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model's directory, a text to fine-tune on, and another."""
    folder = tmp_path_factory.mktemp("finetuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_directory, "CONFIG", MODEL)
        model = tiny_directory.write(folder / "model")
    return {
        "model": model,
        "text": (write_text(folder / "own.txt", length=1500),),
        "foreign": (write_text(folder / "other.txt", "QRSTUVWXYZ ", 400),),
    }


def config(files, out, **changes):
    options = {
        **files,
        "out": out,
        "seeds": (0,),
        "criteria": CRITERIA,
        "retrain_criteria": ("movement",),
        "sparsities": (SPARSITY,),
        "sequence": LENGTH,
        "batch_size": 2,
        "steps": STEPS,
        "retrain_steps": RETRAIN,
        "learning_rate": 1e-2,
        "eval_tokens": TOKENS,
        "looks": 2,
        "calibration": 2,
        "storage": "float32",
        "sample_length": 4,
        "checkpoint_every": 2,
        "mesh": "data=1",
    }
    return finetuned_llm.Config(**options | changes)


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    chosen = config(files, tmp_path_factory.mktemp("run") / "out")
    finetuned_llm.main(chosen)
    return chosen


@pytest.fixture(scope="module")
def seed(run):
    results = json.loads((run.out / "results.json").read_text())
    results_.check(results)
    return results["seeds"][0]


@pytest.fixture(scope="module")
def began(files):
    return named(loaded(files["model"]))


@pytest.fixture(scope="module")
def ended(run):
    """Parameters and E[g^2] of the last checkpoint, by name."""
    folder = run.out / "seed-0" / "train"
    params = nnx.to_pure_dict(nnx.state(loaded(run.model), nnx.Param))
    trained = lambda name: not name.startswith("embedding")  # noqa: E731
    rate = optax.constant_schedule(0.0)
    tx = optimizer(rate, track=("square", "weight"), trained=trained, watched=trained)
    target = jax.eval_shape(lambda: training.init(params, tx))
    state = checkpoint.restore(folder, target).state
    square = jp.tree.named_leaves(jp.get_importance(state.opt_state).square)
    return arrays(jp.tree.named_leaves(state.params)), square


@functools.cache
def loaded(directory):
    return hf.load(directory, dtype="float32").model


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, state, tokens):
    return nnx.merge(graph, state)(tokens)


def named(model):
    return arrays(jp.tree.named_leaves(nnx.state(model, nnx.Param)))


def arrays(leaves):
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def nats(directory, params, text):
    """Mean loss of the first TOKENS, in windows that begin with BOS, in float64."""
    tokens = hf.load_tokenizer(directory).encode(text, bos=False)[1 : TOKENS + 1]
    graph, state = nnx.split(loaded(directory), nnx.Param)
    state = jax.tree.unflatten(jax.tree.structure(state), list(params.values()))
    total = 0.0
    for start in range(0, len(tokens), LENGTH):
        targets = tokens[start : start + LENGTH]
        inputs = np.zeros((1, LENGTH), np.int32)  # what comes later is not seen
        inputs[0, : len(targets)] = [BOS, *targets[:-1]]
        logits = np.asarray(forward(graph, state, inputs), np.float64)
        logits = logits[0, : len(targets)]
        top = logits.max(-1)
        normal = top + np.log(np.exp(logits - top[:, None]).sum(-1))
        total += (normal - logits[np.arange(len(targets)), targets]).sum()
    return total / len(tokens)


def held_out(files):
    text = files["text"][0].read_text()
    return text[int(0.9 * len(text)) :]


def kept_by_hand(scores):
    kept = oracles.keep_global([*scores.values()], SPARSITY)
    return dict(zip(scores, kept, strict=True))


def scores_by_hand(criterion, began, ended):
    params, square = ended
    matrices = {n: x for n, x in params.items() if x.ndim == 2 and "embed" not in n}
    if criterion == "movement":
        return {n: np.abs(x - began[n]) for n, x in matrices.items()}
    power = np.float32(0.25)
    return {n: np.abs(x) * np.asarray(square[n]) ** power for n, x in matrices.items()}


def cell_of(seed, criterion):
    (cell,) = [c for c in seed["cells"] if c["criterion"] == criterion]
    return cell


@pytest.mark.full
def test_the_models_that_nothing_was_pruned_of_have_the_losses_of_a_plain_forward(
    files, seed, began, ended
):
    text, other = held_out(files), files["foreign"][0].read_text()
    for measured, params in ((seed["start"], began), (seed["dense"], ended[0])):
        loss = nats(files["model"], params, text)
        assert measured["loss"] == pytest.approx(loss, rel=1e-5)
        assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        loss = nats(files["model"], params, other)
        assert measured["foreign_loss"] == pytest.approx(loss, rel=1e-5)
        assert measured["foreign_by_text"] == {"other": measured["foreign_loss"]}
    assert seed["dense"]["loss"] < seed["start"]["loss"]


@pytest.mark.full
def test_the_tables_are_left_alone_and_everything_else_is_trained(began, ended):
    params, square = ended
    for name, leaf in params.items():
        same = np.array_equal(leaf, began[name])
        assert same == (name == "embedding/embedding"), name
    assert jp.tree.is_excluded(square["embedding/embedding"])


@pytest.mark.parametrize("criterion", ["movement", "preconditioned_magnitude"])
@pytest.mark.full
def test_a_cell_is_the_loss_with_the_lowest_scores_at_zero(
    files, seed, began, ended, criterion
):
    kept = kept_by_hand(scores_by_hand(criterion, began, ended))
    params = {n: np.where(kept.get(n, True), x, 0) for n, x in ended[0].items()}
    cell = cell_of(seed, criterion)
    for name, text in (
        ("loss_pruned", held_out(files)),
        ("foreign_loss_pruned", files["foreign"][0].read_text()),
    ):
        loss = nats(files["model"], params, text)
        assert cell[name] == pytest.approx(loss, rel=1e-4)
    shares = {name: 1 - mask.mean() for name, mask in kept.items()}
    assert cell["sparsity_by_leaf"] == pytest.approx(shares, abs=2e-3)


@pytest.mark.full
def test_a_solver_takes_as_many_of_each_matrix_as_the_ranking_and_repairs_the_rest(
    seed, began, ended
):
    kept = kept_by_hand(scores_by_hand("preconditioned_magnitude", began, ended))
    cell = cell_of(seed, "sparsegpt_preconditioned_magnitude")
    shares = {name: 1 - mask.mean() for name, mask in kept.items()}
    assert cell["sparsity_by_leaf"] == pytest.approx(shares, abs=2e-3)
    assert cell["achieved"] == pytest.approx(SPARSITY, abs=2e-3)
    assert (
        cell["loss_pruned"] != cell_of(seed, "preconditioned_magnitude")["loss_pruned"]
    )


@pytest.mark.full
def test_the_retrained_model_is_a_directory_with_its_zeros_where_they_were(
    files, run, seed, began, ended
):
    directory = run.out / "seed-0" / "model"
    params = named(loaded(directory))
    kept = kept_by_hand(scores_by_hand("movement", began, ended))
    for name, mask in kept.items():
        assert not params[name][~mask].any()
        assert (params[name] != ended[0][name])[mask].mean() > 0.9
    cell = cell_of(seed, "movement")
    for name, text in (
        ("loss_retrained", held_out(files)),
        ("foreign_loss_retrained", files["foreign"][0].read_text()),
    ):
        assert cell[name] == pytest.approx(nats(directory, params, text), rel=1e-5)
    assert seed["control"]["steps"] == STEPS + RETRAIN


@pytest.mark.full
def test_report_and_csv_have_both_texts(run, seed):
    with open(run.out / "results.csv", newline="") as file:
        rows = {row["criterion"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {*CRITERIA}
    for name, row in rows.items():
        cell = cell_of(seed, name)
        assert float(row["foreign_loss_pruned"]) == cell["foreign_loss_pruned"]
        assert float(row["dense_perplexity"]) == seed["dense"]["perplexity"]
        assert (row["foreign_perplexity_retrained"] == "") == (name != "movement")
    page = (run.out / "report.html").read_text()
    assert "What is left of another text" in page
    assert "before fine-tuning" in page
    assert page.count("Right after pruning, ") == 2  # of each text
    assert f"{seed['start']['foreign_loss']:.3f}" in page
    assert (run.out / "foreign_loss_global.svg").exists()


@pytest.mark.full
def test_the_command_that_is_recorded_is_this_run(run):
    results = json.loads((run.out / "results.json").read_text())
    words = shlex.split(results["command"])
    assert words[:4] == ["python", "-m", "experiments.finetuned_llm", str(run.model)]
    assert tyro.cli(finetuned_llm.Config, args=words[3:]) == run


@pytest.mark.full
def test_a_finished_run_says_so_and_changes_nothing(run, capsys):
    before = snapshot(run.out)
    finetuned_llm.main(run)
    assert "finished" in capsys.readouterr().out
    assert snapshot(run.out) == before


@pytest.mark.full
@pytest.mark.usefixtures("numbers_alone")
def test_stopped_in_training_and_between_stages_it_ends_with_the_same_bits(
    run, seed, tmp_path
):
    again = dataclasses.replace(run, out=tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_due", stopping(training._due, calls=12))
        with pytest.raises(KeyboardInterrupt):
            finetuned_llm.main(again)
    assert checkpoint.latest(again.out / "seed-0" / "train").step < STEPS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "once", stopping(stages.once, calls=6))
        with pytest.raises(KeyboardInterrupt):
            finetuned_llm.main(again)
    assert not (again.out / "results.json").exists()
    finetuned_llm.main(again)
    results = json.loads((again.out / "results.json").read_text())
    assert results["seeds"] == [seed]


def stopping(function, calls):
    """The function, which is interrupted at that call."""
    calls_left = [calls]

    def one(*arguments, **named):
        calls_left[0] -= 1
        if not calls_left[0]:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    return one


@pytest.mark.full
@pytest.mark.usefixtures("numbers_alone")
def test_on_a_mesh_the_losses_are_the_same(run, seed, tmp_path):
    changed = {"mesh": "fsdp=2", "out": tmp_path / "run"}
    changed |= {
        "criteria": ("movement", "preconditioned_magnitude"),
        "retrain_criteria": (),
    }
    changed |= {"retrain_steps": 0}
    finetuned_llm.main(dataclasses.replace(run, **changed))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("movement", "preconditioned_magnitude"):
        one, other = cell_of(seed, name), cell_of(results["seeds"][0], name)
        for loss in ("loss_pruned", "foreign_loss_pruned"):
            assert other[loss] == pytest.approx(one[loss], abs=2e-3)


@pytest.mark.full
@pytest.mark.usefixtures("numbers_alone")
def test_smoke_makes_what_it_needs_and_lean_averages_rank_the_trained_leaves(
    files, tmp_path
):
    chosen = finetuned_llm.Config(
        text=files["text"],
        criteria=("preconditioned_adam", "preconditioned_magnitude"),
        storage="int8",
        mesh="data=1",
        smoke=True,
        out=tmp_path / "run",
    )
    finetuned_llm.main(chosen)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {c["criterion"] for c in results["seeds"][0]["cells"]} == {
        "preconditioned_adam",
        "movement",
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": None}, "needs a model: give MODEL_DIR"),
        ({"foreign": ()}, "give --foreign FILE"),
        ({"sparsities": (1.0,)}, r"sparsities must be in \(0, 1\), got 1.0"),
        ({"criteria": ("sparsegpt_size",)}, "criteria must be of .*sparsegpt_size"),
        ({"sequence": 0}, "sequence must be at least 1"),
        ({"sequence": 200}, r"held out.* must have a window of 201 tokens, got 150"),
        ({"sequence": 300}, "must have a window of 301 tokens"),
        ({"eval_tokens": -1}, "eval_tokens must be >= 0"),
        ({"retrain_criteria": ("magnitude",)}, "retrain_criteria must be of criteria"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    files, tmp_path, changes, sentence
):
    with pytest.raises(ValueError, match=sentence):
        finetuned_llm.main(config(files, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_files_that_do_not_fit_are_refused(files, tmp_path):
    short = write_text(tmp_path / "short.txt", length=10)
    other = tmp_path / "vision"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "phi3_v"}))
    save_file({"a": np.zeros(2, np.float32)}, other / "model.safetensors")
    for changes, sentence in (
        ({"foreign": (short,)}, "foreign text 'short' must have a window of 17"),
        ({"text": (short,)}, "trained on must have a window of 17 tokens, got 9"),
        ({"foreign": (tmp_path / "none.txt",)}, "must be a readable file"),
        ({"foreign": files["foreign"] * 2}, "must have different names"),
        ({"model": other}, "got 'phi3_v'; another family"),
        ({"out": files["model"] / "run"}, "must lie apart from its source"),
    ):
        with pytest.raises((ValueError, OSError), match=sentence):
            finetuned_llm.main(config(files, **{"out": tmp_path / "run", **changes}))
    assert not (tmp_path / "run").exists()
    assert not (files["model"] / "run").exists()
