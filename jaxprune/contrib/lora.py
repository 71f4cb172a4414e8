"""LoRA as an optimizer: matrices move by a product of low rank, and stay merged.

A matrix W of shape (in, out) becomes W + s A B with A (in, rank) and B (rank, out), and
only A and B are trained. The usual adapter adds s (x A) B to the layer's output and is
merged at the end. Here the weights hold the sum at every step: the gradient G of W
gives those of the factors, s G B^T and s A^T G, and the step of the factors gives that
of W. So no model is rewritten, and what ranks, prunes, masks or saves weights sees the
weights that the model really has. The full gradient of each matrix exists until it is
converted to the gradients of the factors, and E[g^2] needs it; moments exist for the
factors alone. A criterion that reads E[g^2] therefore needs
`chain(track_gradients(), lora(...), track_importance())`.

Reference:
    Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv
    2106.09685, section 4.1. Zimmer et al.: PERP: Rethinking the Prune-Retrain Paradigm,
    2023, arXiv 2312.15230, section 3 (MaskLoRA: W + M * (s A B), which `keep_masks`
    around this makes).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.arrays.messages import listed, refuse_fractions
from jaxprune.leaves import checked_rule
from jaxprune.training.masked import wrapped_optimizer
from jaxprune.typing import Params, PrunableLike


class Adapter(NamedTuple):
    """The factors of one matrix, float32, or trees of them.

    Attributes:
      a: (..., in, rank); normal with variance 1 / in at first.
      b: (..., rank, out); zero at first.
    """

    a: jax.Array
    b: jax.Array


class LoraState(NamedTuple):
    """State of `lora`.

    Attributes:
      adapters: two trees like the parameters, one of each factor, with
        `optax.MaskedNode()` in the place of a frozen leaf.
      inner: the wrapped optimizer's state; its parameters are the adapters.
    """

    adapters: Any
    inner: optax.OptState

    @property
    def importance_fields(self) -> tuple[str, ...]:
        """None: the moments inside are of factors, not of weights."""
        return ()


def lora(
    optimizer: optax.GradientTransformation,
    rank: int,
    *,
    alpha: float | None = None,
    targets: PrunableLike = leaves.prunable,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains each matrix by a change of low rank; everything else is frozen.

    Args:
      optimizer: optax optimizer, with its clipping, except line searches. It trains
        the factors, so its weight decay pulls them, not the weights, towards zero. No
        transformation chained after `lora` may change the updates, or the weights would
        no longer match the factors; only one with masks may wrap `lora`.
      rank: rank of the change; a matrix with a shorter side has that for its rank.
      alpha: scale of the change times the rank, s = alpha / rank; the rank if left out.
      targets: which leaves are adapted, a function of leaf name and leaf; the rule of
        what may be pruned if left out. Axes in front of the last two are stacked
        matrices: leave out kernels whose axes mean something else (convolutions,
        separate heads).
      seed: rng seed of the first A.

    Returns:
      A transformation of the weights' own gradients and updates. Give weights and
      gradients in float32: the weights hold the sum, and bfloat16 would round it.
      Pruned weights stay at zero under `keep_masks(lora(...), masks)`.

    Raises:
      ValueError: a rank under 1, or alpha that is not finite and over 0; at `init`: no
        leaf is adapted, or one has no two axes; at `update`: a line search's arguments.
      TypeError: `rank` or `seed` is no integer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
      >>> tx = jp.contrib.lora(optax.adamw(1e-3), rank=2)
      >>> state = tx.init(params)
      >>> state.adapters.a["kernel"].shape, state.adapters.b["kernel"].shape
      ((8, 2), (2, 4))
    """
    refuse_fractions("lora", rank=rank, seed=seed)
    scale = (rank if alpha is None else alpha) / max(rank, 1)
    if not (rank >= 1 and 0 < scale < math.inf):
        raise ValueError(
            f"lora needs rank >= 1 and a finite alpha > 0, got rank={rank}, "
            f"alpha={alpha}"
        )
    optimizer = wrapped_optimizer(optimizer, "lora", "rank")

    def init(params: Params) -> LoraState:
        if tree.is_placeholder(params):
            return LoraState(params, optimizer.init(params))
        adapters = _split(_adapters(params, rank, targets, seed))
        return LoraState(adapters, optimizer.init(adapters))

    def update(
        updates: optax.Updates,
        state: LoraState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LoraState]:
        del params
        if extra_args.keys() & {"grad", "value_fn"}:
            raise ValueError(
                "lora trains factors, of which a line search's grad and value_fn know "
                "nothing; take an optimizer that needs the gradient alone"
            )
        factors, adapters = state.adapters, _join(state.adapters)
        map_adapters = functools.partial(jax.tree.map, is_leaf=_is_adapter)
        gradient = functools.partial(_factor_gradients, scale)
        gradients = _split(map_adapters(gradient, adapters, updates))
        steps, inner = optimizer.update(gradients, state.inner, factors, **extra_args)
        change = functools.partial(_weight_change, scale)
        changes = map_adapters(change, adapters, _join(steps), updates)
        return changes, LoraState(optax.apply_updates(factors, steps), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _adapters(params: Params, rank: int, targets: PrunableLike, seed: int) -> Params:
    """An `Adapter` for each target, `optax.MaskedNode()` for every other leaf."""
    named = tree.named_leaves(params)
    rule = checked_rule(targets, list(named))
    adapted = {
        name: leaf
        for name, leaf in named.items()
        if not tree.is_excluded(leaf) and rule(name, leaf)
    }
    vectors = [name for name, leaf in adapted.items() if leaf.ndim < 2]
    others = listed(n for n, leaf in adapted.items() if not tree.is_floating(leaf))
    if not (len(adapted) > 0 and not vectors):
        raise ValueError(
            f"lora needs matrices to adapt, got {listed(vectors) or 'none'}; give "
            "targets that choose leaves of two axes or more"
        )
    if others:
        raise ValueError(
            f"lora adapts floating matrices, but {others} are not; leave them out of "
            "targets="
        )
    # A key for each leaf, so that another choice of targets draws the same factors.
    keys = jax.random.split(jax.random.key(seed), len(named))
    adapters = [
        _adapter(leaf, rank, key) if name in adapted else optax.MaskedNode()
        for key, (name, leaf) in zip(keys, named.items(), strict=True)
    ]
    structure = jax.tree.structure(params, is_leaf=tree.is_excluded)
    return jax.tree.unflatten(structure, adapters)


def _is_adapter(node: Any) -> bool:
    return isinstance(node, Adapter) or tree.is_excluded(node)


def _split(adapters: Any) -> Adapter:
    """Two trees of factors, which `nnx.Optimizer` keeps; of an adapter it does not."""

    def factors(number: int) -> Any:
        return jax.tree.map(
            lambda node: node if tree.is_excluded(node) else node[number],
            adapters,
            is_leaf=_is_adapter,
        )

    return Adapter(factors(0), factors(1))


def _join(factors: Any) -> Any:
    """The tree of adapters, of the two trees that `_split` gives."""

    def join(a: Any, b: Any) -> Any:
        return a if tree.is_excluded(a) else Adapter(a, b)

    return jax.tree.map(join, *factors, is_leaf=tree.is_excluded)


def _adapter(leaf: Any, rank: int, key: jax.Array) -> Adapter:
    *stack, inputs, outputs = leaf.shape
    rank = min(rank, inputs, outputs)
    a = jax.random.normal(key, (*stack, inputs, rank), jnp.float32)  # (..., in, rank)
    a = a / math.sqrt(max(inputs, 1))
    b = jnp.zeros((*stack, rank, outputs), jnp.float32)  # (..., rank, out)
    return Adapter(_place_factor(a, leaf, -1), _place_factor(b, leaf, -2))


def _place_factor(factor: jax.Array, leaf: Any, rank_axis: int) -> jax.Array:
    """A factor split as its matrix is, the axis of the rank whole."""
    if isinstance(leaf, jax.core.Tracer):
        explicit = _explicit_sharding(leaf, rank_axis)
        return factor if explicit is None else jax.sharding.reshard(factor, explicit)
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return factor
    return jax.device_put(factor, _unsplit(sharding, leaf.ndim, rank_axis))


def _explicit_sharding(
    leaf: jax.Array, rank_axis: int | None = None
) -> NamedSharding | None:
    """How a result must say it is split, which only Explicit meshes ask for."""
    sharding = jax.typeof(leaf).sharding
    if not sharding.mesh.explicit_axes:
        return None
    return _unsplit(sharding, leaf.ndim, rank_axis)


def _unsplit(sharding: Any, ndim: int, axis: int | None) -> NamedSharding:
    """The sharding with one axis whole."""
    # A spec may leave out the last axes; the axis is counted from the end.
    spec = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    if axis is not None:
        spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _factor_gradients(scale: float, adapter: Any, g: Any) -> Any:
    """The gradients of the factors, s G B^T and s A^T G, from that of the matrix."""
    if tree.is_excluded(adapter):
        return adapter
    a, b = (jnp.swapaxes(factor, -1, -2).astype(g.dtype) for factor in adapter)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return Adapter(
        scale
        * product(g, b, out_sharding=_explicit_sharding(g, -1)),  # (..., in, rank)
        scale
        * product(a, g, out_sharding=_explicit_sharding(g, -2)),  # (..., rank, out)
    )


def _weight_change(scale: float, adapter: Any, step: Any, g: Any) -> Any:
    """The change of a matrix, s ((A + dA)(B + dB) - A B), by its factors' step."""
    if tree.is_excluded(adapter):
        return g if g is None or tree.is_excluded(g) else jnp.zeros_like(g)
    # One product of [dA, A] and [B + dB; dB], in which no digits cancel.
    tall = jnp.concatenate([step.a, adapter.a], axis=-1)  # (..., in, 2 rank)
    wide = jnp.concatenate([adapter.b + step.b, step.b], axis=-2)  # (..., 2 rank, out)
    # Factors are float32: with fewer digits the weights would leave their sum.
    product = functools.partial(jnp.matmul, precision="highest")
    change = product(tall, wide, out_sharding=_explicit_sharding(g))
    return (scale * change).astype(g.dtype)
