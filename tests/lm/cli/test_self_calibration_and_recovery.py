"""`--calibration self` and recoveries: what moves, what is kept, what is told."""

import time

import numpy as np
import pytest

from tests.support import resumed, tiny_cli
from tests.support.tiny_cli import place, run, shrink

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm import cli
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.corpora.self_calibration import self_calibration
from jaxprune.lm.models import hf
from jaxprune.lm.recovery import predictions
from jaxprune.lm.recovery.checkpoints import Checkpoints
from jaxprune.lm.steps import model_pruning as command

__all__ = ["place"]

SMALL = ["--length", "16", "--sequences", "8", "--limit", "4"]
WANDA = ["--method", "wanda", "--sparsity", "0.5"]


def prune(capsys, place, out, *options):
    return run(capsys, "prune", place / "model", place / out, *SMALL, *options)


@pytest.mark.full
def test_a_distillation_leaves_the_zeros_of_an_earlier_job(capsys, place):
    how = ["--method", "magnitude", "--sparsity", "0.5"]
    assert prune(capsys, place, "half", *how, "--exclude", "*mlp*")[0] == 0
    more = ["--exclude", "*self_attn*", "--calibration", place / "a.txt"]
    more += ["--recover-steps", "2", "--recover-learning-rate", "1e-2"]
    words = [place / "half", place / "again", *SMALL, *how, *more]
    assert run(capsys, "prune", *words)[0] == 0
    before, after = tiny_cli.weights(place / "half"), tiny_cli.weights(place / "again")
    for name in tiny_cli.MATRICES:
        assert (after[name] == 0).mean() == 0.5, name
        if "self_attn" in name:
            np.testing.assert_array_equal(after[name] == 0, before[name] == 0)
            assert (after[name] != before[name]).any()


@pytest.mark.full
def test_texts_are_learned_beside_own_text_that_is_followed(capsys, place, monkeypatch):
    texts = []

    keep = predictions.from_predictions
    monkeypatch.setattr(
        predictions,
        "from_predictions",
        lambda kept, **options: (
            texts.append((kept, options["text"])) or keep(kept, **options)
        ),
    )
    more = ["--calibration", place / "b.txt", "self", "--recover-text", place / "a.txt"]
    more += ["self", "--recover-text-share", "0.75", "--recover-steps", "2"]
    code, found, _ = prune(capsys, place, "learned", *WANDA, *more)
    assert code == 0
    record = found["distillation"]
    assert (record["texts"], record["text_share"]) == (["a.txt", "self"], 0.75)
    # 2 steps of 4 sequences: as many of the text as of what the model wrote.
    ((kept, shares),) = texts
    np.testing.assert_array_equal(shares, [0.75] * 4 + [0] * 4)
    assert len(kept.places) == 8
    assert np.isfinite(record["losses"]).all()


@pytest.fixture(scope="module")
def by_itself(place):
    """Pruned on what the model writes itself, no text being given."""
    out = place / "by_itself"
    words = ["prune", str(place / "model"), str(out), *SMALL, *WANDA]
    assert cli.main([*words, "--calibration", "self"]) == 0
    return out, rewrite.read_provenance(out, verify=True)


@pytest.mark.full
def test_the_record_says_that_the_model_wrote_its_calibration(by_itself):
    used = by_itself[1]["calibration"]
    assert (used["self"], used["sequences"], used["files"]) == (8, 8, [])
    assert not by_itself[1]["perplexity"]


@pytest.mark.full
def test_without_a_text_the_model_writes_its_own(place, by_itself, capsys):
    code, record, err = prune(capsys, place, "default", *WANDA)
    assert code == 0
    assert "what the model writes itself" in err
    assert record["calibration"]["self"] == 8
    tiny = tiny_cli.weights(place / "default")
    for name, value in tiny_cli.weights(by_itself[0]).items():
        np.testing.assert_array_equal(tiny[name], value)


@pytest.mark.full
def test_what_it_writes_is_one_part_of_a_mixture(place, capsys, monkeypatch):
    seen, embedded = [], command.hf.embedded

    def noted(model, names, config, part, dtype):
        seen.append(part)
        return embedded(model, names, config, part, dtype)

    monkeypatch.setattr(command.hf, "embedded", noted)
    few = np.load(place / "rows.npy") % 5 + 10  # of the tokens 10 to 14
    np.save(place / "few.npy", few)
    texts = ["--calibration", place / "few.npy", "self", "--any-perplexity"]
    code, record, err = prune(capsys, place, "mixed", *WANDA, *texts)
    assert code == 0, err
    used = record["calibration"]
    assert (used["self"], used["sequences"]) == (4, 8)
    assert [of["sequences"] for of in used["files"]] == [4]
    rows, calibrated = {tuple(row) for row in few.tolist()}, np.concatenate(seen)
    assert [tuple(row) in rows for row in calibrated.tolist()] == [True, False] * 4
    written = calibrated[1::2]
    assert set(written[:, 1]) <= set(range(10, 15))  # after BOS, a token of the text
    assert len(np.unique(written)) > 5


