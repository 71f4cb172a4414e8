"""`jaxprune recover`: a pruned or smaller model follows a teacher, or learns texts."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import place, run

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm import cli
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.recovery import predictions, retrain
from jaxprune.lm.recovery.checkpoints import Checkpoints
from jaxprune.lm.steps import family_step

__all__ = ["place"]

STEPS = ("--steps", "3", "--learning-rate", "1e-2")
SHORT = ("--length", "16", "--sequences", "8", "--batch", "4")


@pytest.fixture(scope="module")
def pruned(place):
    """The model with half of its matrices' weights at zero."""
    words = ["prune", place / "model", place / "pruned", "--method", "magnitude"]
    assert cli.main([*map(str, words), "--sparsity", "0.5"]) == 0
    return place / "pruned"


@pytest.fixture
def recover(capsys, place, pruned):
    """`recover` of the pruned model on a text, after the dense one."""

    def recovered(out, *options, model=pruned, teacher=place / "model", text="a.txt"):
        words = [*SHORT, *STEPS, "--calibration", place / text, *options]
        words += [] if teacher is None else ["--teacher", teacher]
        return run(capsys, "recover", model, place / out, *words)

    return recovered


def test_a_distillation_moves_all_but_the_zeros(place, pruned, recover, capsys):
    code, record, err = recover("distilled", "--steps", "20")
    assert code == 0, err
    assert record["achieved"] == 0.5
    assert record["tensors"].keys() == tiny_cli.MATRICES.keys()
    assert record["training"]["teacher"] == str(place / "model")
    assert record["before"]["method"] == "magnitude"
    losses = record["training"]["losses"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    after = tiny_cli.weights(place / "distilled")
    for name, value in tiny_cli.weights(pruned).items():
        assert (after[name] != value).any()
        if name in tiny_cli.MATRICES:
            np.testing.assert_array_equal(after[name] == 0, value == 0)
    (measured,) = record["perplexity"].values()
    assert measured["role"] == "held out from calibration"
    (place / "end.txt").write_text(" ".join(tiny_cli.text(900).split()[-90:]))
    for stage, folder in (("before", pruned), ("recovered", place / "distilled")):
        again = run(capsys, "eval", folder, "--text", place / "end.txt")[1]
        expected = again["texts"]["end.txt"]["nats"]
        assert measured[stage]["nats"] == pytest.approx(expected, rel=1e-5)
    assert measured["recovered"]["nats"] < measured["before"]["nats"]
    page = (place / "distilled" / "report.html").read_text()
    assert f"20 steps of training after {place / 'model'}" in page


def test_a_model_follows_itself_without_a_loss(place, recover, pruned):
    _, record, _ = recover("by-itself", teacher=pruned)
    assert record["training"]["losses"][0] == pytest.approx(0, abs=1e-6)


@pytest.mark.full
def test_without_a_teacher_the_matrices_learn_the_text(place, pruned, recover):
    code, record, _ = recover("retrained", teacher=None)
    assert code == 0
    assert record["method"] == "retraining"
    after = tiny_cli.weights(place / "retrained")
    for name, value in tiny_cli.weights(pruned).items():
        if name in tiny_cli.MATRICES:
            np.testing.assert_array_equal(after[name] == 0, value == 0)
            assert (after[name] != value)[value != 0].mean() > 0.9
        else:
            np.testing.assert_array_equal(after[name], value)


@pytest.mark.full
@pytest.mark.parametrize("trained", ["norms", "matrices", "lora"])
def test_a_part_can_be_trained_alone(place, pruned, recover, trained):
    assert recover(f"only-{trained}", "--train", trained)[0] == 0
    after = tiny_cli.weights(place / f"only-{trained}")
    for name, value in tiny_cli.weights(pruned).items():
        expected = ("norm" in name) if trained == "norms" else ("_proj" in name)
        assert (value != after[name]).any() == expected


@pytest.mark.full
def test_a_smaller_model_follows_the_one_before(place, recover, capsys):
    words = ("shrink", place / "model", place / "small", "--ffn", "0.5")
    assert run(capsys, *words)[0] == 0
    assert recover("small-recovered", model=place / "small")[0] == 0
    config = tiny_cli.config_of(place / "small-recovered")
    assert config["intermediate_size"] == 24


@pytest.mark.full
def test_texts_are_learned_beside_own_text_that_is_followed(
    recover, place, monkeypatch
):
    given = []
    keep = predictions.from_predictions
    monkeypatch.setattr(
        predictions,
        "from_predictions",
        lambda kept, **options: (
            given.append((kept, options["text"])) or keep(kept, **options)
        ),
    )
    words = ["--calibration", place / "a.txt", "self", "--text-share", "0.75"]
    code, record, err = recover("learned", *words)
    assert code == 0, err
    assert record["calibration"]["self"] == 4
    assert record["training"]["text_share"] == 0.75
    ((kept, shares),) = given
    np.testing.assert_array_equal(shares, [0.75] * 4 + [0] * 4)
    assert len(kept.places) == 8
    assert np.isfinite(record["training"]["losses"]).all()


@pytest.mark.full
def test_the_teacher_writes_its_own_text(recover, place, pruned, monkeypatch):
    writers = []
    write = family_step.self_calibration

    def writes(model, **options):
        writers.append(np.asarray(model.layers[0].mlp.down.kernel[...]))
        return write(model, **options)

    monkeypatch.setattr(family_step, "self_calibration", writes)
    assert recover("written", "--calibration", "self")[0] == 0
    dense = tiny_cli.weights(place / "model")["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(writers, [dense.T])


@pytest.mark.full
def test_rows_that_measure_the_model_are_not_trained_on(recover, monkeypatch, place):
    trained = []
    ours = retrain.retrain

    def spied(model, names, sequences, *rest, **options):
        trained.append(sequences)
        return ours(model, names, sequences, *rest, **options)

    monkeypatch.setattr(retrain, "retrain", spied)
    code, record, _ = recover("apart", "--sequences", "4", text="rows.npy")
    assert code == 0
    rows = {tuple(row) for row in np.load(place / "rows.npy").tolist()}
    assert {tuple(row) for row in trained[0].tolist()} < rows
    assert record["perplexity"]["rows.npy"]["before"]["windows"] == 4


@pytest.mark.full
def test_the_learning_rate_is_relative_unless_it_is_a_number(
    capsys, place, pruned, monkeypatch
):
    rates = []
    ours = retrain.retrain

    def spied(model, names, sequences, settings, **options):
        rates.append((settings.relative, settings.learning_rate))
        return ours(model, names, sequences, settings, **options)

    monkeypatch.setattr(retrain, "retrain", spied)
    words = ("--steps", 1, "--calibration", place / "rows.npy", "--length", 16)
    words = (*words, "--sequences", 4, "--batch", 4)
    for number, rate in enumerate(
        [(), ("--train", "lora"), ("--learning-rate", "2e-3")]
    ):
        out = place / f"rate{number}"
        assert run(capsys, "recover", pruned, out, *words, *rate)[0] == 0
    assert rates == [(True, 2e-3), (False, 3e-5), (False, 2e-3)]


@pytest.mark.full
def test_a_killed_recovery_goes_on_to_the_same_bytes(place, recover, monkeypatch):
    assert recover("whole")[0] == 0

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "due", lambda _: True)
        patched.setattr(Checkpoints, "write", dies)
        assert recover("killed")[0] == 130
    assert recover("killed", "--seed", "1")[0] == 1  # which is another training
    assert recover("killed")[0] == 0
    expected = tiny_cli.weights(place / "whole")
    for name, value in tiny_cli.weights(place / "killed").items():
        np.testing.assert_array_equal(expected[name], value)


@pytest.mark.full
def test_zeros_of_an_earlier_step_stay_where_nobody_looks(tmp_path, capsys, place):
    model = tiny_cli.model(tmp_path / "model", layers=2)
    name = "model.layers.1.mlp.up_proj.weight"
    stored = tiny_cli.weights(model)
    stored[name][:, ::2] = 0
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    words = (*SHORT, *STEPS, "--calibration", place / "a.txt")
    assert run(capsys, "recover", model, tmp_path / "out", *words)[0] == 0
    after = tiny_cli.weights(tmp_path / "out")[name]
    assert (after[:, ::2] == 0).all()
    assert (after[:, 1::2] != stored[name][:, 1::2]).any()


def test_weights_on_levels_are_not_trained(place, capsys):
    words = ("--sparsity", "0.5", "--quantize", "int4", "--group", "16")
    words = (*words, "--method", "wanda", "--calibration", place / "rows.npy")
    words = (*words, "--length", "16", "--sequences", "8")
    assert run(capsys, "prune", place / "model", place / "int4", *words)[0] == 0
    words = ("recover", place / "int4", place / "off", "--calibration", place / "a.txt")
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "recover first and quantize last" in err


def swapped(tokenizer):
    """Two words have each other's ids."""
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w4"], vocabulary["w5"] = vocabulary["w5"], vocabulary["w4"]


def added(tokenizer):
    """One more token that texts are searched for."""
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token |= {"id": 4, "content": "<tool>", "special": True}
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or ()), token]


