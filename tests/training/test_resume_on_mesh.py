"""A schedule goes on from orbax's checkpoint with the same bits, on any mesh."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
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
