"""The main job: killed, it ends with the same bits; its numbers are what they say."""

import csv
import fcntl
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

import jaxprune as jp
from experiments import scaled_down_llm, sweep
from experiments.datasets import load
from experiments.language_model import LanguageModel, optimizer
from jaxprune import checkpoint
from jaxprune.models import gpt
from jaxprune.report import results as results_

ROOT = Path(__file__).parent.parent
MODULE = "experiments.scaled_down_llm"
STEPS, RETRAIN, BATCH, CONTEXT, TOKENS = 12, 6, 2, 64, 512
SEEDS = (0, 1)
CELLS = [(c, s) for c in ("trajectory", "magnitude") for s in (0.5, 0.9)]
RETRAINED = ("trajectory", 0.9)
TINY = [
    *("--seeds", "0", "1"),
    *("--criteria", "trajectory", "magnitude"),
    *("--retrain-criteria", "trajectory"),
    *("--sparsities", "0.5", "0.9"),
    *("--retrain-sparsities", "0.9"),
    *("--show-sparsity", "0.9"),
    *("--batch-size", str(BATCH)),
    *("--steps", str(STEPS)),
    *("--retrain-steps", str(RETRAIN)),
    *("--eval-tokens", str(TOKENS)),
    *("--sample-length", "8"),
    *("--checkpoint-every", "4"),
]


def write_text(path, characters="abcdefghij klmnop.\n", length=6000):
    path.parent.mkdir(parents=True, exist_ok=True)
    picked = np.random.default_rng(0).choice(list(characters), length)
    path.write_text("".join(picked))
    return path


def flags(text, out, *more):
    return ["--text", str(text), "--out", str(out), *TINY, *more]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "tiny.txt")


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    """The folder of one whole run, and the seconds that it took."""
    out = tmp_path_factory.mktemp("run") / "undisturbed"
    start = time.perf_counter()
    scaled_down_llm.main(tyro.cli(scaled_down_llm.Config, args=flags(text, out)))
    return out, time.perf_counter() - start


