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
    size = jnp.sqrt(mean_square.astype(jnp.float32)).reshape(-1, 1)  # (in, 1)
    return jnp.abs(weight.astype(jnp.float32)) * size


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
    magnitude = jnp.abs(weight.astype(jnp.float32))
    # Sums run over all outputs of an input, then over all inputs of an output.
    by_input = magnitude / _positive(jnp.sum(magnitude, 1, keepdims=True))
    by_output = magnitude / _positive(jnp.sum(magnitude, 0, keepdims=True))
    size = jnp.sqrt(mean_square.astype(jnp.float32)).reshape(-1, 1)  # (in, 1)
    return (by_input + by_output) * size**power


def _positive(total: jax.Array) -> jax.Array:
    """The total, or 1 where all its terms are zero."""
    return jnp.where(total == 0, 1, total)
