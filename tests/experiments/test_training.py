"""A run that was killed and started again is an undisturbed run, record included."""

import functools
import json
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness import (
    checkpoint,
    device_mesh,
    records,
    training,
)
from jaxprune.arrays import console_progress
from tests.support import forked
from tests.support.checkpoints import newest

OPTIMIZER = optax.adamw(1e-2)


def batches(step):
    inputs = np.random.default_rng([7, step]).integers(0, 16, (12, 8), np.int32)
    return inputs, (inputs * 3 + 1) % 16


def token_losses(params, inputs, targets, key=None):
    hidden = params["embedding"][inputs]
    if key is not None:
        hidden = hidden * jax.random.bernoulli(key, 0.9, hidden.shape)
    logits = jnp.tanh(hidden @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def mean_loss(params, inputs, targets, key):
    return token_losses(params, inputs, targets, key).mean()


def toy_values():
    """Parameters in NumPy, which are placed on a mesh without a program."""
    random = np.random.default_rng(0)
    shapes = {"embedding": (16, 24), "hidden": (24, 24), "out": (24, 16)}
    return {
        name: random.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def toy_params():
    return jax.tree.map(jnp.asarray, toy_values())


def norm(params):
    return float(np.linalg.norm([np.linalg.norm(leaf) for leaf in params.values()]))


STEP = training.make_step(mean_loss, OPTIMIZER)


def run(folder, batches=batches, *, steps=40, checkpoints=None, reports=None):
    log = records.MetricsLog(folder / "metrics.jsonl")
    if True:
        saved = {"configuration": {"seed": 1}, "every": 10}
        rhythm = {"every": 4, "evaluate_every": 15}
        state = training.init(toy_params(), OPTIMIZER)
        return training.train(
            state,
            STEP,
            batches,
            steps=steps,
            key=jax.random.key(1),
            checkpoints=training.Checkpoints(
                folder / "checkpoints", **(saved | (checkpoints or {}))
            ),
            reports=training.Reports(
                lambda metrics: log.write(metrics, phase="toy"),
                lambda step: log.resume(step, phase="toy"),
                evaluate=lambda s: {"norm": norm(s.params)},
                **(rhythm | (reports or {})),
            ),
        )


def run_and_die(folder, moment, when):
    """Runs in a process of its own, which is killed at this step or in its save."""
    save = checkpoint.save

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly_batches(step):
        return die() if (moment, when) == ("batch", step) else batches(step)

    def deadly_save(*arguments, step, **named):
        if step == when and moment == "commit":
            os.rename = os.replace = die
        return save(*arguments, step=step, **named)

    checkpoint.save = deadly_save
    run(folder, deadly_batches)


def curve(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry.pop("tokens_per_second", None)
    return entries


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder), folder


def test_the_loss_falls_and_the_record_has_every_step_once(undisturbed):
    state, folder = undisturbed
    entries = curve(folder)
    assert int(state.step) == 40
    assert entries[0].keys() == {"phase", "step", "norm"}
    assert entries[-1].keys() == {"phase", "step", "loss", "norm"}
    assert entries[-1]["loss"] < 0.8 * entries[1]["loss"]
    steps = [entry["step"] for entry in entries]
    assert steps == sorted({*range(0, 41, 4), *range(0, 41, 10), 15, 30})


def test_a_run_whose_stderr_is_a_file_writes_lines(monkeypatch, capsys):
    monkeypatch.setattr(console_progress, "_SECONDS", 0.0)
    state = training.init(toy_params(), OPTIMIZER)
    key = jax.random.key(1)
    reports = training.Reports(label="toy")
    training.train(state, STEP, batches, steps=3, key=key, reports=reports)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"toy: {n} of 3 steps" for n in (1, 2, 3)
    ]


def test_the_loop_is_the_plain_loop(undisturbed):
    state = jax.device_put(training.init(toy_params(), OPTIMIZER), jax.devices()[0])
    step = jax.jit(STEP, donate_argnums=0)
    for n in range(40):
        state, _ = step(state, *batches(n), jax.random.key(1))
    chex.assert_trees_all_equal(state, undisturbed[0])


@pytest.mark.parametrize("kept", [False, True], ids=["alone", "in a folder"])
def test_a_donated_state_is_used_up_and_another_is_left(kept, tmp_path):
    def train(steps, donate):
        state = training.init(toy_params(), OPTIMIZER)
        saved = training.Checkpoints(tmp_path / f"{donate}", {}) if kept else None
        key = jax.random.key(1)
        options = {"steps": steps, "key": key, "checkpoints": saved, "donate": donate}
        return state, training.train(state, STEP, batches, **options)

    for steps in (3, 6):  # in a folder the second goes on
        old, expected = train(steps, donate=False)
        gone, state = train(steps, donate=True)
        chex.assert_trees_all_equal(state, expected)
        if steps == 3:  # else a checkpoint took its place
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(gone))
        assert np.isfinite(norm(old.params))