@pytest.fixture(scope="module")
def results(undisturbed):
    return json.loads((undisturbed[0] / "results.json").read_text())


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m experiments.scaled_down_llm` without the process's start."""

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [MODULE, *arguments])
            patch.delitem(sys.modules, MODULE)
            try:
                runpy.run_module(MODULE, run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code
        printed = capsys.readouterr()
        # A text given to sys.exit is printed by the interpreter, as status 1.
        said = status if isinstance(status, str) else printed.err
        return (1 if isinstance(status, str) else status), printed.out, said

    return run


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def numbers(folder):
    """What must not depend on when and how often a run was interrupted."""
    found = json.loads((folder / "results.json").read_text())
    del found["finished"], found["command"]  # the time, and the folder's name
    found["phases"] = [(phase["name"], phase["seed"]) for phase in found["phases"]]
    return found


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry.pop("tokens_per_second", None)
    return entries


# Killed and started again


def start(arguments, log):
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def kill_when(ready, arguments, log):
    """Starts the process and kills it as soon as `ready()`; its return code."""
    process = start(arguments, log)
    try:
        while process.poll() is None and not ready():
            time.sleep(0.002)
    finally:
        process.kill()
    return process.wait()


def test_killed_at_any_stage_and_started_again_it_ends_with_the_same_bits(
    undisturbed, text, tmp_path
):
    out, log = tmp_path / "killed", tmp_path / "log"
    arguments = flags(text, out)
    with open(log, "w") as file:
        for moment in (
            "config.json",  # nothing is done yet
            "seed-0/train/step_00000004",  # while it trains
            "seed-0/control.json",  # while it prunes
            "seed-1/retrain/trajectory-global-0.9/step_00000004",  # while it retrains
            "seed-1/weights.json",  # while the report is drawn
        ):
            assert not (out / moment).exists(), f"{moment} was there too early"
            code = kill_when((out / moment).exists, arguments, file)
            assert code == -signal.SIGKILL, log.read_text()
            assert (out / moment).exists()
            assert not (out / "results.json").exists()
        assert start(arguments, file).wait() == 0, log.read_text()
    assert f"report: {out / 'report.html'}" in log.read_text()
    assert numbers(out) == numbers(undisturbed[0])
    assert metrics(out) == metrics(undisturbed[0])
    assert files(out) == files(undisturbed[0])


def files(folder):
    """Every file's name, less what names a process or a moment."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in found if not name.startswith(("tensorboard", "seed-"))}


@pytest.mark.slow
def test_killed_whenever_it_wrote_a_file_it_ends_with_the_same_bits(
    undisturbed, text, tmp_path
):
    out, kills = tmp_path / "killed", 0
    with open(tmp_path / "log", "w") as file:
        while True:
            before = stages(out)
            code = kill_when(
                lambda done=before: stages(out) - done, flags(text, out), file
            )
            if code == 0:
                break
            assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
            kills += 1
    assert kills > 2 * (STEPS // 4 + len(CELLS))
    assert numbers(out) == numbers(undisturbed[0])
    assert metrics(out) == metrics(undisturbed[0])


def stages(out):
    """What tells how far a run has come: stages' results and whole checkpoints."""
    if not out.exists():
        return set()
    return {*out.glob("*.json"), *out.glob("seed-*/**/*.json")} - {
        *out.glob("seed-*/**/.partial_*/**")
    }


def test_stopped_while_the_report_is_written_it_writes_the_same_report(
    undisturbed, text, tmp_path, monkeypatch
):
    out = tmp_path / "stopped"
    config = tyro.cli(scaled_down_llm.Config, args=flags(text, out))

    class Stopped(BaseException):
        pass

    replace, written = os.replace, []

    def stop_at_the_fifth(source, target):
        if Path(target).parent == out and Path(target).suffix in (".png", ".svg"):
            written.append(target)
            if len(written) == 5:
                raise Stopped
        return replace(source, target)

    copy_stages(undisturbed[0], out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_fifth)
        with pytest.raises(Stopped):
            scaled_down_llm.main(config)
    assert not (out / "results.json").exists()
    scaled_down_llm.main(config)
    assert numbers(out) == numbers(undisturbed[0])
    assert files(out) == files(undisturbed[0])
    for name in ("results.csv", "metrics.jsonl"):
        assert (out / name).read_bytes() == (undisturbed[0] / name).read_bytes()


def copy_stages(source, target):
    for path in source.rglob("*"):
        name = path.relative_to(source)
        whole = name.parts[0].startswith("seed-") or str(name) in (
            "config.json",
            "metrics.jsonl",
        )
        if path.is_file() and whole:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(path.read_bytes())


def test_a_finished_run_says_so_and_changes_no_file(undisturbed, text, command):
    before = snapshot(undisturbed[0])
    status, said, errors = command(*flags(text, undisturbed[0]))
    assert status == 0
    assert "is finished" in said
    assert str(undisturbed[0]) in said
    assert not errors
    assert snapshot(undisturbed[0]) == before


# Refused


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        (["--steps", "13"], ["steps"]),
        (["--learning-rate", "0.5"], ["learning_rate"]),
        (["--criteria", "magnitude", "random"], ["criteria"]),
        (["--seeds", "0"], ["seeds"]),
    ],
)
def test_another_configuration_in_the_folder_is_refused_by_its_fields(
    undisturbed, text, command, changed, fields
):
    refused(command, undisturbed[0], flags(text, undisturbed[0], *changed), fields)


@pytest.mark.parametrize(
    ("characters", "fields"),
    [
        ("ABCDEFGHIJ KLMNOP.\n", ["fingerprint"]),
        ("abcdefghij klmnopqrs.\n", ["vocabulary", "fingerprint"]),
    ],
)
def test_another_text_in_the_folder_is_refused_by_its_fields(
    undisturbed, text, command, tmp_path, characters, fields
):
    other = write_text(tmp_path / text.name, characters)
    refused(command, undisturbed[0], flags(other, undisturbed[0]), fields)


def refused(command, folder, arguments, fields):
    before = snapshot(folder)
    status, said, errors = command(*arguments)
    assert status == 1
    assert not said
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert str(folder) in errors
    for field in ("steps", "vocabulary", "fingerprint", "criteria", "seeds"):
        assert (field in errors) == (field in fields) or field in "learning_rate"
    assert all(field in errors for field in fields)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--sparsities", "1.0", "sparsities"),
        ("--sparsities", "0.0", "sparsities"),
        ("--sparsities", "-0.5", "sparsities"),
        ("--sparsities", "nan", "sparsities"),
        ("--sparsities", "inf", "sparsities"),
        ("--retrain-sparsities", "1.5", "sparsities"),
        ("--retrain-sparsities", "0.7", "retrain_sparsities"),
        ("--criteria", "weight", "weight"),
        ("--retrain-criteria", "weight", "weight"),
        ("--retrain-criteria", "random", "retrain_criteria"),
        ("--criteria", "random random", "criteria"),
        ("--seeds", "1 1", "seeds"),
        ("--seeds", "-1", "seed"),
        ("--batch-size", "0", "batch_size"),
        ("--steps", "0", "steps"),
        ("--retrain-steps", "-1", "retrain_steps"),
        ("--checkpoint-every", "0", "checkpoint_every"),
        ("--learning-rate", "-0.1", "learning_rate"),
        ("--learning-rate", "nan", "learning_rate"),
        ("--eval-tokens", "-1", "eval_tokens"),
        ("--sample-length", "0", "sample_length"),
        ("--show-sparsity", "nan", "show_sparsity"),
    ],
)
def test_a_value_out_of_range_is_one_sentence_and_nothing_is_written(
    text, tmp_path, command, flag, value, named
):
    out = tmp_path / "out"
    status, _, errors = command(*flags(text, out, flag, *value.split()))
    assert status == 1
    assert errors.startswith("error: ")
    assert named in errors
    assert len(errors.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sparsities"],
        ["--sparsities", "half"],
        ["--scopes", "galaxy"],
        ["--preset", "huge"],
        ["--no-such-flag"],
    ],
)
def test_a_flag_that_cannot_be_read_is_a_usage_error(
    text, tmp_path, command, arguments
):
    out = tmp_path / "out"
    status, _, errors = command(*flags(text, out, *arguments))
    assert status not in (0, None)
    assert arguments[0].strip("-").split("-")[0] in errors
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"to be or not to be", "longer text"),
        (b"x" * 20 + b"y" * 40, "longer text"),
        (b"\xff\xfe\x00", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_text_of_no_use_is_one_sentence_and_nothing_is_written(
    tmp_path, command, content, named
):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        text.write_bytes(content)
    status, _, errors = command(*flags(text, out))
    assert status == 1
    assert errors.startswith("error: ")
    assert named in errors
    assert len(errors.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder_is_refused(text, tmp_path, command, name):
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    status, _, errors = command(*flags(text, tmp_path / name))
    assert status == 1
    assert errors.startswith("error: ")
    assert str(tmp_path / name) in errors
    assert len(errors.splitlines()) == 1
    assert snapshot(tmp_path) == before


def test_a_second_process_in_the_folder_is_refused(undisturbed, text, command):
    out = undisturbed[0]
    before = snapshot(out)
    with open(out / ".lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, _, errors = command(*flags(text, out))
    assert status == 1
    assert errors == (
        f"error: another process is running in '{out}'; wait for it or give another "
        "--out"
    )
    assert snapshot(out) == before


def test_a_loss_that_is_not_finite_is_one_sentence(text, tmp_path, command):
    status, _, errors = command(*flags(text, tmp_path, "--learning-rate", "1e30"))
    assert status == 1
    assert errors.startswith("error: ")
    assert "learning rate" in errors
    assert not (tmp_path / "results.json").exists()


# What it writes


def test_the_report_reads_the_results_and_every_file_is_there(undisturbed, results):
    out = undisturbed[0]
    results_.check(results)
    assert results_.read(out) == results
    assert {"config.json", "metrics.jsonl", "results.csv", "report.html"} < files(out)
    assert not [name for name in files(out) if "partial" in name]
    assert [seed["seed"] for seed in results["seeds"]] == [*SEEDS]
    for seed in results["seeds"]:
        cells = seed["cells"]
        assert [(c["criterion"], c["sparsity"]) for c in cells] == CELLS
        assert {c["scope"] for c in cells} == {"global"}
        retrained = [c for c in cells if c["loss_retrained"] is not None]
        assert [(c["criterion"], c["sparsity"]) for c in retrained] == [RETRAINED]
        assert seed["dense"]["steps"] == STEPS
        assert seed["control"]["steps"] == STEPS + RETRAIN


def test_the_csv_has_the_numbers_of_the_results(undisturbed, results):
    with open(undisturbed[0] / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        {
            "seed": seed["seed"],
            **{name: cell[name] for name in results_.COLUMNS[1:7]},
            "dense_loss": seed["dense"]["loss"],
            "dense_steps": seed["dense"]["steps"],
            "control_loss": seed["control"]["loss"],
            "control_steps": seed["control"]["steps"],
        }
        for seed in results["seeds"]
        for cell in seed["cells"]
    ]
    assert rows == [
        {name: "" if x is None else str(x) for name, x in row.items()}
        for row in expected
    ]


def test_the_record_has_every_step_of_every_stage_once(undisturbed, results):
    entries = metrics(undisturbed[0])
    stages = ["train", "control", "retrain/trajectory-global-0.9"]
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


def test_seeds_are_runs_of_their_own(results):
    first, second = results["seeds"]
    assert first["dense"] != second["dense"]
    assert first["curve"] != second["curve"]
    assert first["weights"]["values"] != second["weights"]["values"]


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def trained(request, undisturbed, text, results):
    """A seed's results, and what its last checkpoint holds, found by hand."""
    folder = undisturbed[0] / f"seed-{request.param}" / "train"
    corpus = load(text=text)
    shape = gpt.preset("cpu", vocab_size=len(corpus.vocabulary))
    model = LanguageModel(shape)
    params = model.init(request.param)
    tx = optimizer(0.0, track=True)
    state = sweep.training.init(params, tx)
    state = checkpoint.restore(folder, jax.eval_shape(lambda: state)).state
    return results["seeds"][request.param], model, corpus, state


def mean_loss(model, params, corpus):
    """The mean over the first TOKENS targets, window by window, in float64."""
    tokens = corpus.validation.astype(np.int32)[: TOKENS + 1]
    inputs, targets = tokens[:-1].reshape(-1, CONTEXT), tokens[1:].reshape(-1, CONTEXT)
    logits = np.asarray(model.bind(params)(inputs), np.float64)
    logits -= logits.max(-1, keepdims=True)
    normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(normal, targets[..., None], -1).mean()


def prunable(params):
    named = jp.tree.named_leaves(params).items()
    return {n: np.asarray(x) for n, x in named if jp.tree.prunable(n, x)}


def kept_by_hand(scores, sparsity):
    """Sorts all scores together; the first of equal ones stay."""
    flat = np.concatenate([score.ravel() for score in scores.values()])
    kept = np.zeros(flat.size, bool)
    count = flat.size - round(sparsity * flat.size)
    kept[np.argsort(-flat, kind="stable")[:count]] = True
    parts = np.split(kept, np.cumsum([s.size for s in scores.values()])[:-1])
    return {n: p.reshape(scores[n].shape) for n, p in zip(scores, parts, strict=True)}


def scores_by_hand(criterion, state):
    weights = {n: np.abs(x) for n, x in prunable(state.params).items()}
    if criterion == "magnitude":
        return weights
    square = jp.tree.named_leaves(jp.get_importance(state.opt_state).square)
    # float32 as in the package, so that ties and neighbours are ranked alike.
    power = np.float32(0.25)
    return {n: x * np.asarray(square[n]) ** power for n, x in weights.items()}


def test_the_dense_loss_is_that_of_the_checkpoint(trained):
    seed, model, corpus, state = trained
    assert seed["dense"]["loss"] == pytest.approx(
        mean_loss(model, state.params, corpus), rel=1e-5
    )
    assert seed["curve"][-1]["validation_loss"] == pytest.approx(
        seed["dense"]["loss"], rel=1e-6
    )


@pytest.mark.parametrize(("criterion", "sparsity"), CELLS)
def test_a_cell_is_the_loss_with_the_lowest_scores_at_zero(
    trained, criterion, sparsity
):
    seed, model, corpus, state = trained
    kept = kept_by_hand(scores_by_hand(criterion, state), sparsity)
    names, structure = jp.tree.names(state.params), jax.tree.structure(state.params)
    leaves = [
        np.where(kept.get(name, True), leaf, 0).astype(np.float32)
        for name, leaf in zip(names, jax.tree.leaves(state.params), strict=True)
    ]
    params = jax.tree.unflatten(structure, leaves)
    cell = seed["cells"][CELLS.index((criterion, sparsity))]
    assert cell["loss_pruned"] == pytest.approx(
        mean_loss(model, params, corpus), rel=1e-4
    )
    assert cell["sparsity_by_leaf"].keys() == kept.keys()
    shares = {name: 1 - mask.mean() for name, mask in kept.items()}
    assert cell["sparsity_by_leaf"] == pytest.approx(shares, abs=1e-4)
    removed = sum(round(s * kept[n].size) for n, s in cell["sparsity_by_leaf"].items())
    size = sum(mask.size for mask in kept.values())
    assert removed == round(sparsity * size)
    assert cell["achieved"] == removed / size


def test_the_shown_weights_are_those_of_the_run_and_so_are_their_flags(trained):
    seed, _, _, state = trained
    shown = seed["weights"]
    assert shown["steps"] == [*range(STEPS + 1)]
    places = [name.removesuffix("]").split("[") for name in shown["names"]]
    assert len(places) == sweep.WATCHED_WEIGHTS
    weights = prunable(state.params)
    assert {name for name, _ in places} == weights.keys()
    last = [float(weights[name].ravel()[int(index)]) for name, index in places]
    assert [values[-1] for values in shown["values"]] == last

    # The paper's average, from the values shown: after each step, weighed by sqrt(i).
    weighing = np.sqrt(np.arange(1, STEPS + 1))
    after = np.array(shown["values"])[:, 1:]
    np.testing.assert_allclose(
        shown["averages"], after @ weighing / weighing.sum(), rtol=1e-5, atol=1e-8
    )
    assert shown["sparsity"] == 0.9
    assert shown["kept"].keys() == {"trajectory", "magnitude"}
    for criterion, flags_ in shown["kept"].items():
        kept = kept_by_hand(scores_by_hand(criterion, state), 0.9)
        assert flags_ == [bool(kept[n].ravel()[int(i)]) for n, i in places]
        assert any(flags_)
        assert not all(flags_)


def test_samples_go_on_from_the_validation_text(trained):
    seed, model, corpus, _ = trained
    assert [sample["label"] for sample in seed["samples"]] == [
        "dense",
        "trajectory, 90% removed",
        "trajectory, 90% removed, retrained",
        "magnitude, 90% removed",
    ]
    length = model.config.context // 4
    prompt = corpus.vocabulary.decode(corpus.validation[:length])
    for sample in seed["samples"]:
        assert sample["text"].startswith(prompt)
        assert len(sample["text"]) == length + 8


def test_phases_add_up(undisturbed, results):
    phases = results["phases"]
    names = ["train", "dense", "sample", "control", "prune", "retrain", "weights"]
    assert [(p["seed"], p["name"]) for p in phases] == [
        (seed, name) for seed in SEEDS for name in names
    ]
    assert all(phase["seconds"] > 0 for phase in phases)
    assert sum(phase["seconds"] for phase in phases) < undisturbed[1]
    steps = {"train": STEPS, "control": RETRAIN, "retrain": RETRAIN}
    for phase in phases:
        if phase["name"] in steps:
            tokens = steps[phase["name"]] * BATCH * CONTEXT
            rate = phase["tokens_per_second"]
            assert rate * phase["seconds"] == pytest.approx(tokens)
        else:
            assert phase["tokens_per_second"] is None
        assert phase["peak_memory_bytes"] > 2**20


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
