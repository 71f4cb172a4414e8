"""Gradient steps on what is left of a block, towards the output of the dense one.

A block (`segments.block_subgraph`) is the part of the program that uses the weights of
a layer. It begins at the input of the layer's first matrices and ends at the input of
the next layer's first matrices, behind the next layer's norm. The block's input comes
from the pruned model and its target from the dense one, so that the block also makes up
for what earlier blocks lost. Zeros stay zeros.

The loss is relative, token by token: |y - target|^2 / |target|^2, with norms along the
last axis. A few massive activations (a sequence's first token) would make up nearly all
of a plain squared error, and nothing else would be learned.

| papers on block-wise fine-tuning | here |
|---|---|
| theta of a block | `trained`, the float32 values of `Value` |
| M, the mask | `x != 0`: a pruned weight is zero and stays zero |
| X, the pruned model's input of the block | `_inputs` |
| f(X; theta) | `Subgraph.run`, by `_block_loss` |
| Y = f(X dense; theta dense) | `_targets` |
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxprune.arrays import placement
from jaxprune.arrays.rules import Rule, check
from jaxprune.graph.program import Subgraph
from jaxprune.posttraining.passes.refinement import Refine
from jaxprune.posttraining.pipeline.segmented_program import (
    Activations,
    SegmentedProgram,
)
from jaxprune.posttraining.refined_values import Value, counts_any, trained_values
from jaxprune.posttraining.relative_error import block_error

Arrays: TypeAlias = list[jax.Array]

_measured = jax.jit(block_error)


_FINITE = [
    Rule(
        lambda v: math.isfinite(v.loss),
        "the output of a block must be finite to be refined, but that of '{name}' is "
        "not",
        "look for NaN or overflow in the model's forward pass",
    )
]


class Refiner:
    """The dense model's activations beside the pruned one's, block by block.

    With a mesh activations lie on the devices, a batch each. A block is trained on one
    batch after the other, as on one device: the first device of every process does it,
    and all come to the same values.

    Attributes:
      refine: how it is done.
      values: what each block trains.
    """

    def __init__(
        self,
        program: SegmentedProgram,
        refine: Refine,
        positions: Sequence[jax.Array | None],
    ) -> None:
        """Begins before the first block.

        Args:
          program: the program, with its blocks.
          refine: how it is done.
          positions: booleans for each batch, which samples count, or None for all.
        """
        self.refine = refine
        self.values = trained_values(program)
        self._program, self._positions = program, positions
        self._counts = list(map(counts_any, positions))
        self._dense: list[Activations] = []
        self._inputs: list[Activations] = []  # of the block, by the pruned model
        self._targets: list[Arrays] = []
        steps = refine.passes * sum(self._counts[: refine.split(len(positions))])
        rate = optax.cosine_decay_schedule(refine.learning_rate, steps)
        self._optimizer = optax.adam(rate)
        self._steps: dict[Any, Callable[..., Any]] = {}

    def begin(
        self,
        block: int,
        activations: Sequence[Activations],
        dense: Sequence[Activations],
        before: Mapping[int, jax.Array],
    ) -> None:
        """Takes the dense model through a block, before its weights are pruned.

        Args:
          block: number of the block.
          activations: activations of each batch, at the block's start, by the pruned
            model.
          dense: those by the dense model, where it runs beside; else it does so here.
          before: values that changed, as the dense model has them.
        """
        program, part = self._program, self._program.blocks[block]
        self._inputs = list(activations)
        # Nothing was pruned before the first.
        runs_beside, dense = bool(dense), dense or self._dense or self._inputs
        after = program.layers[block].stop
        later: frozenset[int] = frozenset()
        if after < len(program.segments):
            later = program.segments[after].later
        constants = program.constants(part, before)
        self._dense, self._targets = [], []
        for values in dense:
            results = program.compute(part, values | constants)
            if not runs_beside:
                known = values | results
                self._dense.append({n: x for n, x in known.items() if n in later})
            self._targets.append(_floats(results))
            # Or the host runs ahead, and the activations of many batches pile up.
            jax.block_until_ready(self._targets[-1])

    def train(
        self, block: int, shown: Callable[[float], Any]
    ) -> tuple[list[jax.Array], dict[str, Any]]:
        """Trains a block whose weights are pruned.

        Args:
          block: number of the block.
          shown: function that is called after each pass, with the loss by then.

        Returns:
          The block's `values` as they are best, in their dtypes, and the losses until
          one is not finite.

        Raises:
          ValueError: the loss is not finite before the first step.
        """
        program, part = self._program, self._program.blocks[block]
        constants, values = program.constants(part), self.values[block]
        numbers = [value.number for value in values]
        best = [constants[n] for n in numbers]
        losses = [self._loss(part, constants)]
        first = program.segments[program.layers[block][0]]
        check(_FINITE, loss=losses[0], name=first.linear_ops[0].name)
        if values and losses[0] > 0:
            passes = self._passes(part, values, constants)
            for trained in itertools.islice(passes, self.refine.passes):
                new = dict(zip(numbers, trained, strict=True))
                loss = self._loss(part, constants | new)
                if not math.isfinite(loss):
                    break
                losses.append(loss)
                shown(loss)
                kept = losses.index(min(losses))
                if kept == len(losses) - 1:
                    best = trained
                if len(losses) - 1 - kept >= self.refine.patience:
                    break
        record = {"before": losses[0], "after": min(losses), "losses": losses}
        return best, record

    def loss(self, block: int) -> float:
        """The mean loss of the batches that measure, by the weights as they are."""
        part = self._program.blocks[block]
        return self._loss(part, self._program.constants(part))

    def end(self) -> list[Activations]:
        """Lets go of a block; the pruned model's activations at its start."""
        inputs, self._inputs, self._targets = self._inputs, [], []
        return inputs

    def _passes(
        self, part: Subgraph, values: Sequence[Value], constants: Mapping[int, Any]
    ) -> Iterator[list[jax.Array]]:
        """What the block trains after each pass over the batches, in its dtypes."""
        numbers = [value.number for value in values]
        dtypes = tuple(constants[n].dtype for n in numbers)
        step = self._step(part, values, dtypes)
        devices = self._program.devices
        if devices is not None:
            constants = devices.local(constants)
        # Copies: a step gives up the arrays that it is given.
        trained = [jnp.array(constants[n], np.float32) for n in numbers]
        state = self._optimizer.init(trained)
        trained, state = placement.committed((trained, state))
        count = self.refine.split(len(self._counts))
        for number in itertools.count():
            # The order depends on the pass alone, so that a resumed block repeats it.
            for i in np.random.default_rng(number).permutation(count):
                if not self._counts[i]:
                    continue
                known = {**self._item(self._inputs, i), **constants}
                others = [known[n] for n in part.inputs if n not in numbers]
                targets = self._item(self._targets, i)
                trained, state = step(trained, state, others, targets, self._counted(i))
            after = [jnp.array(x, k) for x, k in zip(trained, dtypes, strict=True)]
            yield after if devices is None else devices.everywhere(after)

    def _item(self, stacks: Sequence[Any], i: int) -> Any:
        """What belongs to batch i, of a list by batches or by stacks of them."""
        devices = self._program.devices
        if devices is None:
            return stacks[i]
        return devices.item(stacks[i // devices.count], i % devices.count)

    def _counted(self, i: int) -> Any:
        """Which samples of batch i count, or None; where the step can read it."""
        positions, devices = self._positions[i], self._program.devices
        if devices is None or positions is None:
            return positions
        return devices.local(devices.everywhere(positions))

    def _loss(self, part: Subgraph, constants: Mapping[int, Any]) -> float:
        """The mean loss of the batches that measure."""
        begin, end = self.refine.split(len(self._counts)), len(self._counts)
        batches = [i for i in range(begin, end) if self._counts[i]]
        devices = self._program.devices
        together = 1 if devices is None else devices.count
        total, results = 0.0, {}
        for i in batches:
            stack = i // together
            if stack not in results:  # one at a time is held
                inputs = {**self._inputs[stack], **constants}
                results = {stack: _floats(self._program.compute(part, inputs))}
            outputs = results[stack]
            if devices is not None:
                outputs = devices.item(outputs, i % together)
            targets = self._item(self._targets, i)
            total += float(_measured(outputs, targets, self._counted(i)))
        return total / len(batches)

    def _step(
        self, part: Subgraph, values: Sequence[Value], dtypes: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """A compiled step of a block; equal blocks share it."""
        places = tuple(part.inputs.index(value.number) for value in values)
        masked = tuple(value.is_pruned for value in values)
        key = (part.key, places, masked, dtypes)
        if key not in self._steps:
            loss = functools.partial(
                _block_loss, part=part, places=places, masked=masked, dtypes=dtypes
            )
            self._steps[key] = _compiled(loss, self._optimizer)
        return self._steps[key]


def _block_loss(
    trained: Arrays,
    others: Arrays,
    targets: Arrays,
    counted: jax.Array | None,
    *,
    part: Subgraph,
    places: Sequence[int],
    masked: Sequence[bool],
    dtypes: Sequence[Any],
) -> Float[Array, ""]:
    """The loss of a block by what it trains, float32, and all else that it reads."""
    values = list(others)
    for place, x, is_masked, dtype in sorted(
        zip(places, trained, masked, dtypes, strict=True), key=lambda row: row[0]
    ):
        # A pruned weight is zero and gets no gradient, so that Adam leaves it there.
        kept = jnp.where(x != 0, x, jnp.zeros_like(x)) if is_masked else x
        values.insert(place, kept.astype(dtype))
    results = dict(zip(part.outputs, part.run(*values), strict=True))
    return block_error(_floats(results), targets, counted)


def _compiled(
    loss: Callable[..., jax.Array], tx: optax.GradientTransformation
) -> Callable[..., Any]:
    """A step of training: what is trained, its state and the loss's other arguments."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Arrays, state: Any, *others: Any) -> tuple[Arrays, Any]:
        updates, state = tx.update(jax.grad(loss)(trained, *others), state, trained)
        return optax.apply_updates(trained, updates), state

    return step


def _floats(results: Mapping[int, jax.Array]) -> Arrays:
    """The values that an error is measured on, in the order of their numbers."""
    return [
        results[n]
        for n in sorted(results)
        if jnp.issubdtype(results[n].dtype, jnp.floating)
    ]
