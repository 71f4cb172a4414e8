"""x @ kernel with a gradient that XLA's CPU backend computes fast.

JAX's own rule makes the kernel's gradient as (g^T x)^T, and XLA fuses what made g
(gelu's derivative, say) into the transposing copy of g: a third of the training step of
a small GPT, or more. Here it is x^T g, and the barrier keeps what made x from being
fused into its copy.
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
    **__: Any,
) -> Float[Array, "... outputs"]:
    """x @ kernel, for the argument `dot_general` of `flax.nnx.Linear`.

    Args:
      x: activations, floating (..., inputs), of the kernel's dtype.
      kernel: weight, floating (inputs, outputs).
      *_: axes that `nnx.Linear` hands a `dot_general`, always the same.
      preferred_element_type: dtype of the result, by default that of `x`.
      **__: precision and sharding, left to JAX's defaults.

    Returns:
      The product (..., outputs). Both gradients have the dtype and the sharding of
      what they belong to.
    """
    return _product(x, kernel, preferred_element_type)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, kernel: Array, dtype: DTypeLike | None) -> Array:
    # Contract the inputs; no batch axes.
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, axes, preferred_element_type=dtype)


def _forward(
    x: Array, kernel: Array, dtype: DTypeLike | None
) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, dtype), (x, kernel)


def _backward(
    dtype: DTypeLike | None, saved: tuple[Array, Array], g: Array
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
