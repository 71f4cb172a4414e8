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
from jaxprune.leaves import check_rule
from jaxprune.training.masked import wrapped_optimizer
from jaxprune.typing import Params, Prunable


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
    targets: Prunable = leaves.prunable,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains each matrix by a change of low rank; everything else is frozen.

    Args:
      optimizer: any optax optimizer, with its clipping, except line searches. It trains
        the factors, so its weight decay pulls them, not the weights, towards zero. No
        transformation chained after `lora` may change the updates, or the weights would
        no longer match the factors; only one with masks may wrap `lora`.
      rank: of the change; a matrix with a shorter side has that for its rank.
      alpha: the change is scaled by s = alpha / rank; the rank if left out.
      targets: leaf name and leaf to whether it is adapted; the rule of what may be
        pruned if left out. Axes in front of the last two are stacked matrices: leave
        out kernels whose axes mean something else (convolutions, separate heads).
      seed: of the first A.

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
    if rank < 1 or not 0 < scale < math.inf:
        raise ValueError(
            f"lora needs rank >= 1 and a finite alpha > 0, got rank={rank}, "
            f"alpha={alpha}"
        )
    optimizer = wrapped_optimizer(optimizer, "lora", "rank")

    def init(params: Params) -> LoraState:
        if tree.is_placeholder(params):
            return LoraState(params, optimizer.init(params))
        adapters = _apart(_adapters(params, rank, targets, seed))
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
        old, factors = _joined(state.adapters), state.adapters
        of_each = functools.partial(jax.tree.map, is_leaf=_is_adapter)
        gradients = _apart(of_each(functools.partial(_gradient, scale), old, updates))
        steps, inner = optimizer.update(gradients, state.inner, factors, **extra_args)
        change = functools.partial(_change, scale)
        changes = of_each(change, old, _joined(steps), updates)
        return changes, LoraState(optax.apply_updates(factors, steps), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _adapters(params: Params, rank: int, targets: Prunable, seed: int) -> Params:
    """An `Adapter` for each target, `optax.MaskedNode()` for every other leaf."""
    named = tree.named_leaves(params)
    check_rule(targets, list(named))
    chosen = {
        name: leaf
        for name, leaf in named.items()
        if not tree.is_excluded(leaf) and targets(name, leaf)
    }
    flat = [name for name, leaf in chosen.items() if leaf.ndim < 2]
    if flat or not chosen:
        raise ValueError(
            f"lora needs matrices to adapt, got {listed(flat) or 'none'}; give targets "
            "that choose leaves of two axes or more"
        )
    keys = jax.random.split(jax.random.key(seed), len(named))
    adapters = [
        _adapter(leaf, rank, key) if name in chosen else optax.MaskedNode()
        for key, (name, leaf) in zip(keys, named.items(), strict=True)
    ]
    structure = jax.tree.structure(params, is_leaf=tree.is_excluded)
    return jax.tree.unflatten(structure, adapters)


def _is_adapter(node: Any) -> bool:
    return isinstance(node, Adapter) or tree.is_excluded(node)


def _apart(adapters: Any) -> Adapter:
    """Two trees of factors, which `nnx.Optimizer` keeps; of an adapter it does not."""

    def factor(at: int) -> Any:
        take = lambda own: own if tree.is_excluded(own) else own[at]  # noqa: E731
        return jax.tree.map(take, adapters, is_leaf=_is_adapter)

    return Adapter(factor(0), factor(1))


def _joined(factors: Any) -> Any:
    """The tree of adapters that was taken apart."""

    def join(a: Any, b: Any) -> Any:
        return a if tree.is_excluded(a) else Adapter(a, b)

    return jax.tree.map(join, *factors, is_leaf=tree.is_excluded)


def _adapter(leaf: Any, rank: int, key: jax.Array) -> Adapter:
    *stack, inputs, outputs = leaf.shape
    rank = min(rank, inputs, outputs)
    a = jax.random.normal(key, (*stack, inputs, rank), jnp.float32)
    a = a / math.sqrt(max(inputs, 1))
    b = jnp.zeros((*stack, rank, outputs), jnp.float32)
    return Adapter(_placed(a, leaf, -1), _placed(b, leaf, -2))


def _placed(factor: jax.Array, leaf: Any, new: int) -> jax.Array:
    """A factor split as its matrix is, the axis `new` of the rank whole.

    `state_shardings` knows nothing of ranks and may split that axis too.
    """
    if isinstance(leaf, jax.core.Tracer):
        where = _explicit(leaf, new)
        return factor if where is None else jax.sharding.reshard(factor, where)
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return factor
    return jax.device_put(factor, _without(sharding, leaf.ndim, new))


def _explicit(leaf: jax.Array, new: int | None = None) -> NamedSharding | None:
    """How a result must say it is split, which only Explicit meshes ask for."""
    sharding = jax.typeof(leaf).sharding
    if not sharding.mesh.explicit_axes:
        return None
    return _without(sharding, leaf.ndim, new)


def _without(sharding: Any, ndim: int, new: int | None) -> NamedSharding:
    spec = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    if new is not None:
        spec[new] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _gradient(scale: float, adapter: Any, g: Any) -> Any:
    """What the gradient of a matrix means for its factors."""
    if tree.is_excluded(adapter):
        return adapter
    a, b = (jnp.swapaxes(factor, -1, -2).astype(g.dtype) for factor in adapter)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return Adapter(
        scale * product(g, b, out_sharding=_explicit(g, -1)),  # (..., in, rank)
        scale * product(a, g, out_sharding=_explicit(g, -2)),  # (..., rank, out)
    )


def _change(scale: float, adapter: Any, step: Any, g: Any) -> Any:
    """What the step of the factors means for a matrix.

    (A + dA)(B + dB) - A B, as one product that no digits cancel in.
    """
    if tree.is_excluded(adapter):
        return g if g is None or tree.is_excluded(g) else jnp.zeros_like(g)
    left = jnp.concatenate([step.a, adapter.a], axis=-1)  # (..., in, 2 rank)
    right = jnp.concatenate([adapter.b + step.b, step.b], axis=-2)  # (..., 2 rank, out)
    # Factors are float32: with fewer digits the weights would leave their sum.
    product = functools.partial(jnp.matmul, precision="highest")
    return (scale * product(left, right, out_sharding=_explicit(g))).astype(g.dtype)
