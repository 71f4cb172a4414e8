"""A training run is a folder: started again, it goes on where it was.

A batch and a dropout key depend on the seed and the step only, and a checkpoint holds
everything else, so a run that was killed and started again ends, on a CPU, with the
bits of an undisturbed one. Steps count from 0; a checkpoint or a metric "of step n" is
of the moment after n updates.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxprune import checkpoint

Batch: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Inputs and targets, int32, (batch, context)."""

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


def init(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    fsdp: bool = False,
) -> TrainState:
    """Makes the state before the first step.

    Args:
      params: any tree of arrays.
      optimizer: an optax transformation.
      mesh: where the state lives; None for the default device.
      fsdp: whether to split each array over the mesh instead of repeating it.

    Returns:
      The state; the parameters and their moments are placed alike.
    """
    if mesh is not None:
        params = place(params, mesh, fsdp=fsdp)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    return state if mesh is None else place(state, mesh, fsdp=fsdp)


def make_mesh(batch_size: int) -> Mesh | None:
    """A mesh of one axis "data" over every device that a batch can be split over.

    Args:
      batch_size: sequences in a batch.

    Returns:
      A mesh over the greatest number of devices that divides the batch size; None
      where that is one.
    """
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    if count == 1:
        return None
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count]
    )


def place(tree: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """Puts a tree on every device of a mesh.

    Args:
      tree: any tree of arrays.
      mesh: as `make_mesh` gives.
      fsdp: whether to split each array along its longest axis that the number of
        devices divides; arrays that have none are repeated.

    Returns:
      The tree, placed.
    """

    def sharding(leaf: Any) -> NamedSharding:
        axes = [n for n, size in enumerate(leaf.shape) if size and not size % mesh.size]
        if not (fsdp and axes):
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.device_put(tree, jax.tree.map(sharding, tree))


def make_step(
    loss_fn: LossFunction, optimizer: optax.GradientTransformation
) -> StepFunction:
    """Builds the update of one step; `train` compiles it.

    Args:
      loss_fn: (params, inputs, targets, key) to the mean loss. The key is the seed key
        with the step folded in.
      optimizer: an optax transformation.

    Returns:
      The step function.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(
        state: TrainState, inputs: jax.Array, targets: jax.Array, key: jax.Array
    ) -> tuple[TrainState, jax.Array]:
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
) -> Callable[[Any, Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]], float]:
    """Builds the mean loss over a validation set: one program, one fetch at the end.

    Args:
      loss_fn: (params, inputs, targets) to the loss of each token, (batch, context).
      mesh: where the parameters live, if on a mesh.

    Returns:
      (params, batches of inputs, targets and weights) to the weighted mean. All
      batches have one shape; weights are of a sequence each, (batch,), or of a token
      each, (batch, context). ValueError where all weights are zero.
    """

    @jax.jit
    def total(params: Any, inputs: Any, targets: Any, weights: Any) -> jax.Array:
        return jnp.sum(loss_fn(params, inputs, targets).astype(jnp.float32) * weights)

    def evaluate(params: Any, batches: Iterable[Any]) -> float:
        totals, weight = [], 0.0
        for inputs, targets, weights in batches:
            each = np.asarray(weights, np.float32)
            each = np.broadcast_to(each.T, inputs.T.shape).T
            totals.append(total(params, *_put((inputs, targets, each), mesh)))
            weight += float(each.sum(dtype=np.float64))
        if not weight:
            raise ValueError(
                "the validation set must hold a token of positive weight, got none; "
                "give a longer text."
            )
        return float(np.sum(jax.device_get(totals), dtype=np.float64) / weight)

    return evaluate


def in_order(batches: Batches, start: int, stop: int) -> Iterator[Batch]:
    """The batches of steps start, ..., stop - 1, each made when it is asked for.

    Args:
      batches: step to its batch.
      start: the first step.
      stop: one past the last step.

    Yields:
      Inputs and targets.
    """
    yield from map(batches, range(start, stop))


def train(
    state: TrainState,
    step_fn: StepFunction,
    batches: Batches,
    *,
    steps: int,
    key: jax.Array,
    directory: Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    every: int = 500,
    log_every: int = 50,
    on_start: Callable[[int], None] | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    evaluate_every: int = 500,
    label: str = "train",
    mesh: Mesh | None = None,
    prefetch: Prefetch = in_order,
) -> TrainState:
    """Trains to a step, from the last whole checkpoint in the folder if there is one.

    Everything is reported before the checkpoint that follows it, and the reports' steps
    do not depend on where a run was interrupted: keep what was reported up to the step
    that `on_start` tells, and the record is that of an undisturbed run.

    Args:
      state: where to begin when there is no checkpoint; left usable.
      step_fn: as `make_step` gives; compiled here, its state donated.
      batches: step to its batch, a pure function.
      steps: updates in all.
      key: the seed key of dropout.
      directory: the folder of this run's checkpoints; None for none.
      configuration: JSON-able; a checkpoint of another one is refused.
      every: steps between checkpoints; the last step is always saved.
      log_every: steps whose losses are averaged into one report.
      on_start: gets the step at which the run starts, before anything else.
      on_metrics: gets {"step", "loss", "tokens_per_second"}, and what `evaluate` gave,
        in order.
      evaluate: state to metrics, called at step 0, then every `evaluate_every` steps
        and after the last.
      evaluate_every: steps between evaluations.
      label: names the run on the progress bar and in errors.
      mesh: splits each batch over its axis "data"; the state must be placed on it.
      prefetch: iterates over batches, as `experiments.datasets.prefetch` does.

    Returns:
      The state after the last step.

    Raises:
      ValueError: the folder holds a run of another configuration or a longer one, or
        what `checkpoint.restore` raises; a number of steps out of range.
      FloatingPointError: the loss is not finite.
    """
    if steps < 0 or min(every, log_every, evaluate_every) < 1:
        raise ValueError(
            f"train needs steps >= 0 and intervals >= 1, got steps={steps}, "
            f"every={every}, log_every={log_every}, evaluate_every={evaluate_every}."
        )
    settings = dict(configuration or {})
    state, start = _begin(state, directory, settings, steps, label)
    if on_start is not None:
        on_start(start)
    if start == steps:
        return state
    report = _Report(label, on_metrics)
    if evaluate is not None and start == 0:
        report.write({"step": 0, **evaluate(state)})
    step_fn = _compiled(step_fn, mesh and _shardings(state))
    with tqdm(total=steps, initial=start, desc=label, disable=None) as report.bar:
        for step, batch in enumerate(prefetch(batches, start, steps), start + 1):
            inputs, targets = _put(batch, mesh)
            state, loss = step_fn(state, inputs, targets, key)
            report.add(loss, inputs.size)
            saving = directory is not None and _due(step, every, steps)
            evaluating = evaluate is not None and _due(step, evaluate_every, steps)
            # Windows end at the same steps whether or not the run was interrupted.
            if saving or evaluating or _due(step, log_every, steps):
                report.close(step)
            if saving or evaluating or step == steps:
                metrics = report.fetch()
                if evaluate is not None and evaluating:
                    metrics |= evaluate(state)
                report.write(metrics)
                report.restart_clock()
            if saving and directory is not None:
                checkpoint.save(directory, state, step=step, configuration=settings)
                report.restart_clock()
    return state


def _due(step: int, interval: int, last: int) -> bool:
    return step % interval == 0 or step == last


def _begin(
    state: TrainState,
    directory: Path | None,
    configuration: Mapping[str, Any],
    steps: int,
    label: str,
) -> tuple[TrainState, int]:
    """The state and step to go on from; never the caller's own arrays."""
    found = None if directory is None else checkpoint.latest(directory)
    if directory is None or found is None:
        return jax.tree.map(jnp.copy, state), int(state.step)
    different = checkpoint.differences(found.configuration, configuration)
    if different:
        raise ValueError(
            f"{label}: '{found.path}' must be of the same configuration, but "
            f"{'; '.join(different)}; give the old values, or another folder."
        )
    if found.step > steps:
        raise ValueError(
            f"{label}: '{found.path}' must be of at most the {steps} steps asked for, "
            f"got {found.step}; ask for more, or give another folder."
        )
    return checkpoint.restore(directory, state).state, found.step


def _put(arrays: tuple[np.ndarray, ...], mesh: Mesh | None) -> tuple[jax.Array, ...]:
    if mesh is None:
        return jax.device_put(arrays)
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))


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


