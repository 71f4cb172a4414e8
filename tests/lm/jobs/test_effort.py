"""`--effort`: the job that a word stands for, and what it does not go with."""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("tyro")

import jaxprune as jp
from jaxprune.lm.jobs.effort import choose_by_effort
from jaxprune.lm.jobs.passes import choose_pass
from jaxprune.lm.jobs.prune_settings import PruneJob, Pruning, Solver
from jaxprune.lm.jobs.settings import SELF, Calibration
from jaxprune.posttraining.passes.efforts import LEVELS

TEXT = Path("a.txt")


def job_of(level, **groups):
    pruning = Pruning(effort=level, sparsity=0.5)
    calibration = Calibration(calibration=(TEXT,))
    fields = {"pruning": pruning, "calibration": calibration, **groups}
    return PruneJob(model=Path("M"), out=Path("O"), **fields)


@pytest.mark.parametrize("level", LEVELS)
def test_the_command_and_python_do_the_same_passes(level):
    chosen = choose_pass(choose_by_effort(job_of(level), writes=True))
    assert chosen.chain == jp.passes.effort(level)


@pytest.mark.parametrize("level", LEVELS)
def test_more_effort_does_more(level):
    """The levels that docs/results has: a solver, the stronger one, all together."""
    job = choose_by_effort(job_of(level), writes=True)
    done = (job.pruning.method, job.solver.correction, job.solver.refine)
    assert (
        done
        == {
            "quick": ("sparsegpt", 0.0, 0),
            "good": ("alps", 0.5, 0),
            "best": ("alps", 0.5, 4),
        }[level]
    )
    wrote = (TEXT, SELF) if level == "best" else (TEXT,)
    assert job.calibration.calibration == wrote


def test_a_model_that_cannot_write_calibrates_on_what_it_is_given():
    job = choose_by_effort(job_of("best"), writes=False)
    assert job.calibration.calibration == (TEXT,)


def test_nothing_is_chosen_without_the_word():
    job = job_of(None)
    assert choose_by_effort(job, writes=True) is job


@pytest.mark.parametrize(
    ("groups", "flag"),
    [
        ({"pruning": Pruning(effort="good", method="wanda")}, "--method"),
        ({"solver": Solver(relative="no")}, "--relative"),
        ({"solver": Solver(correction=0.0)}, "--correction"),
        ({"solver": Solver(refine=2)}, "--refine"),
        ({"solver": Solver(inputs="dense")}, "--inputs"),
    ],
)
def test_what_the_effort_decides_is_not_given_too(groups, flag):
    with pytest.raises(ValueError, match=f"--effort good says what {flag} would"):
        choose_by_effort(job_of("good", **groups), writes=True)


def test_other_options_stay_as_they_are():
    job = dataclasses.replace(job_of("good"), solver=Solver(damping=0.1))
    assert choose_by_effort(job, writes=True).solver.damping == 0.1


def test_no_such_effort_is_refused():
    with pytest.raises(ValueError, match="one of quick, good, best, got 'most'"):
        jp.passes.effort("most")
