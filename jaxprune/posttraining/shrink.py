"""A smaller model of any function: units by scores, by masks, or by a solver.

With a solver the weights that stay make up for those that go; see
`jaxprune.posttraining.unit_remover`.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune.arrays import lazy
from jaxprune.arrays.lazy import Leaves
from jaxprune.graph import linear_ops
from jaxprune.graph.axis_groups import AxisGroups, axis_groups
from jaxprune.posttraining import fingerprint, unit_rows
from jaxprune.posttraining.passes.base import Pass
from jaxprune.posttraining.passes.chaining import Chain, as_chain
from jaxprune.posttraining.passes.correction import Correct
from jaxprune.posttraining.passes.pruning import SparseGPT
from jaxprune.posttraining.pipeline import preparation
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.sums import Sums
from jaxprune.posttraining.progress import ProgressLog
from jaxprune.posttraining.solvers import layer_problem
from jaxprune.posttraining.unit_remover import Removal, remove_units
from jaxprune.structured import choice
from jaxprune.structured import shrink as results
from jaxprune.structured.shrink import ShrinkResult
from jaxprune.structured.sizes import ALL, Keep, Rules, Sizes, lost_units
from jaxprune.typing import Masks, Params, Scores


def shrink(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    choose: Scores | Masks | Callable[[Params], Scores] | Pass | str,
    keep: Keep | None = None,
    *,
    groups: Rules = ("*",),
    sizes: Sizes | None = None,
    positions: Callable[[Any], jax.Array] | None = None,
    directory: str | Path | None = None,
) -> ShrinkResult:
    """Removes whole units of a model: smaller parameters and a function that runs them.

    Units are chosen by scores, by masks, or by a solver that looks at batches. Groups
    that are alike, as the layers of a model are, lose as many units each, and each
    chooses its own. By default the width of a residual stream, units inside other units
    and units that only one leaf has are not removed.

    With scores or masks the result is what the function gives with all weights of the
    removed units zero. With a solver the weights that stay make up for those that go. A
    unit is rows of one matrix then: a neuron is a row of the down projection, a head is
    some rows of the output projection. X is the input of that matrix over all batches
    and W (in, out) its values. The units are removed whose removal changes X W least
    once the other rows are updated by least squares, and the other rows get these
    updated values: SparseGPT's optimal brain surgery, on units. Each matrix is solved
    for the inputs that it has after the groups before it were pruned. Where a norm runs
    over the units before the matrix reads them, the removal of one changes the others;
    this change is left out of account, and so is what anything but a matmul reads of
    the units.

    Args:
      fn: function of parameters and a batch to anything; traceable by JAX.
      params: pytree of arrays or `jp.LazyArray`, sharded or not.
      batches: sequence of pytrees of arrays, all of one shape. A solver takes them all,
        and keeps their activations; scores and masks need the shapes of one, which may
        be `jax.ShapeDtypeStruct`. The result takes batches of any shape that the
        function takes.
      choose: one of
        - scores like the parameters, or a criterion such as `jp.scores.magnitude` that
          makes them: the score of a unit is the sum over its weights;
        - masks like the parameters, which must prune whole units; these go, and with
          them their weights in leaves that have no mask;
        - a solver: "sparsegpt", `jp.passes.sparsegpt` with a `damping` or `relative`,
          or a chain of it and `jp.passes.correct`.
      keep: what stays; None with masks. One of
        - share of the units of each group, in (0, 1];
        - {glob, kind or name of a group: share, or a whole number of units}. A glob
          means groups that are removable by default; any other removable group is named
          in full. Groups that no rule matches keep all;
        - a budget, {"parameters", "bytes" or "flops" of the batch: share of the whole
          model, in (0, 1)}; one share of units is found for all groups.
      groups: globs or names of the groups that a budget is met with, by one share; or
        {glob or name: how large a share it loses beside the others}.
      sizes: {glob, kind or name of a group: the numbers of units that it may keep}, as
        {"*/mlp/*": range(128, 8193, 128)}. The number of units that `keep` asks for
        becomes the nearest of these numbers; of two as near, the larger one. Where more
        is then removed than a budget requires, the groups with the most numbers to
        choose from lose less.
      positions: function of a batch to booleans of the samples' shape, (batch, time)
        say: which positions count for a solver; None counts all.
      directory: directory where a solver keeps its progress; the same call after a kill
        resumes from there.

    Returns:
      `ShrinkResult(fn, params, report)`; its `cut` cuts an optimizer's state. The
      function can be jitted, differentiated and exported; custom derivatives and
      rematerialisation of the original are not in it. With a solver the report also has
      "weights", a row for each updated weight: name, group, shape, units lost, damping,
      relative squared error of its output on the first 256 samples.

    Raises:
      ValueError: arguments disagree, a share or budget is out of range or cannot be
        met, a rule matches nothing, a group would lose all units or may keep no number
        that it could, scores are NaN, or masks are not of whole units. With a solver: a
        group's units go out by no matrix, or by one that is also read transposed or in
        part, an input is not finite, or a Hessian could not be factorised.
      TypeError: one batch stands in the place of a sequence.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> up, down = jnp.arange(12.0).reshape(2, 6), jnp.ones((6, 3))
      >>> params, x = {"up": up, "down": down}, jnp.ones((5, 2))
      >>> small = jp.shrink(fn, params, [x], jp.scores.magnitude, keep=0.5)
      >>> small.params["up"].shape, small.params["down"].shape
      ((2, 3), (3, 3))
      >>> small.report["kept"]
      {'down:0': [3, 4, 5]}
      >>> small.fn(small.params, x).shape
      (5, 3)
      >>> solved = jp.shrink(fn, params, [x], "sparsegpt", keep={"parameters": 0.7})
      >>> solved.params["down"].shape
      (4, 3)

    Reference:
      Kurtic, Frantar, Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language
      Models", 2023, arXiv 2302.04089; Meng et al., "OSSCAR: One-Shot Structured Pruning
      in Vision and Language Models with Combinatorial Optimization", 2024, arXiv
      2403.12983.
    """
    batches = preparation.check_batches(batches, "shrink")
    chain = _solver(choose) if isinstance(choose, str | Pass) else None
    # A model that can be called may be a tree of scores; a criterion is a leaf.
    if chain is None and callable(choose) and jax.tree.leaves(choose) == [choose]:
        choose = choose(params)
    by_masks = chain is None and choice.is_masks(choose)
    if by_masks != (keep is None) or (by_masks and (sizes or groups not in ALL)):
        raise ValueError(
            "shrink needs keep, what stays of the units that scores or a solver "
            "choose; masks say it themselves, with neither keep, sizes nor groups"
        )
    batch, rows = batches[0], None  # the pipeline empties the list
    units = axis_groups(fn, params, batch)
    if keep is None:
        kept = choice.by_masks(units, params, choose)
    else:
        lost = lost_units(units, keep, groups, sizes)
        if chain is None:
            kept = choice.by_scores(units, params, choose, lost)
        else:
            params, kept, rows = _solve_units(
                chain, units, params, lost, batches, positions, directory
            )
    result = results.of_units(fn, params, batch, units, kept)
    if rows is not None:
        result.report["weights"] = rows
    return result


def _solver(choose: Pass | str) -> Chain:
    """The passes that choose units and update the weights that stay."""
    chain = as_chain(choose)
    solver = chain.pruning
    plain = SparseGPT(damping=solver.damping, relative=solver.relative)
    if solver != plain or not {*map(type, chain.passes)} <= {SparseGPT, Correct}:
        raise ValueError(
            'units are chosen by "sparsegpt", with a damping or relative, and at most '
            f"jp.passes.correct after it; got {choose!r}; what stays is keep="
        )
    layer_problem.check_damping(solver.damping)
    return chain


def _solve_units(
    chain: Chain,
    units: AxisGroups,
    params: Params,
    lost: Mapping[str, int],
    batches: list[Any],
    positions: Callable[[Any], jax.Array] | None,
    directory: str | Path | None,
) -> tuple[Params, dict[str, np.ndarray], list[dict[str, Any]]]:
    """Updated parameters, the units that groups keep, and rows of the report."""
    lost = {name: count for name, count in lost.items() if count}
    if not lost:
        return params, {}, []
    leaves = Leaves(jax.tree.leaves(params))
    traced = linear_ops.of_program(units.trace.program, lazy.abstract(params))
    consumers = unit_rows.consumers(units, list(lost), traced)
    updated = {reader.op.name for readers in consumers.values() for reader in readers}
    # Each use of a weight has inputs of its own.
    uses = [op for op in traced.linear_ops if op.name in updated]
    program = SegmentedProgram(traced, leaves, uses)
    settings = {
        "damping": float(chain.pruning.damping),
        "relative": chain.pruning.relative,
        "correction": float(chain.correction),
    }
    sums = Sums(
        hessian=True,
        relative=chain.pruning.relative,
        drift="drift" in chain.observes,
    )
    calibration = directory and fingerprint.of_arrays(batches)  # before it is emptied
    pipeline = SequentialPipeline(program, batches, positions, sums)
    log = None
    if directory is not None:
        job = fingerprint.of_job(program, pipeline.counted, {})
        facts = {"lost": lost, **settings, "calibration": calibration}
        log = ProgressLog(Path(directory), {**facts, **job})
    kept, rows = remove_units(Removal(consumers, lost, chain), pipeline, log)
    return jax.tree.unflatten(jax.tree.structure(params), leaves.all), kept, rows
