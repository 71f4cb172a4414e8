"""What an experiment refuses before it trains, and what it must not mix up."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import (
    finetuned_llm,
    gpt,
    phi3_vision,
    prune_while_training,
    scaled_down_llm,
)
from experiments.harness import records, runner
from experiments.harness.option_rules import check_lists
from experiments.harness.progress import Progress
from experiments.phi3_vision import presets
from experiments.phi3_vision.checkpoint import vision_config
from experiments.phi3_vision.question_answers import Asked
from experiments.phi3_vision.task import PictureTask
from experiments.phi3_vision.vision_model import Tokenizer, VisionModel
from experiments.prune_while_training.run import Run
from experiments.tasks.finetuning import Texts
from experiments.tasks.language_task import LanguageTask
from tests.support.tiny_run import flags, write_text


def test_a_low_rank_change_has_no_moments_to_prune_gradually_by():
    config = phi3_vision.Config(lora=2, criteria=("magnitude", "gradual"))
    with pytest.raises(ValueError, match="with --lora there are none"):
        config.plan()
    assert dataclasses.replace(config, retrain_steps=0).plan()


def test_seeds_under_zero_are_refused():
    config = scaled_down_llm.Config(seeds=(0, -1))
    with pytest.raises(ValueError, match="seeds must be at least 0"):
        check_lists(config, "seeds")


@pytest.mark.parametrize("country", ["FR", "XXX", ""])
def test_a_country_of_unknown_electricity_is_refused_at_the_start(country, tmp_path):
    pytest.importorskip("codecarbon")
    text, out = write_text(tmp_path / "a.txt"), tmp_path / "out"
    arguments = flags(text, out, "--energy", country)
    with pytest.raises(ValueError, match="a country's code of three letters"):
        scaled_down_llm.main(tyro.cli(scaled_down_llm.Config, args=arguments))
    assert not out.exists()
    records.check_country("fra")


def test_a_directory_is_of_one_experiment(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Config:
        out: object = tmp_path / "out"

    def run(name):
        content = {"cells": []}
        return runner.run(
            name, Config(), {}, lambda: content, lambda *_: "", grows=True
        )

    run("prune_while_training")
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(ValueError, match="holds the results of prune_while_training"):
        run("scaled_down_llm")
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_a_foreign_text_called_train_hides_no_other():
    a, held, other = (np.arange(n, dtype=np.int32) for n in (50, 5, 9))
    fingerprints = {
        finetuned_llm._texts_fingerprint(Texts(train, held, {"train": other}))
        for train in (a, a + 1)
    }
    assert len(fingerprints) == 2


@pytest.mark.parametrize("losses", [[1.0, np.inf], [1.0, np.nan]])
def test_the_loss_that_is_not_finite_is_told(losses):
    with Progress("train", None, start=0, steps=2) as progress:
        for loss in losses:
            progress.add(jnp.float32(loss), 1)
        progress.close(2)
        with pytest.raises(FloatingPointError, match=f"got {losses[1]} at step 2"):
            progress.finish()


def test_a_character_that_the_text_does_not_have_is_shown_as_unknown(tmp_path):
    corpus = scaled_down_llm.load(text=write_text(tmp_path / "a.txt"))
    count = len(corpus.vocabulary)

    class Model:
        def sample(self, params, prompt, length):
            return np.array([0, count, count + 7])

    Model.config = gpt.preset("cpu", vocab_size=count)
    text = LanguageTask(Model(), corpus).shown(None, "dense", 3)["text"]
    assert text.endswith(corpus.vocabulary.decode([0]) + "\ufffd\ufffd")


def test_of_two_rates_none_is_taken_without_the_seed_that_chooses(tmp_path):
    config = prune_while_training.Config(
        out=tmp_path,
        text=write_text(tmp_path / "a.txt"),
        seeds=(1,),
        steps=(20,),
        learning_rates=(1e-3,),  # of several, it would train with each
    )
    run = Run(config, prune_while_training.run.load(config.data, text=config.text))
    row = {
        "method": "dense", "sparsity": 0.0, "steps": 20, "after_dense": 0,
        "distill": 0.0, "learning_rate": 3e-3, "seed": 1, "loss": 2.0,
    }  # fmt: skip
    run.found = lambda: [row]
    with pytest.raises(ValueError, match=r"learning rate of .*0.003.* tune_seeds 0"):
        run.rate("dense", 20, 0, 0.0)


def test_the_control_may_have_peaks_of_its_own(tmp_path):
    config = prune_while_training.Config(
        out=tmp_path,
        text=write_text(tmp_path / "a.txt"),
        learning_rates=(1e-3,),
        control_rates=(5e-3,),
    )
    run = Run(config, prune_while_training.run.load(config.data, text=config.text))
    assert run.rate("dense", 20, 0, 0.0) == 5e-3
    assert run.rate("once", 20, 0, 0.0) == 1e-3
    for wrong, sentence in (((), "at least one"), ((0.0,), "over 0, got 0")):
        with pytest.raises(ValueError, match=sentence):
            dataclasses.replace(config, control_rates=wrong).check()


def test_a_batch_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch"):
        prune_while_training.Config(out=tmp_path, batch_size=0).check()


@pytest.mark.parametrize("strips", [False, True])
def test_an_answer_is_counted_where_it_stands(strips):
    """A tokenizer of Llama's kind splits a word by itself in another way."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = [*map(chr, range(32, 127)), "\n", "\u2581"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", *letters])}
    merges = [("\u2581", "T"), ("\u2581T", "h"), ("\u2581Th", "u"), ("T", "h")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>")
    )
    made.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Prepend("\u2581"),
            tokenizers.normalizers.Replace(" ", "\u2581"),
        ]
    )
    made.add_special_tokens(
        [
            tokenizers.AddedToken(word, rstrip=strips, normalized=False, special=True)
            for word in ("<|user|>", "<|end|>", "<|assistant|>")
        ]
    )
    tokenizer = Tokenizer(
        lambda text: made.encode(text, add_special_tokens=False).ids, made.decode, 1
    )
    shape = vision_config(presets.PRESETS["smoke"])
    shape = dataclasses.replace(shape, crops=2)
    asked = Asked(np.zeros((28, 56, 3), np.uint8), "What?", "Thu")
    task = PictureTask(VisionModel(shape), tokenizer, [asked], [asked])
    _, targets, weights = task.packed([asked])
    counted = made.decode(targets[0][weights[0] > 0].tolist()).replace(" ", "")
    assert counted.replace("\u2581", "") == "Thu"
