"""Prunes a trained model in one walk through its program, with calibration batches.

The way there is `jaxprune.posttraining.sequential`; here is what is asked for, checked
and reported.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import tree
from jaxprune.graph.linear_ops import trace
from jaxprune.graph.segments import Stage, Stages
from jaxprune.masking.allocation import Shares, Uniform
from jaxprune.posttraining import calibration, fingerprint, methods
from jaxprune.posttraining import plan as plans
from jaxprune.posttraining.methods import Method
from jaxprune.posttraining.progress import Journal
from jaxprune.posttraining.sequential import Walk
from jaxprune.typing import Params, Pattern, Prunable


class Trained(NamedTuple):
    """A pruned model and how it came about.

    Attributes:
      params: like the parameters that were given, pruned; `jp.LazyArray` leaves are
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
    allocation: Shares = Uniform(),
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
      params: the parameters, any pytree of arrays, sharded or not. `jp.LazyArray`
        leaves are in memory from their first use to their last: with `folder`, a model
        larger than memory is pruned in that of a layer.
      batches: pytrees of arrays, all of one shape; their live activations are kept. An
        iterator's batches are let go once they are used.
      method: "magnitude", "wanda", "ria", "sparsegpt", "alps", or a value of
        `jp.methods` with settings of your own.
      sparsity: the share to remove of the weights that are pruned, in [0, 1), or {glob
        on the weight's name: share}. None where the pattern fixes it.
      pattern: which weights live and die together; the method's own by default.
      allocation: how the sparsity is shared out among the weights.
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
    leaves, marks = plans.concrete(params, products, donate=donate)
    stages = Stages(traced, leaves, products)
    plan = plans.planned(
        products,
        leaves,
        methods.named(method),
        sparsity,
        pattern,
        allocation,
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
        marks |= fingerprint.fingerprints(rest, leaves)
        job = {
            "counted": _digest(counts),
            "program": stages.form(),
            "parameters": marks,
        }
        journal = Journal(Path(folder), {**facts, **job})
    walk = Walk(stages, plan, batches, counts, journal, donate=donate)
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
