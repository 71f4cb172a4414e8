"""`jaxprune.lm` in Python: each step takes a model and gives a model."""

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest

from tests.support import tiny_cli
from tests.support.tiny_cli import place, run, weights

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

import jaxprune as jp
import jaxprune.lm as lm
from jaxprune.lm.steps import settings
from jaxprune.lm.torch_models import choosing

__all__ = ["place"]

COMMON = {"model", "out", "plan", "overwrite"}
# Options of a pruning's passes, which Python gives as passes.
PASSES = {"method", "pattern", "allocation", "quantize", "group"}


@pytest.fixture
def model(place):
    return lm.open(place / "model", progress=False)


@pytest.fixture
def texts(place):
    return lm.texts(place / "a.txt", length=16, sequences=8, batch=4)


def options_of(job):
    """The names of a command's options, those of its groups too."""
    for field in dataclasses.fields(job):
        made = field.default_factory
        if dataclasses.is_dataclass(made):
            yield from options_of(made)
        else:
            yield field.name


def arguments_of(*functions):
    names = set().union(*(inspect.signature(f).parameters for f in functions))
    return names - {"texts", "model", "path", "progress", "tokens"}


@pytest.mark.parametrize(
    ("job", "function", "by_passes"),
    [
        (settings.PruneJob, lm.prune, PASSES | {"distributed"}),
        (settings.ShrinkJob, lm.shrink, set()),
        (settings.RecoverJob, lm.recover, set()),
    ],
)
def test_each_option_of_a_command_is_an_argument(job, function, by_passes):
    options = set(options_of(job)) - COMMON - by_passes - {"calibration"}
    arguments = arguments_of(lm.open, lm.texts, function) - {"files", "out"}
    assert options == arguments


def test_prune_recover_and_shrink_are_the_commands_in_one_process(
    place, model, texts, capsys
):
    pruned = lm.prune(model, texts, sparsity=0.5, effort="quick")
    tuned = lm.recover(pruned, texts, teacher=model, steps=3)
    small = lm.shrink(tuned, texts, ffn=0.5)
    words = ["--calibration", place / "a.txt", "--length", 16]
    words += ["--sequences", 8, "--batch", 4]
    one, two, three = (place / name for name in ("one", "two", "three"))
    half = ["--sparsity", 0.5, "--effort", "quick"]
    assert run(capsys, "prune", place / "model", one, *words, *half)[0] == 0
    follow = ["--teacher", place / "model", "--steps", 3]
    assert run(capsys, "recover", one, two, *words, *follow)[0] == 0
    assert run(capsys, "shrink", two, three, *words, "--ffn", 0.5)[0] == 0
    for made, folder in ((pruned, one), (tuned, two), (small, three)):
        expected = weights(folder)
        assert weights(made.path).keys() == expected.keys()
        for name, value in weights(made.path).items():
            np.testing.assert_array_equal(value, expected[name])
    assert small.record["step"] == "shrink"
    assert tuned.record["before"]["method"] == "sparsegpt"


@pytest.mark.full
def test_passes_are_a_name_or_a_chain_with_their_own_settings(model, texts):
    chain = jp.passes.chain(jp.passes.sparsegpt(pattern="2:4"), jp.passes.correct(0.5))
    for passes, pattern in ((chain, "2:4"), ("wanda", "per-output")):
        share = None if passes is chain else 0.5
        pruned = lm.prune(model, texts, passes=passes, sparsity=share)
        assert pruned.record["pattern"] == pattern
        assert pruned.record["achieved"] == 0.5


@pytest.mark.full
def test_a_vocabulary_is_trimmed_and_the_trimmed_model_teaches(model, texts):
    fewer = lm.trim(model, texts, tokens=64)
    assert tiny_cli.config_of(fewer.path)["vocab_size"] == 64
    small = lm.shrink(fewer, texts, heads=0.5)
    tuned = lm.recover(small, texts, teacher=fewer, steps=2)
    assert len(tuned.record["training"]["losses"]) == 2


@pytest.mark.full
def test_results_are_a_table_of_perplexity_bytes_and_speed(place, model, texts):
    small = lm.shrink(model, texts, ffn=0.5)
    results = lm.evaluate([model, small], texts, speed=True)
    for found in results.models.values():
        assert found["texts"]["a.txt"]["perplexity"] > 1
        assert found["tokens_a_second"] > 0
    sizes = [found["bytes"] for found in results.models.values()]
    assert sizes[0] == (place / "model" / "model.safetensors").stat().st_size > sizes[1]
    lines = str(results).splitlines()
    assert lines[0].split() == [
        *("model", "text", "perplexity", "bits/byte", "bytes", "tokens/s")
    ]
    assert len(lines) == 3


def test_a_step_that_is_done_is_not_done_again(place, model, monkeypatch):
    out = place / "once"
    first = lm.prune(model, passes="magnitude", sparsity=0.5, out=out)

    def never(*_):
        raise AssertionError("done again")

    monkeypatch.setattr(choosing, "prepare_step", never)
    again = lm.prune(model, passes="magnitude", sparsity=0.5, out=out)
    assert again == first
    with pytest.raises(AssertionError, match="done again"):
        lm.prune(model, passes="magnitude", sparsity=0.6, out=out)


def test_a_scratch_directory_lives_as_long_as_its_model(model):
    pruned = lm.prune(model, passes="magnitude", sparsity=0.5)
    path = pruned.path
    assert path.is_dir()
    del pruned
    assert not path.exists()


def test_save_copies_all_of_it_and_destroys_nothing(place, model):
    pruned = lm.prune(model, passes="magnitude", sparsity=0.5)
    kept = lm.save(pruned, place / "kept")
    names = [path.name for path in sorted(pruned.path.iterdir())]
    assert [path.name for path in sorted(kept.path.iterdir())] == names
    assert {"jaxprune.json", "report.html", "tokenizer.json"} <= {*names}
    with pytest.raises(ValueError, match="overwrite"):
        lm.save(pruned, place / "kept")
    lm.save(pruned, place / "kept", overwrite=True)


def test_progress_can_be_silent(place, capfd):
    for progress in (True, False):
        model = lm.open(place / "model", progress=progress)
        texts = lm.texts(place / "rows.npy", length=16, sequences=4)
        lm.shrink(model, texts, ffn=0.5)
        out, err = capfd.readouterr()
        assert not out
        assert bool(err) == progress


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: lm.open("nowhere"), "no directory 'nowhere'"),
        (lambda m: lm.texts("a.txt", tokens=512, sequences=2), "give one"),
        (lambda m: lm.shrink(m), "something must be removed"),
        (
            lambda m: lm.prune(m, sparsity=0.5, effort="good", passes="wanda"),
            "leave one",
        ),
        (lambda m: lm.prune(m, lm.texts("none.txt"), sparsity=0.5), "no none.txt"),
    ],
)
def test_what_does_not_fit_is_one_sentence(call, sentence, model):
    with pytest.raises((ValueError, OSError), match=sentence):
        call(model)


def test_tokens_are_sequences_of_a_length():
    texts = lm.texts("a.txt", tokens=131_072)
    assert texts.files == (Path("a.txt"),)
    assert (texts.options["sequences"], texts.options["length"]) == (256, 512)
