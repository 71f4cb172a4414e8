"""`--effort`: the job that a word stands for, and what it does not go with."""

from pathlib import Path

import pytest

from tests.support.tiny_cli import place

pytest.importorskip("tyro")

from jaxprune.lm.steps.effort import choose_by_effort
from jaxprune.lm.steps.prune_settings import (
    PruneDevices,
    PruneJob,
    Pruning,
    Quantization,
)
from jaxprune.lm.steps.recovery_settings import Recovery

import jaxprune as jp
from jaxprune.lm.steps import effort
from jaxprune.lm.steps.passes import choose_pass
from jaxprune.lm.steps.settings import SELF, Calibration
from jaxprune.posttraining.passes.efforts import LEVELS

__all__ = ["place"]

TEXT = Path("a.txt")


@pytest.fixture
def model(place):
    return place / "model"


def job_of(level, model=Path("M"), **groups):
    pruning = Pruning(effort=level, sparsity=0.5)
    calibration = Calibration(calibration=(TEXT,))
    fields = {"pruning": pruning, "calibration": calibration, **groups}
    return PruneJob(model=model, out=Path("O"), **fields)


@pytest.mark.parametrize("level", LEVELS)
def test_the_command_and_python_do_the_same_passes(level):
    chosen = choose_pass(choose_by_effort(job_of(level), writes=False))
    assert chosen.chain == jp.passes.effort(level)


@pytest.mark.parametrize("level", LEVELS)
def test_more_effort_does_more(level, model):
    """The levels that docs/results has: a solver, the stronger one, and training."""
    job = choose_by_effort(job_of(level, model), writes=True)
    correction = choose_pass(job).method.correction
    done = (job.pruning.method, correction, job.recovery.steps)
    assert (
        done
        == {
            "quick": ("sparsegpt", 0.0, 0),
            "good": ("alps", 0.5, 0),
            "best": ("alps", 0.5, 256),
        }[level]
    )
    texts = (TEXT, SELF) if level == "best" else (TEXT,)
    assert job.calibration.calibration == texts
    assert job.recovery.recover_text == (texts if level == "best" else ())


def test_a_model_that_cannot_write_is_not_trained():
    job = choose_by_effort(job_of("best"), writes=False)
    assert job.calibration.calibration == (TEXT,)
    assert job.recovery == Recovery()


@pytest.mark.parametrize(
    "groups",
    [
        {"calibration": Calibration()},
        {"quantization": Quantization(quantize="int4")},
        {"devices": PruneDevices(mesh="data=2", distributed=True)},
    ],
    ids=["no_text", "quantized", "processes"],
)
def test_what_takes_no_training_has_none(groups, model):
    job = choose_by_effort(job_of("best", model, **groups), writes=True)
    assert job.recovery == Recovery()


def test_a_large_model_is_not_trained(model, monkeypatch):
    monkeypatch.setattr(effort, "LARGEST", 10)
    job = choose_by_effort(job_of("best", model), writes=True)
    assert job.recovery == Recovery()


def test_options_of_a_recovery_take_the_place_of_the_level_s(model):
    asked = Recovery(recover_steps=7, recover_train="lora")
    job = choose_by_effort(job_of("best", model, recovery=asked), writes=True)
    texts = (TEXT, SELF)
    both = Recovery(recover_steps=7, recover_train="lora", recover_text=texts)
    assert job.recovery == both


def test_no_steps_are_none_where_that_is_asked_for(model):
    asked = Recovery(recover_steps=0)
    job = choose_by_effort(job_of("best", model, recovery=asked), writes=True)
    assert job.recovery == asked
    assert job.calibration.calibration == (TEXT, SELF)


def test_texts_to_train_on_bring_the_steps_without_a_calibration(model):
    groups = {"calibration": Calibration(), "recovery": Recovery(recover_text=(TEXT,))}
    job = choose_by_effort(job_of("best", model, **groups), writes=True)
    recovery = job.recovery
    assert recovery.recover_steps == 256
    assert (recovery.recover_text, recovery.trained) == ((TEXT,), "matrices")
    assert job.calibration.calibration == (SELF,)


@pytest.mark.parametrize(("steps", "expected"), [(None, 256), (7, 7)])
def test_a_retraining_learns_the_texts_alone(model, steps, expected):
    asked = Recovery(recover_steps=steps, recover_by="retraining")
    job = choose_by_effort(job_of("best", model, recovery=asked), writes=True)
    recovery = job.recovery
    assert (recovery.recover_steps, recovery.recover_text) == (expected, (TEXT,))
    assert SELF in job.calibration.calibration


@pytest.mark.parametrize("level", ["quick", "good"])
def test_other_levels_add_nothing_to_a_recovery(level, model):
    asked = Recovery(recover_steps=7)
    job = choose_by_effort(job_of(level, model, recovery=asked), writes=True)
    assert job.recovery == asked


def test_nothing_is_chosen_without_the_word():
    job = job_of(None)
    assert choose_by_effort(job, writes=True) is job


def test_a_method_is_not_given_beside_an_effort():
    with pytest.raises(ValueError, match="--effort good says what --method would"):
        choose_by_effort(
            job_of("good", pruning=Pruning(effort="good", method="wanda")), writes=True
        )


def test_a_batch_of_zero_is_not_taken_as_left_out(model):
    job = job_of("best", model, recovery=Recovery(recover_batch=0))
    assert choose_by_effort(job, writes=True).recovery.recover_batch == 0


def test_no_such_effort_is_refused():
    with pytest.raises(ValueError, match="one of quick, good, best, got 'most'"):
        jp.passes.effort("most")
