"""`jaxprune prune --effort`: what each level stands for."""

from pathlib import Path

import pytest

pytest.importorskip("tyro")

import jaxprune as jp
from jaxprune.lm.steps.passes import choose_pass
from jaxprune.lm.steps.prune import choose_by_effort
from jaxprune.lm.steps.settings import SELF, Calibration, PruneJob, Pruning
from jaxprune.posttraining.passes.efforts import LEVELS

TEXT = Path("a.txt")


def job_of(level, **options):
    return PruneJob(
        model=Path("M"),
        out=Path("O"),
        pruning=Pruning(effort=level, sparsity=0.5, **options),
        calibration=Calibration(calibration=(TEXT,)),
    )


@pytest.mark.parametrize("level", LEVELS)
def test_the_command_and_python_do_the_same_passes(level):
    chain = choose_pass(choose_by_effort(job_of(level))).method
    assert chain == jp.passes.effort(level)


@pytest.mark.parametrize(
    ("level", "method", "correction", "texts"),
    [
        ("quick", "sparsegpt", 0.0, (TEXT,)),
        ("good", "alps", 0.5, (TEXT,)),
        ("best", "alps", 0.5, (TEXT, SELF)),
    ],
)
def test_more_effort_does_more(level, method, correction, texts):
    job = choose_by_effort(job_of(level))
    assert job.pruning.method == method
    assert choose_pass(job).method.correction == correction
    assert job.calibration.calibration == texts


def test_several_processes_and_torch_models_write_no_text():
    distributed = choose_by_effort(job_of("best", distributed=True))
    through_torch = choose_by_effort(job_of("best"), own_text=False)
    for job in (distributed, through_torch):
        assert job.calibration.calibration == (TEXT,)


def test_nothing_is_chosen_without_the_word():
    job = job_of(None)
    assert choose_by_effort(job) is job


def test_a_method_is_not_given_beside_an_effort():
    with pytest.raises(ValueError, match="--effort good says what --method would"):
        choose_by_effort(job_of("good", method="wanda"))


def test_no_such_effort_is_refused():
    with pytest.raises(ValueError, match="one of quick, good, best, got 'most'"):
        jp.passes.effort("most")
