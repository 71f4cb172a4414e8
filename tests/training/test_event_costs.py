"""A long schedule costs little before its first step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp
from jaxprune.training import event_table

SHAPES = [(16, 8), (16, 8), (8, 16), (24, 8)]
PARAMS = {f"layer_{i}": jnp.ones(shape) for i, shape in enumerate(SHAPES)}


@dataclasses.dataclass(frozen=True)
class Counted(jp.patterns.Block):
    """Blocks that count how often the units of a leaf are asked for."""

    calls: list[tuple[int, ...]] = dataclasses.field(default_factory=list, hash=False)

    def units(self, scores, axes):
        self.calls.append(scores.shape)
        return super().units(scores, axes)


@pytest.mark.parametrize("allocation", ["layer", "global", "erk"])
@pytest.mark.parametrize("grow", [None, "rigl"])
def test_units_are_counted_once_a_shape_and_not_at_each_event(allocation, grow):
    pattern = Counted(4, 4)
    schedule = jp.schedules.linear(0.8, 0, 200, every=1)
    options = {"allocation": allocation, "pattern": pattern, "grow": grow}
    tx = jp.gradual(optax.sgd(0.1), schedule, criterion="magnitude", **options)
    jax.eval_shape(tx.init, PARAMS)
    assert sorted(pattern.calls) == sorted(set(SHAPES))


@pytest.mark.full
@pytest.mark.parametrize("allocation", ["layer", "global", "erk"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x4", "channel"])
def test_an_event_keeps_what_masks_make_keeps_alone(allocation, pattern):
    schedule = {step: 0.03 * step for step in range(1, 30)}
    table = event_table.EventTable(schedule, allocation, pattern, None)
    shapes = {name: leaf.shape for name, leaf in PARAMS.items()}
    [counts] = table.pattern_counts(shapes)
    for row, sparsity in enumerate(schedule.values()):
        masks = jp.masks.make(PARAMS, sparsity, allocation=allocation, pattern=pattern)
        units = [
            counts.pattern.units(mask.astype(float), axes)
            for mask, axes in zip(masks.values(), counts.axes, strict=True)
        ]
        kept = [int((unit > 0).sum()) for unit in units]
        expected = [sum(kept)] if allocation == "global" else kept
        assert counts.kept.low[row].tolist() == expected


def test_an_n_m_pattern_is_ranked_in_its_groups_without_a_search():
    """A search of all leaves is most of what compiling an event takes."""
    program = {}
    for pattern, schedule in (("n:m", {1: "4:8", 3: "2:4"}), ("weights", {1: 0.5})):
        tx = jp.gradual(optax.sgd(0.1), schedule, criterion="magnitude")
        state = jax.eval_shape(tx.init, PARAMS)
        program[pattern] = str(jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS))
    assert "while[" not in program["n:m"]
    assert "while[" in program["weights"]


@pytest.fixture
def optimized():
    """What XLA fuses decides what is written out; most tests compile without it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.full
@pytest.mark.parametrize("pattern", ["unstructured", "16x16"])
@pytest.mark.usefixtures("optimized")
def test_an_event_takes_the_memory_of_its_scores_and_little_more(pattern):
    params = {n: jax.ShapeDtypeStruct((512, 512), jnp.float32) for n in "abcdefgh"}
    schedule = jp.schedules.cubic(0.8, 0, 100, every=10)
    tx = jp.gradual(optax.adamw(1e-3), schedule, pattern=pattern)
    state = jax.eval_shape(tx.init, params)

    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    # Of the gradients no result takes the memory, but temporaries do.
    with pytest.warns(UserWarning, match="donated buffers"):
        lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, state, params)
    temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporaries <= 1.25 * sum(4 * leaf.size for leaf in params.values())
