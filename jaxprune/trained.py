"""Prunes a trained model in one walk through its program, with calibration batches.

Stage by stage: take all batches to the next input, add up its moments, prune the
weights that it meets, go on with the pruned weights. So each weight is pruned for the
input that it will really see; each activation is computed once; and memory holds one
stage's moments and the live activations.
"""

import ctypes
import dataclasses
import functools
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxprune import calibration, matrices, meshes, methods, shares, tree
from jaxprune.base import Params, Pattern, Prunable
from jaxprune.calibration import Moments
from jaxprune.journal import Journal
from jaxprune.matrices import Plan
from jaxprune.methods import Method
from jaxprune.shares import Shares
from jaxprune.stages import Stage, Stages
from jaxprune.stored import Stored
from jaxprune.tracing import Product, trace


class Trained(NamedTuple):
    """A pruned model and how it came about.

    Attributes:
      params: like the parameters that were given, pruned; `jp.Stored` leaves are
        that still, the pruned ones in `folder`, or arrays where none was given.
      report: JSON-able: method, pattern, sparsity asked for and achieved, calibration,
        seconds, what was not seen, and a row for each weight: name, shape, units
        removed, zeros, size, relative squared error of its output on the first 256
        samples, damping, seconds of its solver.
    """

    params: Params
    report: dict[str, Any]


def prune_trained(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    method: Method | methods.Name,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: Pattern | None = None,
    shares: Shares = shares.Uniform(),
    prunable: Prunable = tree.prunable,
    positions: Callable[[Any], jax.Array] | None = None,
    folder: str | Path | None = None,
    donate: bool = False,
    progress: bool = True,
) -> Trained:
    """Prunes a trained model after a look at calibration batches.

    The weights that are pruned are the products of a prunable leaf with an activation,
    as `jp.trace` lists them; a tied weight is pruned at its last use, for all its
    inputs. The same call gives the same bits.

    Args:
      fn: parameters and a batch to anything; traceable by JAX.
      params: the parameters, any pytree of arrays, sharded or not. `jp.Stored` leaves
        are in memory from their first use to their last: with `folder`, a model larger
        than memory is pruned in that of a layer.
      batches: pytrees of arrays, all of one shape; their live activations are kept. An
        iterator's batches are let go once they are used.
      method: "magnitude", "wanda", "ria", "sparsegpt", "alps", or a value of
        `jp.methods` with settings of your own.
      sparsity: the share to remove of the weights that are pruned, in [0, 1), or {glob
        on the weight's name: share}. None where the pattern fixes it.
      pattern: which weights live and die together; the method's own by default.
      shares: how the sparsity is shared out among the weights.
      prunable: which leaves may be pruned.
      positions: a batch to booleans of the samples' shape, (batch, time) say: which
        positions count. None counts all, BOS too.
      folder: where progress is kept; the same call after a kill goes on from there.
      donate: whether the old weights are given up, each as soon as its successor is
        there; THE OLD PARAMETERS ARE GONE then, and memory holds the model once.
      progress: whether to show a bar, on a terminal.

    Returns:
      The pruned parameters, of the same structure, dtypes and sharding, and a report.

    Raises:
      ValueError: an argument does not fit, an input is not finite, a factorisation
        failed, or the folder is another job's; nothing has been written then.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (4, 8)),
      ...           "down": jax.random.normal(keys[1], (8, 2))}
      >>> batches = [jax.random.normal(keys[2], (32, 4))]
      >>> pruned = jp.prune_trained(
      ...     fn, params, batches, method="sparsegpt", sparsity=0.5)
      >>> jp.sparsity(pruned.params).total
      0.5
    """
    started = time.perf_counter()
    batches = _checked_batches(batches)
    traced = trace(fn, params, batches[0])
    products = calibration.chosen(traced, params, prunable)
    leaves, marks = matrices.concrete(params, products, donate=donate)
    stages = Stages(traced, leaves, products)
    plan = matrices.planned(
        products,
        leaves,
        methods.named(method),
        sparsity,
        pattern,
        shares,
        lambda: calibration.calibrate(
            fn, params, batches, positions=positions, prunable=prunable
        ),
    )
    counts = [positions(batch) if positions else None for batch in batches]
    for stage, count in itertools.product(stages.stages, counts):
        calibration.counted(stage, count)
    facts = {
        **plan.facts(),
        "positions": "chosen" if positions else "all",
        "samples": _samples(stages.stages[0], counts),
        "batches": len(batches),
        "calibration": _digest(batches),
    }
    journal = None
    if folder is not None:
        rest = {name: i for name, i in stages.used.items() if name not in marks}
        marks |= matrices.fingerprints(rest, leaves)
        job = {
            "counted": _digest(counts),
            "program": stages.form(),
            "parameters": marks,
        }
        journal = Journal(Path(folder), {**facts, **job})
    walk = _Walk(stages, plan, batches, counts, journal, donate=donate)
    batches.clear()
    rows = walk.all(progress=progress)
    pruned = jax.tree.unflatten(jax.tree.structure(params), stages.leaves.all)
    report = {
        **facts,
        "programs": stages.programs,
        "achieved": sum(r["zeros"] for r in rows) / sum(r["size"] for r in rows),
        "seconds": time.perf_counter() - started,
        "unseen": dict(traced.unseen),
        "weights": rows,
    }
    return Trained(pruned, report)


