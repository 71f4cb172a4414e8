"""A training run is a directory: started again, it continues where it was.

A batch and a dropout key depend on the seed and the step only, and a checkpoint holds
everything else, so a run that was killed and started again ends, on a CPU, with the
bits of an undisturbed one. Steps count from 0; a checkpoint or a metric "of step n" is
of the moment after n updates.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.harness import checkpoint, device_mesh
from experiments.harness.progress import Progress
from jaxprune.arrays import placement

Batch: TypeAlias = tuple[Any, np.ndarray]
"""Inputs and targets, int32 (batch, context); inputs may be a tree of arrays."""

Batches: TypeAlias = Callable[[int], Batch]
"""Step to its batch, a pure function."""

Prefetch: TypeAlias = Callable[[Batches, int, int], Iterable[Batch]]
"""(batches, start, stop) to the batches of steps start, ..., stop - 1 in order."""

StepFunction: TypeAlias = Callable[..., tuple["TrainState", jax.Array]]
"""(state, inputs, targets, seed key) to the next state and the loss, a scalar."""

LossFunction: TypeAlias = Callable[..., jax.Array]
"""(params, inputs, targets, key) to the mean loss, a scalar."""


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      params: any tree of arrays.
      opt_state: the optimizer's state, importance included.
      step: int32 scalar, updates done.
    """

    params: Any
    opt_state: Any
    step: jax.Array


class Checkpoints(NamedTuple):
    """Where a run is saved, so that it can continue.

    Attributes:
      directory: the directory of this run's checkpoints.
      configuration: JSON-able; a checkpoint of another one is refused.
      every: steps between checkpoints; the last step is always saved.
    """

    directory: Path
    configuration: Mapping[str, Any]
    every: int = 500


class Reports(NamedTuple):
    """What a run reports, to whom and how often.

    Attributes:
      write: gets {"step", "loss", "tokens_per_second"}, and what `evaluate` gave, in
        order; None for nobody.
      begin: gets the step at which the run starts, before anything else.
      every: steps whose losses are averaged into one report.
      evaluate: state to metrics, called at step 0, then every `evaluate_every` steps
        and after the last.
      evaluate_every: steps between evaluations.
      label: name of the run on the progress bar and in errors.
    """

    write: Callable[[dict[str, Any]], None] | None = None
    begin: Callable[[int], None] | None = None
    every: int = 50
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None
    evaluate_every: int = 500
    label: str = "train"


def init(
    params: Any, optimizer: optax.GradientTransformation, *, mesh: Mesh | None = None
) -> TrainState:
    """The state before the first step; parameters and moments are placed alike."""
    step = jnp.zeros((), jnp.int32)
    if mesh is None:
        return TrainState(params, optimizer.init(params), step)
    params = device_mesh.put(params, device_mesh.shardings(params, mesh))
    # Moments lie as their parameters do; counters are repeated.
    places = device_mesh.state_shardings(optimizer, params)
    opt_state = device_mesh.put(optimizer.init(params), places)
    return TrainState(
        params, opt_state, device_mesh.put(step, device_mesh.repeated(mesh))
    )


def abstract(
    shapes: Any, optimizer: optax.GradientTransformation, *, mesh: Mesh | None = None
) -> TrainState:
    """The state that `init` makes as `jax.ShapeDtypeStruct`s, to restore onto."""
    # Shapes alone: a state to restore onto must not need the memory of a second one.
    state = jax.eval_shape(lambda params: init(params, optimizer), shapes)
    if mesh is None:
        return state
    placed = _placed(shapes, device_mesh.shardings(shapes, mesh))
    opt_state = _placed(state.opt_state, device_mesh.state_shardings(optimizer, placed))
    return TrainState(
        placed, opt_state, _placed(state.step, device_mesh.repeated(mesh))
    )


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        tree,
        shardings,
    )


def make_step(
    loss_fn: LossFunction, optimizer: optax.GradientTransformation
) -> StepFunction:
    """The update of one step; `train` compiles it.

    `loss_fn` gets the seed key with the step folded in.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(
        state: TrainState, inputs: jax.Array, targets: jax.Array, key: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        # By the step in the state, so a resumed run draws the same dropout.
        key = jax.random.fold_in(key, state.step)
        loss, gradients = jax.value_and_grad(loss_fn)(
            state.params, inputs, targets, key
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), loss

    return step


def make_eval(
    loss_fn: Callable[[Any, jax.Array, jax.Array], jax.Array],
    *,
    mesh: Mesh | None = None,
) -> Callable[[Any, Iterable[tuple[Any, np.ndarray, np.ndarray]]], float]:
    """The mean loss over a validation set: one program, one fetch at the end.

    Args:
      loss_fn: function of (params, inputs, targets) to the loss of each token,
        (batch, context).
      mesh: mesh that the parameters live on, or None.

    Returns:
      (params, batches of inputs, targets and weights) to the weighted mean. All
      batches have one shape; weights are of a sequence each, (batch,), or of a token
      each, (batch, context). ValueError where all weights are zero.
    """
    total = _total(loss_fn, mesh)

    def evaluate(params: Any, batches: Iterable[Any]) -> float:
        totals, total_weight = [], 0.0
        for inputs, targets, weights in batches:
            token_weights = np.asarray(weights, np.float32)
            # (batch,) or (batch, context) to (batch, context): transposed, the batch
            # axis is last and broadcasting meets it.
            token_weights = np.broadcast_to(token_weights.T, targets.T.shape).T
            # Not fetched yet: the device goes on while the host makes the next batch.
            totals.append(total(params, *_put((inputs, targets, token_weights), mesh)))
            total_weight += float(token_weights.sum(dtype=np.float64))
        if total_weight == 0:
            raise ValueError(
                "the validation set must hold a token of positive weight, got none; "
                "give a longer text"
            )
        return float(np.sum(jax.device_get(totals), dtype=np.float64) / total_weight)

    return evaluate


@functools.lru_cache(maxsize=8)
def _total(
    loss_fn: Callable[[Any, jax.Array, jax.Array], jax.Array], mesh: Mesh | None
) -> Callable[..., jax.Array]:
    """The weighted sum of a batch's losses; one object, so that seeds share it."""

    @functools.partial(jax.jit, out_shardings=mesh and device_mesh.repeated(mesh))
    def total(params: Any, inputs: Any, targets: Any, weights: Any) -> jax.Array:
        return jnp.sum(loss_fn(params, inputs, targets).astype(jnp.float32) * weights)

    return total


