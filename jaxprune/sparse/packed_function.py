"""What `jp.pack` returns in the place of the original function."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.arrays.messages import listed
from jaxprune.graph.linear_ops import Trace, trace
from jaxprune.graph.program import Fixed
from jaxprune.sparse import products
from jaxprune.sparse.packed_matrix import is_packed_matrix
from jaxprune.sparse.products import Use
from jaxprune.typing import Params

Places = Mapping[Hashable, int]
"""The key of a use to the place of its matrix among those of its leaf."""


class PackedFunction:
    """A function of packed parameters and a batch, from `jp.pack`.

    It runs the traced program, with scans unrolled; for each shape of a batch the
    original is traced once more, abstractly.
    """

    def __init__(
        self,
        fn: Callable[[Params, Any], Any],
        params: Params,
        batch: Any,
        first: Trace,
        places: Mapping[str, Places],
    ) -> None:
        """Keeps the function, the shapes of its parameters and what is packed.

        Args:
          fn: the original function.
          params: its parameters, abstract.
          batch: the batch that it was traced with.
          first: trace with that batch.
          places: place of each use's matrix, by packed leaf.
        """
        self._fn = fn
        self._params = params
        self._structure: Any = jax.tree.structure(params)
        self._places = places
        # The program for each shape of a batch.
        self._known = {_batch_key(batch): _Program(first, fn, params, batch, places)}

    def __call__(self, params: Params, batch: Any) -> Any:
        """What the original gives for the unpacked parameters, to float32 rounding.

        Args:
          params: packed parameters, of the structure that `jp.pack` returned.
          batch: one batch, of any shape that the original takes.

        Raises:
          ValueError: the parameters are others, or a batch of this shape needs a
            packed weight in another way.
          TypeError: it is differentiated with respect to packed weights.
        """
        leaves = self._leaves(params)
        key = _batch_key(batch)
        if key not in self._known:
            abstract = jax.tree.map(products.abstract, batch)
            again = trace(self._fn, self._params, abstract)
            self._known[key] = _Program(
                again, self._fn, self._params, abstract, self._places
            )
        return self._known[key].run(leaves, jax.tree.leaves(batch))

    def _leaves(self, params: Params) -> list[Any]:
        """The leaves, packed ones whole: a matrix, or a tuple of several."""
        try:
            return self._structure.flatten_up_to(params)
        except ValueError:
            structure = jax.tree.structure(params, is_leaf=is_packed_matrix)
            if structure != self._structure:
                raise ValueError(
                    "a packed function needs parameters in the containers that pack "
                    f"returned, got {structure} for {self._structure}"
                ) from None
            raise


class _Program:
    """A traced program whose products read packed matrices."""

    def __init__(
        self, first: Trace, fn: Any, params: Any, batch: Any, places: Mapping[str, Any]
    ) -> None:
        flat = first.program
        uses = [use for use in products.find_uses(first) if use.leaf in places]
        names = {number: name for name, number in first.leaves.items()}
        # What the first batch did with a leaf, this one must do as well.
        if wrong := list(
            dict.fromkeys(
                use.leaf
                for use in [use for use in uses if use.key not in places[use.leaf]]
            )
        ):
            raise ValueError(
                "a packed function must multiply by the same matrices for every "
                "batch, but with a batch of this shape it needs others of "
                f"{listed(wrong)}; call jp.pack with such a batch"
            )
        self._positions, needed = products.live_steps(flat, uses)
        live = [names[i] for i, number in enumerate(flat.leaves) if number in needed]
        if wrong := [name for name in live if name in places]:
            raise ValueError(
                "a packed weight can only be multiplied with an activation, but with "
                f"a batch of this shape {listed(wrong)} are needed otherwise; call "
                "jp.pack with such a batch"
            )
        self._flat = flat
        self._uses: dict[int, Use] = {use.position: use for use in uses}
        self._leaf = {use.position: first.leaves[use.leaf] for use in uses}
        self._place = {use.position: places[use.leaf][use.key] for use in uses}
        self._structure = jax.tree.structure(jax.eval_shape(fn, params, batch))

    def run(self, leaves: Sequence[Any], batch: Sequence[Any]) -> Any:
        """The function's result for leaves, packed or not, and those of a batch."""
        flat = self._flat
        env: dict[int, Any] = dict(flat.closed_over)
        env.update(zip(flat.leaves, leaves, strict=True))
        env.update(zip(flat.batch, batch, strict=True))
        for position in self._positions:
            step, use = flat.steps[position], self._uses.get(position)
            # The place of a packed weight is left empty.
            operands = [
                x.value
                if isinstance(x, Fixed)
                else env[x]
                if use is None or i != use.side
                else None
                for i, x in enumerate(step.inputs)
            ]
            if use is None:
                env.update(zip(step.outputs, step.run(operands), strict=True))
                continue
            matrix = _matrix(leaves[self._leaf[position]], self._place[position])
            (number,) = step.outputs
            aval = flat.avals[number]
            env[number] = products.apply(use, step, operands, matrix, aval)
        results = [
            jnp.asarray(x.value) if isinstance(x, Fixed) else env[x]
            for x in flat.outputs
        ]
        return jax.tree.unflatten(self._structure, results)


def _matrix(leaf: Any, place: int) -> Any:
    return leaf[place] if isinstance(leaf, tuple) else leaf


def _batch_key(batch: Any) -> Hashable:
    leaves, structure = jax.tree.flatten(batch)
    # A Python number is weakly typed, and makes another program.
    avals = [(x.shape, str(x.dtype), x.weak_type) for x in map(jax.typeof, leaves)]
    return structure, tuple(avals)