class _Walk:
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
        homes = {i: x for i, x in enumerate(stages.leaves.all) if isinstance(x, Stored)}
        self._homes = homes
        self._owned = set(homes)  # leaves that are no array of the caller's
        self._written: dict[int, list[tuple[int, Product]]] = {}  # in the journal

    def all(self, *, progress: bool) -> list[dict[str, Any]]:
        """Every stage; one row a weight."""
        rows: list[dict[str, Any]] = []
        # None: no bar where there is no terminal.
        bar = tqdm(
            self.stages.stages,
            "pruning",
            unit="input",
            disable=None if progress else True,
        )
        for number, stage in enumerate(bar):
            bar.set_postfix_str(stage.products[0].name)
            rows += self._stage(number, stage)
            self._let_go(number)
        return rows

    def _stage(self, number: int, stage: Stage) -> list[dict[str, Any]]:
        known = self.done[number]
        moments, value = self._forward(stage)
        done = [p for p in stage.products if self.stages.last[p.name] == p.step]
        if known is not None:
            arrays, rows = known
            for product in done:
                self._put(product, arrays[product.name])
            self.done[number] = None  # its file is let go
        else:
            found = [self._prune(p, moments[p.name], value) for p in done]
            rows = [row for _, row in found]
            if self.journal:
                pruned = jax.device_get([matrix for matrix, _ in found])
                names = [product.name for product in done]
                written = dict(zip(names, pruned, strict=True))
                self.journal.write(number, written, rows)
        for product in done:
            self._written.setdefault(product.view.leaf, []).append((number, product))
        return rows

    def _forward(self, stage: Stage) -> tuple[dict[str, Moments], jax.Array]:
        """All batches to the stage's input; its moments, the first batch's value."""
        fixed = self.stages.fixed(stage)
        known = {name for done in self.done if done for name in done[0]}
        groups = [g for g in self.stages.sharing(stage) if known.isdisjoint(g)]
        needs = self.plan.method.needs
        seen: list[jax.Array] = []
        for i, live in enumerate(self.live):
            value, self.live[i] = self.stages.run(stage, live, fixed)
            seen = seen or [value]
            weights = calibration.counted(stage, self.counts[i])
            for names in groups:
                self._sums[names[0]] = calibration.add(
                    self._sums.get(names[0]),
                    stage.source,
                    value,
                    weights,
                    needs == "hessian",
                )
        moments = {}
        last = {p.name for p in stage.products if self.stages.last[p.name] == p.step}
        for names in groups:
            if last.isdisjoint(names):
                continue
            sums = self._sums.pop(names[0])
            found = calibration.finished(sums, names[0])
            moments.update(dict.fromkeys(names, found))
        return moments, seen[0]

    def _prune(
        self, product: Product, moments: Moments, value: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """One weight: solved, checked, put in its place."""
        started = time.perf_counter()
        leaf = self.stages.leaves[product.view.leaf]
        before = meshes.automatic(product.view.read, leaf)
        after, row = matrices.solve(self.plan, product, before, moments)
        row["seconds"] = time.perf_counter() - started
        row["error"] = matrices.error(product.source, value, before, after)
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
    new = meshes.automatic(write, leaf, jnp.asarray(matrix))
    return jax.device_put(new, getattr(leaf, "sharding", None))


def _read_back(
    home: Stored, journal: Journal, written: Sequence[tuple[int, Product]]
) -> jax.Array:
    """A stored leaf with its pruned weights, from the journal."""
    leaf = home.read()
    for number, product in written:
        matrix = journal.matrix(number, product.name)
        leaf = _replaced(product, leaf, matrix, donate=True)
    return leaf


def _checked_batches(batches: Iterable[Any]) -> list[Any]:
    batches = list(batches)
    if not batches:
        raise ValueError("prune_trained needs at least one batch, got none")
    first = calibration.kinds(batches[0])
    odd = [i for i, x in enumerate(batches) if calibration.kinds(x) != first]
    if odd:
        raise ValueError(
            f"all batches must have the shapes and dtypes of the first, but {odd[:6]} "
            "differ; drop the incomplete last batch, or cut all sequences to one length"
        )
    return batches


def _samples(first: Stage, counts: Sequence[Any]) -> int:
    """How many positions count, at the first input."""
    every = math.prod(first.source.leading)
    return sum(every if c is None else int(jnp.sum(c, dtype=np.int32)) for c in counts)


def _digest(batches: Sequence[Any]) -> str:
    """SHA-256 of the arrays in a tree, in order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(batches):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