def in_order(batches: Batches, start: int, stop: int) -> Iterator[Batch]:
    """The batches of steps start, ..., stop - 1, each made when it is asked for."""
    yield from map(batches, range(start, stop))


def train(
    state: TrainState,
    step_fn: StepFunction,
    batches: Batches,
    *,
    steps: int,
    key: jax.Array,
    checkpoints: Checkpoints | None = None,
    reports: Reports | None = None,
    mesh: Mesh | None = None,
    prefetch: Prefetch = in_order,
    donate: bool = False,
) -> TrainState:
    """Trains to a step, from the directory's last checkpoint if there is one.

    Everything is reported before the checkpoint that follows it, and the reports' steps
    do not depend on where a run was interrupted: keep what was reported up to the step
    that `reports.begin` gets, and the record is that of an undisturbed run.

    Args:
      state: state to begin with when there is no checkpoint.
      step_fn: step that `make_step` gives; compiled here, its state donated.
      batches: pure function of a step to its batch.
      steps: number of updates in all.
      key: random key that dropout's keys are folded from.
      checkpoints: directory and rhythm of saving; None to save nothing.
      reports: receiver and rhythm of the metrics; None to report nothing.
      mesh: mesh that splits each batch; see `device_mesh.of_batch`; the state must be
        placed on it.
      prefetch: iterator over batches, such as `experiments.datasets.prefetch`.
      donate: whether `state` is used up, which saves holding it twice; else it is left
        as it was.

    Returns:
      The state after the last step.

    Raises:
      ValueError: the directory holds a run of another configuration or a longer one.
      FloatingPointError: the loss is not finite.
    """
    reports = reports or Reports()
    state, start = _begin(state, checkpoints, donate)
    if not start <= steps:
        raise ValueError(
            f"{reports.label}: a checkpoint of step {start} is past the {steps} steps "
            "asked for; ask for more, or give another directory"
        )
    # Else the first step's state and the second's would be two signatures, compiled
    # twice.
    state = placement.committed(state)
    if reports.begin is not None:
        reports.begin(start)
    if start == steps:
        return state
    progress = Progress(reports.label, reports.write, start=start, steps=steps)
    if reports.evaluate is not None and start == 0:
        # Where every curve begins: the loss of the initial weights.
        progress.write({"step": 0, **reports.evaluate(state)})
    step_fn = _compiled(step_fn, mesh and _shardings(state))
    with progress:
        for step, batch in enumerate(prefetch(batches, start, steps), start + 1):
            inputs, targets = _put(batch, mesh)
            state, loss = step_fn(state, inputs, targets, key)
            progress.add(loss, targets.size)
            saving = checkpoints and _due(step, checkpoints.every, steps)
            evaluates = _due(step, reports.evaluate_every, steps)
            measure = reports.evaluate if evaluates else None
            # Windows end at the same steps whether or not the run was interrupted.
            if saving or measure or _due(step, reports.every, steps):
                progress.report(step, measure and functools.partial(measure, state))
            if saving and checkpoints is not None:
                directory, configuration, _ = checkpoints
                checkpoint.save(
                    directory, state, step=step, configuration=configuration
                )
                # Saving is no training: its seconds are in no rate.
                progress.restart_clock()
    return state


def _due(step: int, interval: int, last: int) -> bool:
    return step % interval == 0 or step == last


def _begin(
    state: TrainState, checkpoints: Checkpoints | None, donate: bool
) -> tuple[TrainState, int]:
    """The state and step to continue from; the caller's own arrays only if donated."""
    if checkpoints is not None:
        directory, configuration, _ = checkpoints
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            ),
            state,
        )
        snapshot = checkpoint.restore(directory, target, configuration=configuration)
        if snapshot is not None:
            return snapshot.state, snapshot.step
    # The step donates its state: a caller that keeps its own needs a copy to be used
    # up.
    initial = state if donate else jax.tree.map(jnp.copy, state)
    return initial, int(state.step)


def _put(arrays: tuple[Any, ...], mesh: Mesh | None) -> Any:
    if mesh is None:
        return jax.device_put(arrays)
    return device_mesh.put(arrays, device_mesh.of_batch(mesh))


def _shardings(state: TrainState) -> tuple[Any, tuple[Any, ...]]:
    leaves, structure = jax.tree.flatten(state)
    return structure, tuple(leaf.sharding for leaf in leaves)


@functools.lru_cache(maxsize=8)
def _compiled(
    step_fn: StepFunction, shardings: tuple[Any, tuple[Any, ...]] | None
) -> StepFunction:
    # A compiler free to choose how the state comes out could choose another sharding
    # than it went in with, and compile a second time.
    out = None
    if shardings is not None:
        out = (jax.tree.unflatten(*shardings), None)
    return jax.jit(step_fn, donate_argnums=0, out_shardings=out)