@pytest.mark.parametrize("mesh", [None, "fsdp=4,data=2"])
def test_an_abstract_state_is_the_state_without_its_numbers(mesh):
    place = device_mesh.make_mesh(mesh, 8) if mesh else None
    state = training.init(toy_values(), OPTIMIZER, mesh=place)
    shapes = jax.eval_shape(toy_params)
    target = training.abstract(shapes, OPTIMIZER, mesh=place)
    chex.assert_trees_all_equal_shapes_and_dtypes(target, state)
    if place is not None:
        for one, other in zip(
            jax.tree.leaves(target), jax.tree.leaves(state), strict=True
        ):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


@pytest.mark.full
def test_killed_in_mid_step_and_in_mid_save_it_ends_with_the_same_bits(
    undisturbed, tmp_path
):
    log = tmp_path / "log"
    for death in [("batch", 17), ("commit", 40)]:
        child = forked.start(run_and_die, tmp_path, *death, log=log)
        assert forked.code(child) == -signal.SIGKILL, log.read_text()
    state = run(tmp_path)
    chex.assert_trees_all_equal(state, undisturbed[0])
    assert curve(tmp_path) == curve(undisturbed[1])


def test_a_finished_run_redoes_nothing(undisturbed):
    state, folder = undisturbed
    before = (folder / "metrics.jsonl").read_bytes()

    def refuse(step):
        raise AssertionError(step)

    chex.assert_trees_all_equal(run(folder, refuse), state)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_naming_the_field(undisturbed):
    with pytest.raises(
        ValueError,
        match="seed was 1 and is 2; give the old values, or another directory",
    ):
        run(undisturbed[1], checkpoints={"configuration": {"seed": 2}})


def test_fewer_steps_than_were_done_are_refused(undisturbed):
    with pytest.raises(ValueError, match="step 40 is past the 30 steps asked for"):
        run(undisturbed[1], steps=30)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    def step_fn(state, inputs, targets, key):
        loss = jnp.where(state.step == 13, jnp.nan, 1.0)
        return state._replace(step=state.step + 1), loss

    state = training.init(toy_params(), OPTIMIZER)
    with pytest.raises(
        FloatingPointError,
        match="toy: the loss must be finite, got nan at step 14; low",
    ):
        training.train(
            state,
            step_fn,
            batches,
            steps=40,
            key=jax.random.key(0),
            checkpoints=training.Checkpoints(tmp_path, {}, every=10),
            reports=training.Reports(label="toy"),
        )
    assert newest(tmp_path) == 10


MESHES = ["data=4", "fsdp=4", "fsdp=2,data=2", "data=2,fsdp=3"]


@pytest.mark.parametrize(
    "mesh",
    [
        "data=1",
        "fsdp=2,data=2",
        *(pytest.param(m, marks=pytest.mark.full) for m in MESHES if m != MESHES[2]),
    ],
)
def test_the_step_is_compiled_once_and_the_caller_keeps_the_state(mesh):
    state, result, compiled = trained_on(mesh)
    assert compiled == 1
    chex.assert_trees_all_equal(jax.device_get(state.params), toy_values())
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, s) for s in (state, result)]
    assert shardings[0] == shardings[1]


