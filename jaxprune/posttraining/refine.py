"""Gradient steps on what is left of a block, towards the output of the dense one.

A block (`segments.block_subgraph`) is the part of the program that uses the weights of
a layer. It begins at the input of the layer's first matrices and ends at the input of
the next layer's first matrices, behind the next layer's norm. The block's input comes
from the pruned model and its target from the dense one, so that the block also makes up
for what earlier blocks lost. Zeros stay zeros.

The loss is relative, token by token: |y - target|^2 / |target|^2, with norms along the
last axis. A few massive activations (a sequence's first token) would make up nearly all
of a plain squared error, and nothing else would be learned.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxprune.arrays import placement
from jaxprune.arrays.messages import refuse_fractions
from jaxprune.graph.program import Subgraph
from jaxprune.graph.weight_view import WeightView
from jaxprune.posttraining.pipeline import Activations, SegmentedProgram
from jaxprune.posttraining.relative_error import relative_error

Arrays: TypeAlias = list[jax.Array]

_measured = jax.jit(relative_error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refine:
    """How blocks are refined after their weights were pruned.

    Adam, its learning rate falling to zero along a cosine, one step a batch. Trained
    are the kept weights of the pruned matrices, and the floating vectors that one layer
    alone reads: norms and biases, and running statistics too if they are among the
    parameters, so let the function close over `batch_stats`. After each pass the loss
    is measured on batches that are not trained on; the best values are kept, those
    before the first step among them.

    Attributes:
      passes: how often each batch is trained on, at most.
      learning_rate: of the first step.
      held_out: the share of the batches, the last ones, that measure; at least one.
      patience: after so many passes without a better loss it ends.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 6)
      >>> params = {"up": jax.random.normal(keys[0], (4, 8)),
      ...           "down": jax.random.normal(keys[1], (8, 2))}
      >>> batches = [jax.random.normal(key, (32, 4)) for key in keys[2:]]
      >>> pruned = jp.prune_trained(fn, params, batches, method="wanda", sparsity=0.5,
      ...                           refine=jp.Refine(learning_rate=1e-2))
      >>> jp.sparsity(pruned.params).total
      0.5
      >>> all(row["after"] < row["before"] for row in pruned.report["refined"])
      True

    Reference:
      The objective is that of block-wise fine-tuning after pruning, with the dense
      stream as the target and the pruned one as the input; ours divides by each token's
      own norm and chooses the pass by batches that are held out.
    """

    passes: int = 8
    learning_rate: float = 1e-4
    held_out: float = 0.1
    patience: int = 2

    def __post_init__(self) -> None:
        """Refuses what is no training."""
        refuse_fractions("Refine", passes=self.passes, patience=self.patience)
        if self.passes < 1 or self.patience < 1:
            raise ValueError(
                "a refinement needs passes and patience of at least 1, got "
                f"passes={self.passes} and patience={self.patience}; refine=None does "
                "without"
            )
        if not (0 < self.learning_rate < 1 and 0 < self.held_out < 1):
            raise ValueError(
                "a refinement needs a learning rate and a share to hold out in (0, 1), "
                f"got learning_rate={self.learning_rate} and held_out={self.held_out}"
            )

    def check(
        self, program: SegmentedProgram, positions: Sequence[jax.Array | None]
    ) -> None:
        """Refuses what nothing can be trained or measured by.

        Raises:
          ValueError: no result is a float that depends on the batch, no weight is a
            layer's own, or no position counts in the batches that train or measure.
        """
        kinds = program.trace.program.avals
        wanted = program.blocks[-1].outputs
        if not any(jnp.issubdtype(kinds[n].dtype, jnp.floating) for n in wanted):
            raise ValueError(
                "refine measures the last layer by what the function returns, so some "
                "result must be a float that the weights decide, but none is; let it "
                "return the model's final states"
            )
        if not any(trained_values(program)):
            raise ValueError(
                "refine finds nothing to train, since several layers read each weight, "
                "as they do of a stack that is cast before it is sliced; cast it "
                "inside of the scan, or leave refine out"
            )
        begin, counts = self.split(len(positions)), list(map(_counts, positions))
        if not (any(counts[:begin]) and any(counts[begin:])):
            raise ValueError(
                "refine trains on the first batches and measures by the last, but "
                "positions counts nothing in one of the two; put them in another "
                "order, or change held_out"
            )

    def split(self, batches: int) -> int:
        """How many of the batches are trained on; the rest measures.

        Raises:
          ValueError: there is none to measure by.
        """
        if batches < 2:
            raise ValueError(
                "refine needs at least two batches, one of them to measure by, got "
                f"{batches}; cut the batches smaller"
            )
        return batches - min(batches - 1, max(1, round(batches * self.held_out)))


class Value(NamedTuple):
    """Something that a block trains.

    Attributes:
      number: of the value in the program.
      leaf: the leaf's path name.
      view: the leaf, or the part of it that the block reads.
      is_pruned: whether its zeros stay zeros.
    """

    number: int
    leaf: str
    view: WeightView
    is_pruned: bool


def trained_values(program: SegmentedProgram) -> list[list[Value]]:
    """What each block trains: pruned weights, and vectors, that it alone reads."""
    views = program.trace.views
    names = {i: name for name, i in program.trace.leaves.items()}
    # Before the first block there are steps of the first segment.
    parts = [program.segments[0].subgraph, *program.blocks]
    reads = [{n for n in part.inputs if n in views} for part in parts]
    every = {(i, n) for i, own in enumerate(reads) for n in own}

    def alone(block: int, number: int) -> bool:
        return all(
            views[number].is_apart(views[other])
            for i, other in every
            if views[other].leaf == views[number].leaf and (i, other) != (block, number)
        )

    # Of all layers: a branch of an earlier one may be computed with a later block.
    finished = map(program.finished_in, program.segments)
    pruned = [op.view for ops in finished for op in ops]
    found = []
    for i in range(1, len(parts)):
        values = []
        for number in parts[i].inputs:  # in order of first use
            if number not in reads[i] or not alone(i, number):
                continue
            view, kind = views[number], program.trace.program.avals[number]
            is_weight = any(not one.is_apart(view) for one in pruned)
            is_vector = sum(size > 1 for size in view.shape) <= 1
            if (is_weight or is_vector) and jnp.issubdtype(kind.dtype, jnp.floating):
                values.append(Value(number, names[view.leaf], view, is_weight))
        found.append(values)
    return found


class Refiner:
    """The dense model's activations beside the pruned one's, block by block.

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
        """Begins before the first block; `positions` are those that count."""
        self.refine = refine
        self.values = trained_values(program)
        self._program, self._positions = program, positions
        self._counts = list(map(_counts, positions))
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
          block: its number.
          activations: of each batch, at the block's start, by the pruned model.
          dense: by the dense model, where it runs beside; else it does so here.
          before: what the dense model has in the place of values that changed.
        """
        program, part = self._program, self._program.blocks[block]
        self._inputs = list(activations)
        # Nothing was pruned before the first.
        is_given, dense = bool(dense), dense or self._dense or self._inputs
        after = program.layers[block].stop
        later: frozenset[int] = frozenset()
        if after < len(program.segments):
            later = program.segments[after].later
        constants = program.constants(part, before)
        self._dense, self._targets = [], []
        for own in dense:
            results = program.compute(part, own | constants)
            if not is_given:
                known = own | results
                self._dense.append({n: x for n, x in known.items() if n in later})
            self._targets.append(_floats(results))
            # Or the host runs ahead, and the activations of many batches pile up.
            jax.block_until_ready(self._targets[-1])

    def train(
        self, block: int, shown: Callable[[float], Any]
    ) -> tuple[list[jax.Array], dict[str, Any]]:
        """Trains a block whose weights are pruned.

        Args:
          block: its number.
          shown: called after each pass, with the loss by then.

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
        count = self.refine.split(len(self._inputs))
        losses = [self._loss(part, constants)]
        if not math.isfinite(losses[0]):
            raise ValueError(
                "the output of a block must be finite to be refined, but that of "
                f"'{program.segments[program.layers[block][0]].linear_ops[0].name}' is "
                "not; look for NaN or overflow in the model's forward pass"
            )
        if values and losses[0] > 0:
            dtypes = tuple(x.dtype for x in best)
            step = self._step(part, values, dtypes)
            # Copies: a step gives up the arrays that it is given.
            trained = [jnp.array(x, np.float32) for x in best]
            state = self._optimizer.init(trained)
            trained, state = placement.committed((trained, state))
            for number in range(self.refine.passes):
                for i in np.random.default_rng(number).permutation(count):
                    if not self._counts[i]:
                        continue
                    known = {**self._inputs[i], **constants}
                    given = [known[n] for n in part.inputs if n not in numbers]
                    trained, state = step(
                        trained, state, given, self._targets[i], self._positions[i]
                    )
                found = [jnp.array(x, k) for x, k in zip(trained, dtypes, strict=True)]
                new = dict(zip(numbers, found, strict=True))
                loss = self._loss(part, constants | new)
                if not math.isfinite(loss):
                    break
                losses.append(loss)
                shown(loss)
                kept = losses.index(min(losses))
                if kept == len(losses) - 1:
                    best = found
                if len(losses) - 1 - kept >= self.refine.patience:
                    break
        record = {"before": losses[0], "after": min(losses), "losses": losses}
        return best, record

    def end(self) -> list[Activations]:
        """Lets go of a block; the pruned model's activations at its start."""
        inputs, self._inputs, self._targets = self._inputs, [], []
        return inputs

    def _loss(self, part: Subgraph, constants: Mapping[int, Any]) -> float:
        """The mean loss of the batches that measure."""
        begin, end = self.refine.split(len(self._inputs)), len(self._inputs)
        batches = [i for i in range(begin, end) if self._counts[i]]
        total = 0.0
        for i in batches:
            results = self._program.compute(part, {**self._inputs[i], **constants})
            own = _floats(results)
            total += float(_measured(own, self._targets[i], self._positions[i]))
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
    given: Arrays,
    targets: Arrays,
    counted: jax.Array | None,
    *,
    part: Subgraph,
    places: Sequence[int],
    masked: Sequence[bool],
    dtypes: Sequence[Any],
) -> Float[Array, ""]:
    """The loss of a block by what it trains, float32, and all else that it reads."""
    values = list(given)
    for place, x, is_masked, kind in sorted(
        zip(places, trained, masked, dtypes, strict=True), key=lambda own: own[0]
    ):
        # A pruned weight is zero and gets no gradient, so that Adam leaves it there.
        own = jnp.where(x != 0, x, jnp.zeros_like(x)) if is_masked else x
        values.insert(place, own.astype(kind))
    results = dict(zip(part.outputs, part.run(*values), strict=True))
    return relative_error(_floats(results), targets, counted)


def _compiled(
    loss: Callable[..., jax.Array], tx: optax.GradientTransformation
) -> Callable[..., Any]:
    """A step of training: what is trained, its state and the loss's other arguments."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Arrays, state: Any, *others: Any) -> tuple[Arrays, Any]:
        updates, state = tx.update(jax.grad(loss)(trained, *others), state, trained)
        return optax.apply_updates(trained, updates), state

    return step


def _counts(positions: jax.Array | None) -> bool:
    """Whether anything counts in a batch."""
    return positions is None or bool(jnp.any(positions))


def _floats(results: Mapping[int, jax.Array]) -> Arrays:
    """The values that an error is measured on, in the order of their numbers."""
    return [
        results[n]
        for n in sorted(results)
        if jnp.issubdtype(results[n].dtype, jnp.floating)
    ]
