"""Scores of a kernel from its weights and the mean squares of its inputs.

Both are of matrices (in, out) and higher is kept. Stacked matrices go through
`jax.vmap`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def wanda(
    weight: Float[Array, "in out"], mean_square: Float[Array, "in"]
) -> Float[Array, "in out"]:
    """|W_ij| ||X_i||: the weight times the size of its input.

    ||X_i|| is taken as the root of the mean square, which differs from the norm by one
    factor for all inputs. Its authors compare within each output: pattern `PerOutput`.

    Args:
      weight: floating array (in, out).
      mean_square: mean of the squared inputs over all positions, (in,).

    Returns:
      Scores (in, out), float32.

    Raises:
      ValueError: the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.scores.from_activations import wanda
      >>> weight, square = jnp.array([[1.0, -2.0], [3.0, 1.0]]), jnp.array([4.0, 1.0])
      >>> wanda(weight, square).tolist()
      [[2.0, 4.0], [3.0, 1.0]]

    Reference:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
      2023, arXiv 2306.11695, equation 1.
    """
    _check_shapes(weight, mean_square)
    size = jnp.sqrt(mean_square.astype(jnp.float32))  # (in,)
    return jnp.abs(weight.astype(jnp.float32)) * size[:, None]


def ria(
    weight: Float[Array, "in out"], mean_square: Float[Array, "in"], power: float = 0.5
) -> Float[Array, "in out"]:
    """(|W_ij| / sum_k |W_ik| + |W_ij| / sum_k |W_kj|) ||X_i||^a.

    A weight's share of its input's weights and of its output's: no input and no output
    is removed as a whole because its weights are small. As for Wanda, ||X_i|| is the
    root of the mean square.

    Args:
      weight: floating array (in, out).
      mean_square: mean of the squared inputs over all positions, (in,).
      power: exponent a of the inputs; 0 leaves them out.

    Returns:
      Scores (in, out), float32; zero for a weight that is zero.

    Raises:
      ValueError: the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.scores.from_activations import ria
      >>> weight, square = jnp.array([[1.0, 3.0], [1.0, 1.0]]), jnp.array([16.0, 1.0])
      >>> ria(weight, square).tolist()
      [[1.5, 3.0], [1.0, 0.75]]

    Reference:
      Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
      Language Models", ICLR 2024, equations 2 and 3.
    """
    _check_shapes(weight, mean_square)
    size = jnp.abs(weight.astype(jnp.float32))
    # Sums run over all outputs of an input, then over all inputs of an output.
    by_input = size / _positive(jnp.sum(size, 1, keepdims=True))  # (in, out)
    by_output = size / _positive(jnp.sum(size, 0, keepdims=True))  # (in, out)
    reach = jnp.sqrt(mean_square.astype(jnp.float32)) ** power  # (in,)
    return (by_input + by_output) * reach[:, None]


def _positive(total: jax.Array) -> jax.Array:
    """The total, or 1 where all its terms are zero."""
    return jnp.where(total == 0, 1, total)


def _check_shapes(weight: jax.Array, mean_square: jax.Array) -> None:
    if weight.ndim != 2 or mean_square.shape != weight.shape[:1]:
        raise ValueError(
            "scores by activations need a weight (in, out) and a mean square (in,), "
            f"got shapes {weight.shape} and {mean_square.shape}; take stacked ones by "
            "jax.vmap"
        )
