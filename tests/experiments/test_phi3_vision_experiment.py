"""`python -m experiments.phi3_vision`, run whole at the size of --smoke."""

import json

import pytest

from experiments import phi3_vision
from experiments.datasets import picture_questions
from experiments.harness import training


@pytest.fixture(scope="module")
def steps():
    """The compiled steps that `run` trained by, each once."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("vision")
    config = phi3_vision.Config(
        out=folder / "run",
        data_dir=folder / "data",
        criteria=("preconditioned_magnitude",),
        mesh="data=1",  # a step on a mesh: tests/lm/models/test_phi3_vision_sharded.py
        smoke=True,
    )
    compiled = training._compiled

    def noted(*arguments):
        step = compiled(*arguments)
        steps.extend([step] * (step not in steps))
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_compiled", noted)
        sizes = {"train": 200, "validation": 64}
        patch.setattr(picture_questions, "SIZES", sizes)
        phi3_vision.main(config)
        yield config


@pytest.mark.full
def test_every_cell_has_losses_and_accuracies(run):
    results = json.loads((run.out / "results.json").read_text())
    (seed,) = results["seeds"]
    kinds = {(c["criterion"], c["allocation"], c["sparsity"]) for c in seed["cells"]}
    assert len(kinds) == len(seed["cells"]) == 1 * 3 * 2
    for cell in seed["cells"]:
        assert cell["achieved"] == pytest.approx(cell["sparsity"], abs=1e-3)
        assert 0 <= cell["accuracy_pruned"] <= 1
        retrained = cell["allocation"] == "all" and cell["sparsity"] == 0.8
        assert (cell["loss_retrained"] is not None) == retrained
        names = set(cell["sparsity_by_leaf"])
        if cell["allocation"] != "all":
            assert all(name.startswith(cell["allocation"]) for name in names)
    assert seed["dense"].keys() == {"steps", "loss", "accuracy", "by_question"}
    assert 0 < results["text_only"]["accuracy"] < 0.5
    assert all(
        name.startswith(("tower/layers/1/", "tower/norm/"))
        for name in results["model"]["without_gradient"]
    )


@pytest.mark.full
def test_training_and_all_retraining_compile_one_step_each(run, steps):
    assert [step._cache_size() for step in steps] == [1, 1]


@pytest.mark.full
def test_the_report_shows_pictures_with_answers(run):
    page = (run.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 16
    assert "Questions answered right" in page
    assert "http" not in page.split("<pre>")[0]


@pytest.mark.full
def test_a_finished_run_says_so_and_changes_nothing(run, capsys):
    before = (run.out / "results.json").read_bytes()
    phi3_vision.main(run)
    assert "finished" in capsys.readouterr().out
    assert (run.out / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"criteria": ("size",)}, "criteria must be of"),
        ({"sparsities": (0.0,)}, "sparsities must be in"),
        ({"steps": 0}, "steps must be over 0"),
        ({"allocations": ()}, "allocations must be named"),
        (
            {"retrain_allocations": ("tower",), "allocations": ("all",)},
            "retrain_allocations must be",
        ),
        ({"learning_rate": 0.0}, "^learning_rate must be over 0"),
    ],
)
def test_what_cannot_be_run_is_refused_first(changes, sentence, tmp_path):
    config = phi3_vision.Config(out=tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=sentence):
        phi3_vision.main(config)
    assert not (tmp_path / "run").exists()