@pytest.mark.full
@pytest.mark.parametrize("after", ["written", "pruned"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    place, by_itself, capsys, monkeypatch, after
):
    out = f"killed-{after}"
    words = [*WANDA, "--calibration", "self"]
    owner, name = command.passes, "prune_states"
    if after == "pruned":
        owner, name = command, "describe_pruning"

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dies)
        assert prune(capsys, place, out, *words)[0] == 130

    def never(*args, **options):
        raise AssertionError("written again")

    monkeypatch.setattr("jaxprune.lm.corpora.self_calibration.generate", never)
    assert prune(capsys, place, out, *words)[0] == 0
    found = tiny_cli.weights(place / out)
    for name, value in tiny_cli.weights(by_itself[0]).items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.full
def test_another_recovery_goes_on_with_what_was_pruned(place, capsys, monkeypatch):
    words = [*WANDA, "--calibration", place / "rows.npy"]
    words += ["--recover-train", "matrices"]

    def recovered(out, rate, by):
        settings = ["--recover-by", by, "--recover-steps", "3"]
        settings += ["--recover-learning-rate", rate]
        return prune(capsys, place, out, *words, *settings)[0]

    assert recovered("at-once", "1e-3", "distillation") == 0

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "due", lambda _: True)
        patched.setattr(Checkpoints, "write", dies)
        assert recovered("changed", "1e-2", "retraining") == 130
        assert recovered("changed", "1e-2", "distillation") == 130
    # The seed decides what was pruned.
    assert prune(capsys, place, "changed", *words, "--seed", "1")[0] == 1
    done = resumed.reads(monkeypatch)
    assert recovered("changed", "1e-3", "distillation") == 0
    assert done[:2] == [True, True]  # the first two segments
    found = tiny_cli.weights(place / "changed")
    for name, value in tiny_cli.weights(place / "at-once").items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.full
def test_an_edited_text_begins_the_recovery_anew(place, capsys, tmp_path, monkeypatch):
    learned = tmp_path / "learned.txt"
    words = [*WANDA, "--calibration", place / "rows.npy", "--recover-text", learned]
    words += ["--recover-steps", "3"]

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "due", lambda _: True)
        patched.setattr(Checkpoints, "write", dies)
        learned.write_text(tiny_cli.text(900, seed=3))
        assert prune(capsys, place, "edited", *words)[0] == 130
    learned.write_text(tiny_cli.text(900, seed=4))
    done = resumed.reads(monkeypatch)
    assert prune(capsys, place, "edited", *words)[0] == 0
    assert done[:2] == [True, True]  # what was pruned stays
    assert prune(capsys, place, "anew", *words)[0] == 0
    found = tiny_cli.weights(place / "edited")
    for name, value in tiny_cli.weights(place / "anew").items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.full
def test_a_model_loses_neurons_by_what_it_writes_as_by_the_same_token_ids(
    place, capsys
):
    short = ["--ffn", "0.5", "--length", "16", "--any-perplexity"]
    words = [*short, "--sequences", "8", "--calibration"]
    start = time.perf_counter()
    by_text = shrink(capsys, place / "model", place / "text", *words, "self")
    assert by_text[0] == 0
    # No phase lies in another, so no second counts twice.
    assert by_text[1]["seconds"] <= time.perf_counter() - start
    names = [phase["name"] for phase in by_text[1]["phases"]]
    assert names.index("write calibration") < names.index("shrink")
    assert by_text[1]["calibration"]["self"] == 8
    written = self_calibration(
        hf.load(place / "model").model,
        sequences=8,
        length=16,
        bos=1,
        never_first={0, 1, 2},
    )
    np.save(place / "written.npy", written)
    words.append(place / "written.npy")
    assert shrink(capsys, place / "model", place / "ids", *words)[0] == 0
    same = tiny_cli.weights(place / "ids")
    for name, value in tiny_cli.weights(place / "text").items():
        np.testing.assert_allclose(value, same[name], rtol=1e-3, atol=1e-5)


@pytest.mark.full
def test_the_effort_best_trains_on_its_own_text_too(place, capsys):
    rows = place / "rows.npy"
    texts = ["--sparsity", "0.5", "--calibration", rows]
    code, record, _ = prune(capsys, place, "best", "--effort", "best", *texts)
    assert code == 0
    assert record["method"] == "alps"
    assert record["calibration"]["self"] == 4
    assert record["distillation"]["texts"] == ["rows.npy", "self"]
    words = ["--method", "alps", *texts, "self"]
    words += ["--recover-steps", "256", "--recover-batch", "1"]
    words += ["--recover-train", "matrices", "--recover-text", rows, "self"]
    assert prune(capsys, place, "in_words", *words)[0] == 0
    same = tiny_cli.weights(place / "in_words")
    for name, value in tiny_cli.weights(place / "best").items():
        np.testing.assert_array_equal(value, same[name])
