"""`jaxprune shrink --unequal`: layers of different sizes, and what reads them."""

import dataclasses
import json

import numpy as np
import pytest

from tests.support import tiny_cli
from tests.support.tiny_cli import logits, run

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")

from jaxprune.files import atomic
from jaxprune.lm import cli
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.jobs.shrink_rules import check_fits
from jaxprune.lm.jobs.shrink_settings import Removal
from jaxprune.lm.models.decoder.config import LayerSizes
from jaxprune.lm.models.loaded_model import open_model
from jaxprune.posttraining import solvers

LAYERS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of three layers and twelve sequences."""
    root = tmp_path_factory.mktemp("unequal")
    tiny_cli.model(root / "model", layers=LAYERS)
    np.save(root / "rows.npy", tiny_cli.ids(12 * 16, seed=2).reshape(12, 16))
    return root


def words(place, *more):
    """The options of a small and quick shrinking with unequal layers."""
    text = ("--calibration", place / "rows.npy", "--sequences", 12, "--length", 16)
    return (*text, "--batch", 3, "--speed-rounds", 0, "--unequal", *more)


@pytest.fixture(scope="module")
def small(place):
    """The record of a model without half of its neurons and heads."""
    command = ("shrink", place / "model", place / "small")
    command += words(place, "--ffn", 0.5, "--heads", 0.5)
    assert cli.main([*map(str, command)]) == 0
    return json.loads((place / "small" / "jaxprune.json").read_text())


@pytest.mark.full
def test_layers_differ_within_the_parameters_of_equal_ones(place, small):
    layers = np.array(small["units"]["unequal"]["layers"])  # (layers, 3)
    assert len({*map(tuple, layers.tolist())}) > 1
    # Of Llama's (out, in): 32 wide, heads of 8; equal layers keep 24 neurons, 1 of 2
    # key heads and 2 of 4 query heads.
    per_layer = np.array([2 * 32 * 8, 2 * 32 * 8, 3 * 32])
    assert (layers @ per_layer).sum() <= LAYERS * ([2, 1, 24] @ per_layer)
    assert (layers @ per_layer).sum() >= 0.9 * LAYERS * ([2, 1, 24] @ per_layer)
    config = json.loads((place / "small" / "config.json").read_text())
    written = [
        (
            block["attention"].get("num_attention_heads", 0),
            block["attention"].get("num_key_value_heads", 0),
            block["ffn"].get("intermediate_size", 0),
        )
        for block in config["block_configs"]
    ]
    assert written == [tuple(sizes) for sizes in layers.tolist()]
    # The report has all groups, whole and absent ones too.
    after = [size["after"] for size in small["units"]["groups"].values()]
    assert sorted(after) == sorted(layers[:, 1:].ravel())
    nats = small["units"]["unequal"]
    assert nats["searched"] <= min(nats["equal"], nats["knapsack"])
    assert "sizes by layer" in small["method"]
    assert not (place / ".small.work").exists()


@pytest.mark.full
def test_every_job_reads_unequal_layers(place, small, capsys):
    model, rows = place / "small", place / "rows.npy"
    ids = np.load(rows)
    expected = tiny_cli.nats(model, ids).mean()
    for words_ in ((model,), (model, "--packed")):
        code, record, err = run(capsys, "eval", *words_, "--text", rows)
        assert code == 0, err
        assert record["texts"]["rows.npy"]["nats"] == pytest.approx(expected, rel=1e-4)
    archive = place / "small.jaxprune"
    calibrated = ("--method", "wanda", "--calibration", rows, "--length", 16)
    calibrated += ("--sequences", 12)
    for command in (
        ("sample", model, "--prompt", "w4 w5", "--steps", 3),
        ("inspect", model),
        ("compact", model, archive),
        ("expand", archive, place / "expanded"),
        ("speed", model, "--rounds", 1, "--prompt", 4, "--steps", 2),
        ("prune", model, place / "zeros", "--sparsity", 0.5, "--method", "magnitude"),
        ("prune", model, place / "wanda", "--sparsity", 0.5, *calibrated),
        ("shrink", model, place / "fewer", "--ffn", 0.25, "--speed-rounds", 0),
    ):
        code, _, err = run(capsys, *command)
        assert code == 0, (command, err)
    np.testing.assert_array_equal(logits(place / "expanded", ids), logits(model, ids))
    fewer = json.loads((place / "fewer" / "config.json").read_text())
    before = [sizes[2] for sizes in small["units"]["unequal"]["layers"]]
    after = [b["ffn"].get("intermediate_size", 0) for b in fewer["block_configs"]]
    assert after == [n - round(n / 4) for n in before]


@pytest.mark.full
def test_a_killed_run_goes_on_to_the_same_bits(place, small, capsys, monkeypatch):
    replace = atomic.replace_json

    def dies(name, count):
        saved = []

        def save(path, content):
            replace(path, content)
            saved.extend([path] * (path.name == name))
            if len(saved) == count:
                raise KeyboardInterrupt

        return save

    command = ("shrink", place / "model", place / "again")
    command += words(place, "--ffn", 0.5, "--heads", 0.5)
    for name, count in (("damages.json", 2), ("sizes.json", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "replace_json", dies(name, count))
            assert cli.main([*map(str, command)]) != 0
    remove, calls = solvers.units.remove_from_all, []

    def noted(*arguments, **options):
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return remove(*arguments, **options)

    monkeypatch.setattr(solvers.units, "remove_from_all", noted)
    assert cli.main([*map(str, command)]) != 0
    code, record, err = run(capsys, *command)
    assert code == 0, err
    # The last of the solutions went on as well: two layers' parts were there.
    parts = np.array(small["units"]["unequal"]["layers"])[:, 1:]
    assert len(calls) == 1 + ((parts > 0) & (parts < [2, 48])).sum()
    assert record["units"]["unequal"] == small["units"]["unequal"]
    first, second = (tiny_cli.weights(place / n) for n in ("small", "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            ("--ffn", 0.5, "--unequal"),
            "--unequal chooses the sizes of layers by a text",
        ),
        (("--unequal", "--drop-layers", 0), "give --ffn, --heads or --budget"),
        (("--unequal", "--budget", 0.5, "--measure", "flops"), "cannot divide flops"),
        (("--unequal", "--ffn", 0.5, "--sequences", 3), "a quarter of them judges"),
        (("--unequal", "--ffn", 0.5, "--query-heads", 0.5), "--search and --query-he"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(place, options, match, capsys):
    text = () if "by a text" in match else ("--calibration", place / "rows.npy")
    code, _, err = run(capsys, "shrink", place / "model", place / "no", *options, *text)
    assert code != 0
    assert match in " ".join(err.split())
    assert not (place / "no").exists()


def test_neurons_of_unequal_layers_are_checked_by_the_narrowest(place):
    model = open_model(place / "model")
    sizes = ((4, 2, 48), (0, 0, 24), (4, 2, 0))
    config = dataclasses.replace(
        model.config, layer_sizes=tuple(LayerSizes(*layer) for layer in sizes)
    )
    removal = Removal(ffn=0.5, multiple=32)
    with pytest.raises(ValueError, match="--multiple 32 leaves all 24 neurons"):
        check_fits(removal, open_directory(place / "model"), config)
