"""`--calibration self`: a model is pruned and made smaller by what it writes."""

import time

import numpy as np
import pytest

from tests.support import tiny_cli
from tests.support.tiny_cli import place, run, shrink

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm import cli
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.corpora.self_calibration import self_calibration
from jaxprune.lm.models import hf
from jaxprune.lm.steps import prune as command

__all__ = ["place"]

SMALL = ["--length", "16", "--sequences", "8"]
WANDA = ["--method", "wanda", "--sparsity", "0.5"]


def prune(capsys, place, out, *options):
    return run(capsys, "prune", place / "model", place / out, *SMALL, *options)


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
    texts = ["--calibration", place / "few.npy", "self"]
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
    owner, name = command.jp, "prune_trained"
    if after == "pruned":
        owner, name = command, "describe_pruning"

    def dies(*_, **__):
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
def test_a_model_loses_neurons_by_what_it_writes_as_by_the_same_token_ids(
    place, capsys
):
    short = ["--ffn", "0.5", "--length", "16"]
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
def test_the_effort_best_calibrates_on_its_own_text_too(place, capsys):
    rows = place / "rows.npy"
    texts = ["--sparsity", "0.5", "--calibration", rows]
    code, record, _ = prune(capsys, place, "best", "--effort", "best", *texts)
    assert code == 0
    assert record["method"] == "alps"
    assert record["calibration"]["self"] == 4
    words = ["--method", "alps", *texts, "self"]
    assert prune(capsys, place, "in_words", *words)[0] == 0
    same = tiny_cli.weights(place / "in_words")
    for name, value in tiny_cli.weights(place / "best").items():
        np.testing.assert_array_equal(value, same[name])
