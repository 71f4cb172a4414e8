"""Phi-3-vision on eight devices: the same loss and gradients, split as it was asked."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxprune as jp
from experiments.datasets import picture_questions, presets
from experiments.harness import device_mesh, training
from experiments.harness.optimizer import EVERYTHING, optimizer
from experiments.phi3_vision.checkpoint import vision_config
from experiments.phi3_vision.question_answers import Asked
from experiments.phi3_vision.task import PictureTask
from experiments.phi3_vision.vision_model import VisionModel


@pytest.fixture(scope="module")
def task():
    config = vision_config(presets.PRESETS["smoke"])
    config = dataclasses.replace(config, crops=2)
    part = picture_questions.parts(picture_questions.read_source())["train"]
    train = [Asked(*picture_questions.example(part, i)) for i in range(16)]
    return PictureTask(VisionModel(config), presets.tokenizer(), train, train)


@pytest.mark.full
def test_a_step_on_a_mesh_is_the_step_on_one_device(task):
    params = task.init(0)
    tx = optimizer(1e-3, track=EVERYTHING)
    step = training.make_step(task.loss, tx)
    inputs, targets = task.batches(8, 0)(0)
    key = jax.random.key(0)
    alone, loss = jax.jit(step)(training.init(params, tx), inputs, targets, key)
    mesh = device_mesh.make_mesh("data=2,fsdp=2,model=2", 8)
    state = training.init(params, tx, mesh=mesh)
    batch = device_mesh.put((inputs, targets), device_mesh.of_batch(mesh))
    split, mesh_loss = jax.jit(step)(state, *batch, key)
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
    # Adam's first step has the size of the rate whatever the gradient is; its square
    # is what was tracked.
    one, other = (jp.get_importance(s.opt_state).square for s in (alone, split))
    sizes, others = (
        {k: np.sqrt(v) for k, v in jp.tree.named_leaves(x).items()}
        for x in (one, other)
    )
    # A bias of keys has no gradient but rounding.
    near = {"rtol": 1e-2, "atol": 1e-6 * max(size.max() for size in sizes.values())}
    for name, size in sizes.items():
        np.testing.assert_allclose(others[name], size, **near, err_msg=name)
    for name, own in jp.tree.named_leaves(alone.params).items():
        moved = jp.tree.named_leaves(split.params)[name]
        np.testing.assert_allclose(moved, own, rtol=0, atol=2.1e-3, err_msg=name)


def test_every_large_matrix_is_split(task):
    shapes = jax.eval_shape(lambda: task.init(0))
    mesh = device_mesh.make_mesh("fsdp=2,model=4", 8)
    places = jp.tree.named_leaves(device_mesh.shardings(shapes, mesh))
    for name, leaf in jp.tree.named_leaves(shapes).items():
        if jp.tree.prunable(name, leaf) and leaf.ndim == 2:
            shard = places[name].shard_shape(leaf.shape)
            whole = 2 if name.startswith("project") else 8
            assert np.prod(shard) * whole == leaf.size, (name, places[name].spec)
