"""A smaller model of any function: units by scores, by masks, or by a solver.

With batches, what is left makes up for what is gone; see
`jaxprune.posttraining.unit_remover`.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays.lazy import Leaves
from jaxprune.graph.axis_groups import AxisGroups, axis_groups
from jaxprune.graph.linear_ops import trace
from jaxprune.posttraining import fingerprint, unit_rows
from jaxprune.posttraining.passes.correction import Correct
from jaxprune.posttraining.pipeline import preparation
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.sums import Sums
from jaxprune.posttraining.progress import ProgressLog
from jaxprune.posttraining.solvers import layer_problem
from jaxprune.posttraining.unit_remover import Removal, remove_units
from jaxprune.structured import choice, cut
from jaxprune.structured import shrink as parts
from jaxprune.structured.shrink import Budget, Rules, ShrinkResult, Sizes
from jaxprune.typing import Masks, Params, Scores


class Settings(TypedDict, total=False):
    """Settings of the choice by batches, as `jp.shrink` takes them by keyword.

    Attributes:
      damping: share of the mean of the diagonal of XᵀX that is added to it; 0.01.
      relative: whether each row of X is divided by its root mean square first, so that
        a few tokens with massive activations are not most of XᵀX; False.
      correction: share of what the groups before lost that each updated matrix makes up
        for, in [0, 1]; see `jp.passes.correct`. Activations are then held twice; 0.0.
      positions: function of a batch to booleans of the samples' shape, (batch, time)
        say: which positions count; None counts all.
      directory: directory where progress is kept; the same call after a kill resumes
        from there; None keeps none.
      progress: whether to show how far it is; True.
    """

    damping: float
    relative: bool
    correction: float
    positions: Callable[[Any], jax.Array] | None
    directory: str | Path | None
    progress: bool


def shrink(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batch: Any,
    scores: Scores | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    masks: Masks | None = None,
    batches: Iterable[Any] | None = None,
    budget: Budget | None = None,
    groups: Rules = ("*",),
    sizes: Sizes | None = None,
    **settings: Unpack[Settings],
) -> ShrinkResult:
    """Removes whole units of a model: smaller parameters and a function that runs them.

    Which units go is said by scores, by masks, or by a solver that looks at batches.
    Groups that are alike, as the layers of a model are, lose as many units each, and
    each chooses its own. By default the width of a residual stream, units inside other
    units and units that only one leaf has are not removed.

    With scores or masks the result is what the function gives with all weights of the
    removed units zero. With batches the weights that are left make up for those that
    are gone. A unit is rows of one matrix then: a neuron is a row of the down
    projection, a head is some rows of the output projection. X is the input of that
    matrix over all batches and W (in, out) its values. The units are removed whose
    removal changes X W least once the other rows are updated by least squares, and the
    other rows get these updated values: optimal brain surgery on units. Each matrix is
    solved for the inputs that it has after the groups before it were pruned. Where a
    norm runs over the units before the matrix reads them, the removal of one changes
    the others; this change is left out of account, and so is what anything but a matmul
    reads of the units.

    Args:
      fn: function of parameters and a batch to anything; traceable by JAX.
      params: pytree of arrays or `jp.LazyArray`, sharded or not.
      batch: one batch, arrays or `jax.ShapeDtypeStruct`. The result takes batches of
        any shape that the function takes.
      scores: scores like the parameters: a unit's is the sum of those of its weights.
      sparsity: share of its units that each group loses, in [0, 1), or {glob, kind or
        name of a group: share}. A glob means groups that are removable by default; any
        other removable group is named in full. None with masks or a budget.
      masks: masks like the parameters, in the place of scores, which must prune whole
        units; those go, and with them their weights in leaves that have no mask: the
        result is what zeros there would give.
      batches: pytrees of arrays, all of one shape, in the place of scores: the solver
        chooses, and updates what is left. Their activations are kept.
      budget: share of the whole that may be left, in (0, 1), in the place of a
        sparsity; one share of units is found for all groups. A number is of the
        parameters; else {measure: share}, with the measure "parameters", "bytes" or
        "flops", of the batch.
      groups: globs or names of the groups that the budget is met with, by one share;
        or {glob or name: how large a share it loses beside the others}.
      sizes: {glob, kind or name of a group: the numbers of units that it may keep}, as
        {"*/mlp/*": range(128, 8193, 128)}. The number of units that a share or the
        budget asks for becomes the nearest of these numbers; of two as near, the larger
        one. Where more is then removed than the budget requires, the groups with the
        most numbers to choose from lose less.
      **settings: settings of the choice by batches: `damping`, `relative`,
        `correction`, `positions`, `directory` and `progress`; see `Settings`.

    Returns:
      `ShrinkResult(fn, params, report)`; its `cut` cuts an optimizer's state. The
      function can be jitted, differentiated and exported; custom derivatives and
      rematerialisation of the original are not in it. With batches the report also has
      "weights", a row for each updated weight: name, group, shape, units lost, damping,
      relative squared error of its output on the first 256 samples.

    Raises:
      ValueError: arguments disagree, a share or budget is out of range or cannot be
        met, a rule matches nothing, a group would lose all units or may keep no number
        that it could, scores are NaN, or masks are not of whole units. With batches: a
        group's units go out by no matrix, or by one that is also read transposed or in
        part, an input is not finite, or a Hessian could not be factorised.
      TypeError: a share or a criterion stands in the place of the scores, or a setting
        is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> up, down = jnp.arange(12.0).reshape(2, 6), jnp.ones((6, 3))
      >>> params, x = {"up": up, "down": down}, jnp.ones((5, 2))
      >>> small = jp.shrink(fn, params, x, jp.scores.magnitude(params), 0.5)
      >>> small.params["up"].shape, small.params["down"].shape
      ((2, 3), (3, 3))
      >>> small.report["kept"]
      {'down:0': [3, 4, 5]}
      >>> small.fn(small.params, x).shape
      (5, 3)
      >>> solved = jp.shrink(fn, params, x, sparsity=0.5, batches=[x])
      >>> solved.params["down"].shape
      (3, 3)

    Reference:
      Kurtic, Frantar, Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language
      Models", 2023, arXiv 2302.04089; Meng et al., "OSSCAR: One-Shot Structured Pruning
      in Vision and Language Models with Combinatorial Optimization", 2024, arXiv
      2403.12983.
    """
    share, measure = parts.as_budget(budget)
    # A criterion or its name, as `jp.gradual` takes them; a model that can be called
    # may be a tree too.
    is_tree = not isinstance(scores, int | float | str | FunctionType)
    idle = ", ".join(settings) if batches is None else ""
    unknown = ", ".join(settings.keys() - Settings.__annotations__.keys())
    if not is_tree:
        raise TypeError(
            f"shrink takes a tree of scores fourth and the share fifth, got {scores}; "
            "call jp.shrink(fn, params, batch, jp.scores.magnitude(params), 0.5)"
        )
    if scores is not None and is_tree and choice.is_masks(scores):
        raise ValueError(
            "shrink takes scores fourth, but these are masks; give masks=masks"
        )
    if sum([x is not None for x in (scores, masks, batches)]) != 1:
        raise ValueError(
            "shrink needs scores, masks or batches to choose by, and one of them "
            "alone; call jp.shrink(fn, params, batch, jp.scores.magnitude(params), "
            "0.5)"
        )
    if (sparsity is None) + (budget is None) != 1 + (masks is not None):
        raise ValueError(
            "shrink needs masks, or either a sparsity or a budget, got "
            f"sparsity={sparsity}, budget={budget}"
        )
    if masks is not None and (bool(sizes) or groups not in parts.ALL):
        raise ValueError(
            "masks say which units are left, so shrink takes no sizes and no groups; "
            "leave them out"
        )
    if unknown:
        raise TypeError(
            f"shrink has no setting {unknown}, only "
            f"{', '.join(Settings.__annotations__)}"
        )
    if idle:
        raise ValueError(
            f"{idle} is of the choice by batches; give batches=batches, or leave it out"
        )
    units = axis_groups(fn, params, batch)
    if masks is not None:
        kept = choice.by_masks(units, params, masks)
        cuts = cut.of_groups(units, kept)
        choice.check_whole(choice.masked_leaves(params, masks), cuts)
        return parts.of_cuts(fn, params, batch, units, kept, cuts)
    lost = parts.lost_units(units, sparsity, share, measure, groups, sizes)
    if batches is None:
        kept, rows = choice.by_scores(units, params, scores, lost), None
    else:
        params, kept, rows = _solved(fn, params, batches, units, lost, settings)
    result = parts.of_cuts(fn, params, batch, units, kept, cut.of_groups(units, kept))
    if rows is not None:
        result.report["weights"] = rows
    return result


class _Solved(NamedTuple):
    """Updated parameters, the units that groups keep, and rows of the report."""

    params: Params
    kept: dict[str, np.ndarray]
    rows: list[dict[str, Any]]


def _solved(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    units: AxisGroups,
    lost: Mapping[str, int],
    settings: Settings,
) -> _Solved:
    """The units that go by the solver's choice, and what makes up for them."""
    damping, relative = settings.get("damping", 0.01), settings.get("relative", False)
    correction, directory = settings.get("correction", 0.0), settings.get("directory")
    correct = Correct(correction)
    layer_problem.check_damping(damping)
    batches = preparation.check_batches(batches, "shrink")
    lost = {name: count for name, count in lost.items() if count}
    if not lost:
        return _Solved(params, {}, [])
    leaves = Leaves(jax.tree.leaves(params))
    # Shapes alone: tracing reads no batch.
    first = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), batches[0]
    )
    traced = trace(fn, params, first)
    consumers = unit_rows.consumers(units, list(lost), traced)
    updated = {reader.op.name for readers in consumers.values() for reader in readers}
    # Each use of a weight has inputs of its own.
    uses = [op for op in traced.linear_ops if op.name in updated]
    program = SegmentedProgram(traced, leaves, uses)
    drift = "drift" in correct.observes
    sums = Sums(hessian=True, relative=relative, drift=drift)
    calibration = directory and fingerprint.of_arrays(batches)  # before it is emptied
    pipeline = SequentialPipeline(program, batches, settings.get("positions"), sums)
    log = None
    if directory is not None:
        facts = {"lost": lost, "damping": float(damping), "relative": relative}
        facts |= {"correction": float(correction), "calibration": calibration}
        job = fingerprint.of_job(program, pipeline.counted, {})
        log = ProgressLog(Path(directory), {**facts, **job})
    removal = Removal(consumers, lost, damping, correct)
    shown = settings.get("progress", True)
    kept, rows = remove_units(removal, pipeline, log, progress=shown)
    params = jax.tree.unflatten(jax.tree.structure(params), leaves.all)
    return _Solved(params, kept, rows)
