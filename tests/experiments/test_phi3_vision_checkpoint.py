"""`python -m experiments.phi3_vision --model DIR --data FOLDER`: fine-tuning."""

import json

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxprune as jp
from experiments import phi3_vision
from experiments.harness import device_mesh, training
from experiments.harness.optimizer import EVERYTHING
from experiments.phi3_vision import checkpoint, presets
from experiments.phi3_vision.model import Phi3Vision
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import Unknown
from tests.support.picture_files import picture, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a tiny Phi-3-vision, with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = presets.PRESETS["smoke"]
    made = Phi3Vision(checkpoint.vision_config(config), rngs=nnx.Rngs(0))
    save_file(dict(checkpoint.tensors(made)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    presets.words().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two pictures of different shapes, in turn."""
    folder = tmp_path_factory.mktemp("data")
    picture(folder, "a.png", (40, 30))
    picture(folder, "b.png", (20, 60))
    lines = [
        {"image": f"{name}.png", "question": "what is behind them ?", "answer": answer}
        for name, answer in (("a", "temple"), ("b", "flower"))
    ]
    write(folder, lines * 8)
    write(folder, lines, "validation")
    return folder


def _config(folder, data, out, **changes):
    options = {
        "model": folder,
        "data": str(data),
        "crops": 2,
        "criteria": ("preconditioned_magnitude",),
        "allocations": ("all",),
        "sparsities": (0.5,),
        "steps": 6,
        "retrain_steps": 2,
        "batch_size": 4,
        "frozen": ("tower",),
        "checkpointing": True,
        "mesh": "data=1",
        "out": out,
    }
    return phi3_vision.Config(**{**options, **changes})


@pytest.mark.full
def test_a_folder_is_fine_tuned_and_pruned_its_tower_left_alone(model, data, tmp_path):
    config = _config(model, data, tmp_path / "run")
    phi3_vision.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (seed,) = results["seeds"]
    (cell,) = seed["cells"]
    assert cell["achieved"] == pytest.approx(0.5, abs=1e-3)
    assert not any(name.startswith("tower") for name in cell["sparsity_by_leaf"])
    assert seed["curve"][-1]["loss"] < seed["curve"][0]["loss"]


@pytest.mark.full
@pytest.mark.usefixtures("numbers_alone")
def test_lora_writes_a_folder_whose_pruned_weights_are_zero(model, data, tmp_path):
    changes = {"lora": 2, "frozen": (), "storage": "int8"}
    changes |= {"mesh": "fsdp=2,model=2"}
    config = _config(model, data, tmp_path / "run", **changes)
    phi3_vision.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (seed,) = results["seeds"]
    assert seed["curve"][-1]["loss"] < seed["curve"][0]["loss"]
    (cell,) = seed["cells"]
    written = tmp_path / "run" / "seed-0" / "model"
    provenance = rewrite.read_provenance(written)
    assert provenance["method"] == "preconditioned_magnitude"
    assert provenance["retrain_steps"] == 2
    assert provenance["sparsity"] == 0.5
    assert provenance["allocation"] == "all"
    loaded = checkpoint.load(written)
    before = jp.tree.named_leaves(nnx.state(checkpoint.load(model).model, nnx.Param))
    leaves = jp.tree.named_leaves(nnx.state(loaded.model, nnx.Param))
    changed = 0
    for name, leaf in leaves.items():
        values, old = np.asarray(leaf), np.asarray(before[name])
        if name not in cell["sparsity_by_leaf"]:
            np.testing.assert_array_equal(values, old, err_msg=name)
            continue
        assert (values == 0).mean() == pytest.approx(cell["sparsity_by_leaf"][name])
        changed += bool((values[values != 0] != old[values != 0]).any())
    # A first layer's keys may get gradients too small to count in six steps.
    assert changed > 0.8 * len(cell["sparsity_by_leaf"])


@pytest.mark.full
def test_a_folder_is_read_to_its_places(model, data, tmp_path):
    mesh = device_mesh.make_mesh("fsdp=4,model=2", 4)
    task = phi3_vision.make_task(_config(model, data, tmp_path), mesh)
    params = task.init(0)
    places = jp.tree.named_leaves(device_mesh.shardings(task.shapes, mesh))
    for name, leaf in jp.tree.named_leaves(params).items():
        assert leaf.sharding == places[name], name
    tx = task.optimizer(1e-3, track=EVERYTHING)
    tx = tx._replace(init=jax.jit(tx.init))
    state = training.init(params, tx, mesh=mesh)
    chex.assert_trees_all_equal_shapes(state.params, task.shapes)


@pytest.mark.full
def test_what_is_frozen_is_not_trained_and_has_no_moments(model, data, tmp_path):
    task = phi3_vision.make_task(_config(model, data, tmp_path))
    params = task.init(0)
    tx = task.optimizer(1e-2, track=EVERYTHING)
    state = jax.jit(tx.init)(params)
    inputs, targets = task.batches(4, 0)(0)
    gradients = jax.jit(jax.grad(task.loss))(params, inputs, targets, None)
    updates, state = jax.jit(tx.update)(gradients, state, params)
    for name, update in jp.tree.named_leaves(updates).items():
        assert np.any(update) != name.startswith("tower/"), name
    held = sum(leaf.size for leaf in jax.tree.leaves(state[2]))
    trained = sum(
        leaf.size
        for name, leaf in jp.tree.named_leaves(params).items()
        if not name.startswith("tower/")
    )
    assert held == pytest.approx(2 * trained, abs=3)


@pytest.mark.full
def test_checkpointing_changes_no_gradient(model, data, tmp_path):
    losses = []
    for remat in (False, True):
        config = _config(model, data, tmp_path, checkpointing=remat, frozen=())
        task = phi3_vision.make_task(config)
        inputs, targets = task.batches(4, 0)(0)
        losses.append(jax.jit(jax.grad(task.loss))(task.init(0), inputs, targets, None))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *losses
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": None}, "needs --model DIR"),
        ({"allocations": ("tower",)}, "what is frozen is not pruned"),
        ({"criteria": ("preconditioned_adam",)}, "none of some"),
        ({"held_out": 0}, "held_out must be at least 1"),
        ({"lora": 0}, "lora must be a rank of at least 1"),
        (
            {"lora": 2, "frozen": (), "criteria": ("preconditioned_adam",)},
            "none of some",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_first(changes, sentence, model, data, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        phi3_vision.main(_config(model, data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_result_inside_the_model_is_refused_first(model, data):
    with pytest.raises(ValueError, match="must lie apart from its source"):
        phi3_vision.main(_config(model, data, model / "run"))
    assert not (model / "run").exists()


def test_another_model_is_refused(data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": np.zeros(2, np.float32)}, other / "model.safetensors")
    with pytest.raises(Unknown, match="model_type must be phi3_v"):
        phi3_vision.main(_config(other, data, tmp_path / "run"))
