"""`--recover-teacher`: another model than that before the job is followed."""

import json
import shutil

import numpy as np
import pytest

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import place, run, shrink
from tests.support.tiny_tokenizers import model_folder, text

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm.steps import inputs, model_pruning

__all__ = ["place"]

SMALL = ("--length", "16", "--sequences", "8", "--limit", "4", "--any-perplexity")
STEPS = ("--recover-steps", "3", "--recover-learning-rate", "1e-2")
HALF = ("--method", "magnitude", "--sparsity", "0.5")


def prune(capsys, place, model, out, *options):
    words = (*SMALL, *HALF, "--calibration", place / "a.txt", *options)
    return run(capsys, "prune", place / model, place / out, *words)


def assert_equal_weights(one, other):
    one, other = tiny_cli.weights(one), tiny_cli.weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


@pytest.mark.full
def test_pruned_and_then_recovered_by_the_dense_model_is_as_at_once(capsys, place):
    assert prune(capsys, place, "model", "at-once", *STEPS)[0] == 0
    assert prune(capsys, place, "model", "pruned")[0] == 0
    # Of what is pruned already the same half is pruned.
    teacher = ("--recover-teacher", place / "model")
    code, record, _ = prune(capsys, place, "pruned", "later", *STEPS, *teacher)
    assert code == 0
    assert record["distillation"]["teacher"] == str(place / "model")
    assert_equal_weights(place / "at-once", place / "later")
    # The pruned model itself has nothing to teach but itself.
    code, record, _ = prune(capsys, place, "pruned", "by-itself", *STEPS)
    assert code == 0
    assert record["distillation"]["losses"][0] == pytest.approx(0, abs=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("top", [(), ("--recover-top", "0")])
def test_the_teacher_gets_the_tokens_that_stay(capsys, tmp_path, top):
    model_folder(tmp_path / "model", "byte-level", "llama-3")
    (tmp_path / "a.txt").write_text(text(1500))
    words = ("--length", "32", "--context", "32", "--sequences", "8")
    words += ("--any-perplexity", "--calibration", tmp_path / "a.txt", "--vocab", "320")
    words += ("--ffn", "0.5", "--speed-rounds", "0", *STEPS, *top)
    teacher = ("--recover-teacher", tmp_path / "model")
    model = tmp_path / "model"
    assert shrink(capsys, model, tmp_path / "without", *words)[0] == 0
    assert shrink(capsys, model, tmp_path / "with", *words, *teacher)[0] == 0
    assert_equal_weights(tmp_path / "without", tmp_path / "with")


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
def test_a_teacher_with_other_tokens_is_refused(capsys, place, tmp_path, change):
    shutil.copytree(place / "model", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    change(tokenizer)
    file.write_text(json.dumps(tokenizer))
    teacher = ("--recover-teacher", tmp_path / "other")
    code, _, err = prune(capsys, place, "model", "refused", *STEPS, *teacher)
    assert code == 1
    assert "--recover-teacher must have the model's tokens, but " in err
    assert "give a model of the same tokenizer" in err
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"vocab_size": 64}, (), "as many logits as the model, but '{}' has 64 and"),
        ({"max_position_embeddings": 8}, (), "but the context of '{}' is 8"),
        (
            {"hidden_size": 48},
            ("--recover-hidden", "1"),
            "'{}' has 48 channels and the model 32; leave it out",
        ),
    ],
    ids=["logits", "context", "width"],
)
def test_a_teacher_that_does_not_fit_is_refused_before_a_text_is_read(
    capsys, place, tmp_path, monkeypatch, changes, options, words
):
    def never(*_):
        raise AssertionError("a text was read")

    monkeypatch.setattr(inputs, "read_texts", never)
    other = tmp_path / "other"
    tiny_hf.random_folder("llama", other, **{"vocab_size": tiny_cli.WORDS, **changes})
    teacher = ("--recover-teacher", other, *options)
    code, _, err = prune(capsys, place, "model", "refused", *STEPS, *teacher)
    assert code == 1
    assert words.format(other) in err


def test_what_is_learned_from_texts_follows_no_teacher(capsys, place):
    words = ("--recover-teacher", place / "model", "--recover-by", "retraining")
    code, _, err = prune(capsys, place, "model", "refused", *STEPS, *words)
    assert code == 1
    assert "so it needs --recover-by distillation" in err


@pytest.mark.full
def test_a_teacher_that_changed_is_not_followed_by_what_it_said(
    capsys, place, tmp_path, monkeypatch
):
    teacher = tmp_path / "teacher"
    shutil.copytree(place / "model", teacher)
    words = (*STEPS, "--recover-teacher", teacher)

    def full(*_, **__):
        raise OSError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(model_pruning, "write_pruned", full)
        assert prune(capsys, place, "model", "changed", *words)[0] == 1
    tiny_hf.edit(teacher, rms_norm_eps=0.5)
    code, changed, err = prune(capsys, place, "model", "changed", *words)
    assert code == 0, err
    code, afresh, _ = prune(capsys, place, "model", "afresh", *words)
    assert code == 0
    assert changed["distillation"]["losses"] == afresh["distillation"]["losses"]
