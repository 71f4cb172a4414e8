"""x @ kernel with a gradient that XLA's CPU backend computes fast.

JAX's own rule makes the kernel's gradient as (g^T x)^T. XLA fuses what made g (gelu's
derivative, say) into the transposing copy of g: a third of the training step of a small
GPT, or more. In bfloat16 its fast kernels do not take such a product at all. Here it is
x^T g, and the barrier keeps what made x from being fused into its copy.
The price: forward-mode differentiation (`jax.jvp`) is not defined through it.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, DTypeLike, Float

from jaxprune.lm.models import placement


def product(
    x: Float[Array, "... inputs"],
    kernel: Float[Array, "inputs outputs"],
    *_: Any,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: jax.P | None = None,
    **__: Any,
) -> Float[Array, "... outputs"]:
    """x @ kernel, for the argument `dot_general` of `flax.nnx.Linear`.

    Args:
      x: activations, floating (..., inputs), of the kernel's dtype.
      kernel: weight, floating (inputs, outputs).
      *_: axes that `nnx.Linear` hands a `dot_general`, always the same.
      preferred_element_type: dtype of the result, by default that of `x`.
      out_sharding: how the result is split on a mesh with Explicit axes.
      **__: precision, left to JAX's default.

    Returns:
      The product (..., outputs). Both gradients have the dtype and the sharding of
      what they belong to.
    """
    return _product(x, kernel, preferred_element_type, out_sharding)


def is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a step of a program is a `product`, a policy for `jax.checkpoint`."""
    return primitive.name == "custom_vjp_call"  # a layer has no other


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(
    x: Array, kernel: Array, dtype: DTypeLike | None, out_sharding: jax.P | None
) -> Array:
    # Contract the inputs; no batch axes.
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(
        x, kernel, axes, preferred_element_type=dtype, out_sharding=out_sharding
    )


def _forward(
    x: Array, kernel: Array, dtype: DTypeLike | None, out_sharding: jax.P | None
) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, dtype, out_sharding), (x, kernel)


def _backward(
    dtype: DTypeLike | None,
    out_sharding: jax.P | None,
    saved: tuple[Array, Array],
    g: Array,
) -> tuple[Array, Array]:
    x, kernel = saved
    # g has the dtype of the result, which may be wider than that of the operands.
    x, g = jax.lax.optimization_barrier((x, g.astype(kernel.dtype)))
    last, rows = x.ndim - 1, tuple(range(x.ndim - 1))
    return (
        _contract(g, kernel, ((last,), (1,)), like=x),  # (..., inputs)
        _contract(x, g, (rows, rows), like=kernel),  # (inputs, outputs)
    )


def _contract(
    a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]], *, like: Array
) -> Array:
    return jax.lax.dot_general(
        a, b, (axes, ((), ())), out_sharding=placement.sharding_of(like)
    )


_product.defvjp(_forward, _backward)
