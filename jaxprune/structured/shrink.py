"""The result of `jp.shrink`: a smaller function, its parameters and a report.

Units of the groups of `jp.axis_groups` are removed: heads, neurons, channels. The
result computes what the function computes with all weights of those units zero, in less
time and memory. It runs the traced program with smaller sizes, so no model class has to
know of it. `jp.shrink` chooses the units, and is `jaxprune.posttraining.shrink`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.graph.axis_groups import AxisGroups
from jaxprune.structured import cut, modules
from jaxprune.structured.budget import costs, whole_costs
from jaxprune.structured.shrunk_function import ShrunkFunction
from jaxprune.typing import Params


class ShrinkResult(NamedTuple):
    """A smaller model and the report of what was removed.

    Attributes:
      fn: the smaller function, of parameters and a batch.
      params: smaller parameters, in the containers of the original ones.
      report: JSON-able: "groups" (name to units before and after), "kept" (name to the
        units that are left), and "before" and "after" (parameters, bytes, FLOPs for
        the batch).
    """

    fn: ShrunkFunction
    params: Params
    report: dict[str, Any]

    def cut(self, state: Any) -> Any:
        """A tree of arrays beside the parameters, cut as they were.

        Args:
          state: an optimizer state, masks, scores, averages: its leaves belong to the
            parameters whose names their own paths end in.

        Returns:
          The tree with smaller arrays; counters and the like as they are.

        Raises:
          ValueError: a leaf belongs to a parameter that became smaller, and had
            another shape than that.
        """
        return self.fn.cut(state)

    def module(
        self,
        model: Any,
        batch: Any,
        call: Callable[[Any, Any], Any] | None = None,
    ) -> Any:
        """A smaller module of the same classes, of Flax NNX, Linen or Equinox.

        Arrays are those of `params`, attributes that hold sizes are set, and the module
        is compared with `fn`. What `params` lacks, as random state, is the model's.

        Args:
          model: the module that `fn` was made of; it stays as it is.
          batch: one batch, to compare the two with.
          call: function of a module and a batch, such as `lambda m, x: jax.vmap(m)(x)`;
            the module called with the batch if left out. A module of Linen is handed
            over bound to its parameters.

        Returns:
          The smaller module; that of Linen is called with `params`, as before.

        Raises:
          TypeError: the model is no such module.
          ValueError: no sizes of its classes give what `fn` gives, as where a layer is
            made with a number in the code; `fn` remains.

        Example:
          >>> import jax.numpy as jnp
          >>> import jaxprune as jp
          >>> from flax import nnx
          >>> rngs = nnx.Rngs(0)
          >>> model = nnx.Sequential(
          ...     nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs))
          >>> graphdef, params = nnx.split(model, nnx.Param)
          >>> fn = lambda params, x: nnx.merge(graphdef, params)(x)
          >>> x = jnp.ones((3, 4))
          >>> small = jp.shrink(fn, params, [x], jp.scores.magnitude, 0.5)
          >>> small.module(model, x).layers[0].out_features
          4
        """
        return modules.smaller_module(model, self, batch, call)


def of_units(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batch: Any,
    groups: AxisGroups,
    kept: Mapping[str, np.ndarray],
) -> ShrinkResult:
    """The smaller model that keeps some units of each group.

    Args:
      fn: the function.
      params: parameters of the function.
      batch: the batch that the groups were found with.
      groups: axis groups of the function.
      kept: group name to the units that are kept, of groups that lose any.

    Returns:
      The result of `jp.shrink`.
    """
    cuts = cut.of_groups(groups, kept)
    shrunk = ShrunkFunction(fn, params, batch, groups, cuts)
    report = {
        "groups": {
            group.name: {"before": group.units, "after": len(kept[group.name])}
            for group in groups
            if group.name in kept
        },
        "kept": {name: units.tolist() for name, units in kept.items()},
        "before": whole_costs(groups)._asdict(),
        "after": costs(groups.trace, cuts, shrunk.resized)._asdict(),
    }
    return ShrinkResult(shrunk, cut.params(params, cuts), report)