class _Report:
    """Losses on their way from the device: a window is fetched when the next is full.

    So the device never waits for the host, and is never two windows behind it.
    """

    def __init__(
        self, label: str, write: Callable[[dict[str, Any]], None] | None
    ) -> None:
        self.label = label
        self.write = write or (lambda metrics: None)
        self.bar: Any = None
        self.open: list[jax.Array] = []
        self.closed: list[tuple[int, list[jax.Array]]] = []
        self.tokens_per_step = 0
        self.timed = 0
        self.clock: float | None = None

    def add(self, loss: jax.Array, tokens: int) -> None:
        """Takes the loss of a step, a device scalar, and the number of its tokens."""
        self.open.append(loss)
        self.tokens_per_step = tokens
        self.bar.update()
        if self.clock is None:
            # The first step compiles; the rate counts from its end.
            jax.block_until_ready(loss)
            self.restart_clock()

    def restart_clock(self) -> None:
        """Counts time and tokens anew, at a moment when no step is running."""
        self.clock, self.timed = time.perf_counter(), 0

    def close(self, step: int) -> None:
        """Ends a window after this step and reports the one before."""
        self.closed.append((step, self.open))
        self.open = []
        while len(self.closed) > 1:
            self.write(self.fetch())

    def fetch(self) -> dict[str, Any]:
        """Waits for the oldest window and gives its metrics."""
        step, losses = self.closed.pop(0)
        values = np.asarray(jax.device_get(losses), np.float64)
        seconds = time.perf_counter() - (self.clock or 0.0)
        if not np.isfinite(values).all():
            first = step - len(values) + 1 + int(np.argmin(np.isfinite(values)))
            raise FloatingPointError(
                f"{self.label}: the loss must be finite, got {values.min()} at step "
                f"{first}; lower the learning rate."
            )
        self.timed += len(values)
        done = self.timed
        newest: Any = self.closed[0][1][-1] if self.closed else None
        if newest is not None and newest.is_ready():
            done += len(self.closed[0][1])
        loss, rate = float(values.mean()), done * self.tokens_per_step / seconds
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        return {"step": step, "loss": loss, "tokens_per_second": rate}
