"""The walk of `prune_trained`: all batches, side by side, through a program's stages.

Stage by stage: take all batches to the next input, add up its moments, prune the
weights that it meets, go on with the pruned weights. So each weight is pruned for the
input that it will really see, each activation is computed once, and memory holds one
stage's moments and the live activations.

A method may ask for the inputs that its layer has while it is dense. Then the moments
of all stages of a layer are taken first, and the stages are run once more as they are
pruned; the activations at hand are held once all the same.
"""

import ctypes
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxprune.arrays import placement
from jaxprune.arrays.lazy import LazyArray
from jaxprune.graph.linear_ops import Product
from jaxprune.graph.segments import Stage, Stages, layers
from jaxprune.posttraining import calibration, solve_weight
from jaxprune.posttraining.calibration import Moments
from jaxprune.posttraining.plan import Plan
from jaxprune.posttraining.progress import Journal


class _Seen(NamedTuple):
    """What the batches showed at one stage.

    Attributes:
      moments: of the weights whose last use it is, by name.
      value: its input, of the first batch.
    """

    moments: dict[str, Moments]
    value: jax.Array


class Walk:
    """All batches, side by side, through the stages."""

    def __init__(
        self,
        stages: Stages,
        plan: Plan,
        batches: Sequence[Any],
        counts: Sequence[jax.Array | None],
        journal: Journal | None,
        *,
        donate: bool,
    ) -> None:
        self.stages, self.plan, self.journal = stages, plan, journal
        self.live = [stages.start(batch) for batch in batches]
        self.counts = counts
        read = journal.read if journal else lambda _: None
        # Arrays and rows of the stages that are done.
        self.done = [read(i) for i in range(len(stages.stages))]
        self._sums: dict[str, Moments] = {}  # of weights whose last use is to come
        self.donate = donate
        homes = {
            i: x for i, x in enumerate(stages.leaves.all) if isinstance(x, LazyArray)
        }
        self._homes = homes
        self._owned = set(homes)  # leaves that are no array of the caller's
        self._written: dict[int, list[tuple[int, Product]]] = {}  # in the journal

    def all(self, *, progress: bool) -> list[dict[str, Any]]:
        """Every stage; one row a weight."""
        count = len(self.stages.stages)
        parts = [range(i, i + 1) for i in range(count)]
        if self.plan.method.inputs == "dense":
            parts = layers(self.stages.stages)
        rows: list[dict[str, Any]] = []
        # None: no bar where there is no terminal.
        quiet = None if progress else True
        with tqdm(total=count, desc="pruning", unit="input", disable=quiet) as bar:
            for numbers in parts:
                rows += self._part(numbers, bar)
        return rows

    def _part(self, numbers: range, bar: tqdm) -> list[dict[str, Any]]:
        """The stages of these numbers, whose inputs are all seen before any prunes."""
        rows: list[dict[str, Any]] = []
        seen = self._forward(numbers)
        for number in numbers:
            stage = self.stages.stages[number]
            bar.set_postfix_str(stage.products[0].name)
            if number > numbers[0] and numbers[-1] + 1 < len(self.stages.stages):
                self._again(stage)
            rows += self._stage(number, stage, seen)
            self._let_go(number)
            bar.update()
        return rows

    def _stage(
        self, number: int, stage: Stage, seen: dict[int, _Seen]
    ) -> list[dict[str, Any]]:
        """Prunes the weights of a stage, or takes them from the journal."""
        known = self.done[number]
        done = self._finishing(stage)
        if known is not None:
            arrays, rows = known
            for product in done:
                self._put(product, arrays[product.name])
            self.done[number] = None  # its file is let go
        else:
            own = seen.pop(number)
            found = [self._prune(p, own.moments[p.name], own.value) for p in done]
            rows = [row for _, row in found]
            if self.journal:
                pruned = jax.device_get([matrix for matrix, _ in found])
                names = [product.name for product in done]
                written = dict(zip(names, pruned, strict=True))
                self.journal.write(number, written, rows)
        for product in done:
            self._written.setdefault(product.view.leaf, []).append((number, product))
        return rows

    def _finishing(self, stage: Stage) -> list[Product]:
        """The products of a stage that are their weights' last uses."""
        return [p for p in stage.products if self.stages.last[p.name] == p.step]

    def _forward(self, numbers: range) -> dict[int, _Seen]:
        """All batches through some stages as they are, and to the input of the first.

        Where all is known already no further than to the first.
        """
        if all(self.done[number] is not None for number in numbers):
            numbers = numbers[:1]
        stages = [self.stages.stages[number] for number in numbers]
        fixed = [self.stages.fixed(stage) for stage in stages]
        known = {name for done in self.done if done for name in done[0]}
        groups = [
            [g for g in self.stages.sharing(stage) if known.isdisjoint(g)]
            for stage in stages
        ]
        values: list[jax.Array] = []
        for i, live in enumerate(self.live):
            for k, stage in enumerate(stages):
                value, live = self.stages.run(stage, live, fixed[k])
                self._add(stage, groups[k], value, self.counts[i])
                if k == 0:
                    self.live[i] = live
                if i == 0:
                    values.append(value)
            if len(stages) > 1:  # or the host runs ahead, and what it made piles up
                value.block_until_ready()
        return {
            number: _Seen(self._moments(stage, own), value)
            for number, stage, own, value in zip(
                numbers, stages, groups, values, strict=True
            )
        }

    def _again(self, stage: Stage) -> None:
        """All batches to a stage's input, as the pruned weights before it leave it."""
        fixed = self.stages.fixed(stage)
        for i, live in enumerate(self.live):
            _, self.live[i] = self.stages.run(stage, live, fixed)

    def _add(
        self,
        stage: Stage,
        groups: Sequence[Sequence[str]],
        value: jax.Array,
        count: jax.Array | None,
    ) -> None:
        """Adds one batch's input to the sums of the weights that meet it."""
        weights = calibration.counted(stage, count)
        hessian = self.plan.method.needs == "hessian"
        for names in groups:
            before = self._sums.get(names[0])
            added = calibration.add(before, stage.source, value, weights, hessian)
            self._sums[names[0]] = added

    def _moments(
        self, stage: Stage, groups: Sequence[Sequence[str]]
    ) -> dict[str, Moments]:
        """The moments of the weights whose last use this is."""
        moments: dict[str, Moments] = {}
        last = {product.name for product in self._finishing(stage)}
        for names in groups:
            if not last.isdisjoint(names):
                sums = self._sums.pop(names[0])
                found = calibration.finished(sums, names[0])
                moments.update(dict.fromkeys(names, found))
        return moments

    def _prune(
        self, product: Product, moments: Moments, value: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """One weight: solved, checked, put in its place."""
        started = time.perf_counter()
        leaf = self.stages.leaves[product.view.leaf]
        before = placement.automatic(product.view.read, leaf)
        after, row = solve_weight.solve(self.plan, product, before, moments)
        row["seconds"] = time.perf_counter() - started
        row["error"] = solve_weight.error(product.source, value, before, after)
        self._put(product, after)
        return after, row

    def _put(self, product: Product, matrix: Any) -> None:
        i = product.view.leaf
        leaf = self.stages.leaves[i]
        spare = self.donate or i in self._owned
        self.stages.leaves[i] = _replaced(product, leaf, matrix, donate=spare)
        if self.donate and isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
        self._owned.add(i)

    def _let_go(self, number: int) -> None:
        """Frees the stored leaves whose last use this stage was."""
        for i in self.stages.done(number):
            self.stages.leaves.forget(i)
            home, written = self._homes.get(i), self._written.get(i)
            if home and written and self.journal:
                read = functools.partial(_read_back, home, self.journal, written)
                self.stages.leaves[i] = dataclasses.replace(home, read=read)
        _trim()


def _trim() -> None:
    """Gives freed pages back: glibc keeps those of each thread, 100 MB and more."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _replaced(product: Product, leaf: Any, matrix: Any, *, donate: bool) -> jax.Array:
    """The leaf, where it was, with another matrix in the place of a weight."""
    write = functools.partial(product.view.write, donate=donate)
    new = placement.automatic(write, leaf, jnp.asarray(matrix))
    return jax.device_put(new, getattr(leaf, "sharding", None))


def _read_back(
    home: LazyArray, journal: Journal, written: Sequence[tuple[int, Product]]
) -> jax.Array:
    """A stored leaf with its pruned weights, from the journal."""
    leaf = home.read()
    for number, product in written:
        matrix = journal.matrix(number, product.name)
        leaf = _replaced(product, leaf, matrix, donate=True)
    return leaf