@functools.cache
def trained_on(mesh):
    """Trains twice from one state, which is given with the result.

    The third is how often the step was compiled.
    """
    chex.clear_trace_counter()
    optimizer = optax.adamw(1e-2)
    counted = chex.assert_max_traces(training.make_step(mean_loss, optimizer), n=1)
    place = mesh and device_mesh.make_mesh(mesh, 12)
    params = toy_values() if place else toy_params()
    state = training.init(params, optimizer, mesh=place)
    for _ in range(2):
        result = training.train(
            state, counted, batches, steps=5, key=jax.random.key(1), mesh=place
        )
    compiled = training._compiled(counted, place and training._shardings(state))
    return state, result, compiled._cache_size()


def test_weights_of_a_checkpoint_and_fresh_moments_compile_one_step():
    """Those are committed to their device, these are not, a step's results all are."""
    optimizer = optax.adamw(1e-2)
    step = training.make_step(mean_loss, optimizer)
    params = jax.device_put(toy_params(), jax.devices()[0])
    state = training.init(params, optimizer)
    assert len({leaf.committed for leaf in jax.tree.leaves(state)}) == 2
    training.train(state, step, batches, steps=3, key=jax.random.key(1))
    assert training._compiled(step, None)._cache_size() == 1


@pytest.mark.full
def test_a_mesh_computes_what_one_device_does():
    results = [
        jax.device_get(trained_on(mesh)[1].params) for mesh in ("data=1", None, *MESHES)
    ]
    for other in results[1:]:
        # The sums are taken in another order, and Adam divides by their root.
        chex.assert_trees_all_close(other, results[0], atol=1e-4)


def test_a_run_resumed_on_a_mesh_is_placed_as_before(tmp_path):
    mesh = device_mesh.make_mesh("fsdp=2,data=2", 12)
    for steps in (4, 8):
        state = training.init(toy_values(), OPTIMIZER, mesh=mesh)
        result = training.train(
            state,
            STEP,
            batches,
            steps=steps,
            key=jax.random.key(1),
            checkpoints=training.Checkpoints(tmp_path / "stopped", {}),
            mesh=mesh,
        )
    whole = training.train(
        state, STEP, batches, steps=8, key=jax.random.key(1), mesh=mesh
    )
    assert training._shardings(result) == training._shardings(whole)
    chex.assert_trees_all_equal(result, whole)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_evaluation_is_the_weighted_mean_in_one_program(on_mesh):
    mesh = device_mesh.make_mesh(None, 12) if on_mesh else None
    params = toy_values()
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(token_losses, n=1)
    evaluate = training.make_eval(counted, mesh=mesh)
    random = np.random.default_rng(0)
    weighted = [(*batches(n), random.integers(0, 2, (12, 8))) for n in range(3)]
    plain = jax.jit(token_losses)
    losses = [np.asarray(plain(params, *b[:2])) for b in weighted]
    if mesh is not None:
        params = device_mesh.put(params, device_mesh.shardings(params, mesh))
    expected = np.average(
        np.stack(losses).astype(np.float64), weights=np.stack([b[2] for b in weighted])
    )
    np.testing.assert_allclose(evaluate(params, weighted), expected, rtol=1e-6)
    rows = [(*batch[:2], np.arange(12.0)) for batch in weighted]
    expected = np.average(np.mean(losses, axis=(0, 2)), weights=np.arange(12.0))
    np.testing.assert_allclose(evaluate(params, rows), expected, rtol=1e-6)
    nothing = [(*batch[:2], np.zeros((12, 8))) for batch in weighted]
    with pytest.raises(ValueError, match="a token of positive weight, got none"):
        evaluate(params, nothing)
