"""A schedule goes on from orbax's checkpoint with the same bits, on any mesh."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType

import jaxprune as jp
from tests.support.trajectories import same_bits

pytestmark = [pytest.mark.jax_api, pytest.mark.full]
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def like_of(state):
    """What the page's statement says of a state."""
    [statement] = re.findall(r"^like = .*?^\)$", PAGE.read_text(), re.M | re.S)
    names = {"jax": jax, "state": state}
    exec(statement, names)
    return names["like"]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("inside", "grow"), [(False, None), (True, "rigl")])
def test_the_page_restores_what_lies_on_a_mesh(tmp_path, kind, inside, grow):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    spec = {"up": jax.P("data", "model"), "down": jax.P("model")}
    params = {
        name: jax.device_put(
            np.random.default_rng(0).normal(size=(16, 8)).astype("f"),
            jax.NamedSharding(mesh, part),
        )
        for name, part in spec.items()
    }
    tx = jp.gradual(optax.adam(1e-2), {1: 0.25, 3: 0.3, 5: 0.5}, grow=grow)
    step = jax.jit(lambda g, s, p: tx.update(jax.tree.map(jnp.cos, g), s, p))

    def trained(params, state, steps):
        for _ in range(steps):
            updates, state = step(params, state, params)
            params = optax.apply_updates(params, updates)
        return {"params": params, "optimizer": state}

    def resume():
        halfway = trained(params, tx.init(params), 3)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "step_3", halfway)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "step_3", like_of(halfway))
        for before, after in zip(
            *map(jax.tree.leaves, (halfway, restored)), strict=True
        ):
            assert before.sharding == after.sharding
        ends = [
            trained(run["params"], run["optimizer"], 5) for run in (halfway, restored)
        ]
        assert same_bits(*ends)
        assert jp.sparsity(ends[1]["params"]).total == 0.5

    if inside:
        with jax.set_mesh(mesh):
            resume()
    else:
        resume()


@pytest.mark.parametrize("name", ["gradual", "keep_masks"])
def test_an_nnx_optimizer_goes_on_with_the_same_bits_on_eight_devices(tmp_path, name):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    kernel = nnx.initializers.lecun_normal()
    draw = nnx.with_partitioning(kernel, ("data", "model"))
    checkered = np.indices((16, 8)).sum(0) % 2 == 0
    x = jnp.ones((8, 16))

    def begin():
        model = nnx.Linear(16, 8, kernel_init=draw, rngs=nnx.Rngs(0))
        if name == "gradual":
            tx = jp.gradual(optax.adam(1e-2), {1: 0.25, 5: 0.5})
        else:
            tx = jp.keep_masks(optax.adam(1e-2), {"kernel": checkered, "bias": None})
        tx = optax.chain(tx, jp.track_importance())
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(x) - 1.0) ** 2)

        optimizer.update(model, nnx.grad(loss)(model))

    with jax.set_mesh(mesh), ocp.StandardCheckpointer() as checkpointer:
        run, resumed = begin(), begin()
        for _ in range(3):
            step(*run)
        checkpointer.save(tmp_path / "step_3", nnx.state(run))
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "step_3", nnx.state(resumed))
        nnx.update(resumed, state)
        for _ in range(4):
            step(*run)
            step(*resumed)
    assert same_bits(nnx.state(run), nnx.state(resumed))
    model, optimizer = resumed
    masks = jp.masks.get(optimizer)
    average = jp.get_importance(optimizer).weight["kernel"]
    for leaf in (masks["kernel"], average):
        assert leaf[...].sharding == model.kernel[...].sharding
    assert jp.sparsity(nnx.state(model, nnx.Param), masks).total == 0.5