@pytest.mark.parametrize("change", [swapped, added])
def test_a_teacher_with_other_tokens_is_refused(recover, place, tmp_path, change):
    shutil.copytree(place / "model", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    change(tokenizer)
    file.write_text(json.dumps(tokenizer))
    code, _, err = recover("refused", teacher=tmp_path / "other")
    assert code == 1
    assert "--teacher must have the model's tokens, but " in err
    assert "give a model of the same tokenizer" in err
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 64}, "as many logits as the model, but '{}' has 64 and"),
        ({"max_position_embeddings": 8}, "but the context of '{}' is 8"),
    ],
    ids=["logits", "context"],
)
def test_a_teacher_that_does_not_fit_is_refused(recover, tmp_path, changes, words):
    other = tmp_path / "other"
    tiny_hf.random_folder("llama", other, **{"vocab_size": tiny_cli.WORDS, **changes})
    code, _, err = recover("refused", teacher=other)
    assert code == 1
    assert words.format(other) in err


@pytest.mark.full
def test_a_teacher_that_changed_is_refused_where_its_predictions_lie(
    recover, place, tmp_path, monkeypatch
):
    teacher = tmp_path / "teacher"
    shutil.copytree(place / "model", teacher)

    def full(*_, **__):
        raise OSError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(rewrite, "write_directory", full)
        assert recover("changed", teacher=teacher)[0] == 1
    tiny_hf.edit(teacher, rms_norm_eps=0.5)
    code, _, err = recover("changed", teacher=teacher)
    assert code == 1
    assert "teacher" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "recover trains on texts, got none"),
        (("--calibration", "a.txt", "--steps", "0"), "--steps must be at least 1"),
        (("--calibration", "self"), "what the teacher writes; give --teacher too"),
        (("--calibration", "a.txt", "--text-share", "0.5"), "so it needs --teacher"),
        (
            ("--calibration", "a.txt", "--teacher", "model", "--text-share", "1"),
            "learns the texts and follows nothing",
        ),
        (
            ("--calibration", "a.txt", "--teacher", "model", "--text-share", "2"),
            "--text-share must be from 0 to 1, got 2",
        ),
        (
            ("--calibration", "a.txt", "--learning-rate", "0"),
            "--learning-rate must be in (0, 1), got 0",
        ),
    ],
)
def test_bad_words_are_refused_and_nothing_is_written(
    words, sentence, place, pruned, capsys, monkeypatch
):
    monkeypatch.chdir(place)
    before = sorted(path.name for path in place.iterdir())
    code, _, err = run(capsys, "recover", pruned, "free", *words)
    assert code == 1
    assert sentence in err
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_plan_says_what_would_be_trained(place, pruned, capsys):
    words = ["recover", pruned, place / "free", "--calibration", place / "a.txt"]
    words += ["--teacher", place / "model", "--length", "16", "--sequences", "8"]
    assert cli.main([*map(str, words), "--plan"]) == 0
    said = capsys.readouterr().out
    assert f"after {place / 'model'} in 256 steps (all, batch 1)" in said
    assert said.endswith("nothing was written\n")
    assert not (place / "free").exists()
