"""Texts as they are given: twice, in token ids, not quite Unicode."""

import json
import shutil

import numpy as np
import pytest

from tests.support import tiny_cli, tiny_hf
from tests.support.tiny_cli import place, run

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.prune import prepare_prune
from jaxprune.lm.steps.settings import Calibration, PruneJob, Pruning

__all__ = ["place"]

SMALL = ["--length", "16", "--sequences", "4", "--sparsity", "0.5"]


@pytest.fixture
def rows(tmp_path):
    """Twelve rows of token ids."""
    np.save(tmp_path / "rows.npy", tiny_cli.ids(12 * 16, seed=2).reshape(12, 16))
    return tmp_path / "rows.npy"


def facts_of(model, out, calibration):
    """What decides the result of a pruning."""
    job = PruneJob(
        model=model,
        out=out,
        pruning=Pruning(method="sparsegpt", sparsity=0.5),
        calibration=Calibration(
            calibration=(calibration,), sequences=8, length=16, batch=4
        ),
    )
    return prepare_prune(job, Console(quiet=True)).run.__self__.facts()


def test_a_text_given_twice_is_refused_under_any_name(place, rows, tmp_path, capsys):
    shutil.copy(rows, tmp_path / "copy.npy")
    for other in (rows, tmp_path / "copy.npy"):
        words = ["prune", place / "model", tmp_path / "out", *SMALL, "--plan"]
        code, _, err = run(capsys, *words, "--calibration", rows, other)
        assert code == 1
        assert "each --calibration text must be given once" in err
        assert "rows.npy" in err


def test_half_a_surrogate_pair_is_read_as_one_unknown_character(
    place, tmp_path, capsys
):
    found = []
    for name, odd in (("half", "\ud800"), ("unknown", "\ufffd")):
        text = tmp_path / name / "a.jsonl"
        text.parent.mkdir()
        line = {"text": f"w4 w5 {odd} w6 w7 " * 20}
        text.write_text(json.dumps(line) + "\n")
        code, record, _ = run(
            capsys, "eval", place / "model", "--text", text, "--context", "8"
        )
        assert code == 0
        found.append(record["texts"]["a.jsonl"]["nats"])
    assert found[0] == found[1]


def test_another_configuration_is_another_job(place, tmp_path):
    model = tiny_cli.model(tmp_path / "model")
    before = facts_of(model, tmp_path / "out", place / "a.txt")
    tiny_hf.edit(model, rms_norm_eps=1e-3)
    assert facts_of(model, tmp_path / "out", place / "a.txt") != before


def test_magnitude_needs_no_batches_of_one_shape(place, tmp_path, capsys):
    words = ["prune", place / "model", tmp_path / "out", "--plan", "--sparsity"]
    words += ["0.5", "--method", "magnitude", "--batch", "3"]
    words += ["--evaluate", place / "a.txt"]
    code, *_ = run(capsys, *words, "--length", "16")
    assert code == 0


def test_a_model_type_that_is_no_word_is_refused(rows, tmp_path, capsys):
    model = tiny_cli.model(tmp_path / "model")
    tiny_hf.edit(model, model_type=["x"])
    words = ["prune", model, tmp_path / "out", *SMALL, "--calibration", rows]
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "Traceback" not in err


def test_a_seed_of_more_bits_than_jax_reads_is_refused(place, capsys):
    code, _, err = run(
        capsys, "sample", place / "model", "--prompt", "w4", "--seed", 2**32
    )
    assert code == 1
    assert "--seed must be from 0 to 2**32 - 1" in err
