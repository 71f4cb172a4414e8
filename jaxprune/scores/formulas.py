"""The formulas of the criteria: a leaf and its statistic to scores, float32.

Both have the leaf's shape. Averages may be in two bytes or one; they are decoded here.
"""

import jax
import jax.numpy as jnp

from jaxprune.arrays import exact_sum, low_bit, placement


def size_of_weight(w: jax.Array) -> jax.Array:
    """|w|, of a complex weight its modulus."""
    if jnp.iscomplexobj(w):  # float32 would drop the imaginary part
        return jnp.abs(w).astype(jnp.float32)
    return jnp.abs(low_bit.decode(w))


def statistic_alone(_: jax.Array, statistic: jax.Array) -> jax.Array:
    """The statistic itself."""
    return low_bit.decode(statistic)


def size_of_average(_: jax.Array, average: jax.Array) -> jax.Array:
    """|A|."""
    return size_of_weight(average)


def brain_damage(w: jax.Array, square: jax.Array) -> jax.Array:
    """w^2 E[g^2]."""
    return jnp.square(size_of_weight(w)) * low_bit.decode(square)


def size_and_power(w: jax.Array, square: jax.Array, exponent: jax.Array) -> jax.Array:
    """|w| E[g^2]^a."""
    return size_of_weight(w) * jnp.power(low_bit.decode(square), exponent)


def size_and_quarter_power(w: jax.Array, square: jax.Array) -> jax.Array:
    """|w| E[g^2]^(1/4)."""
    # Two roots take a quarter of the time of a power, and round less.
    return size_of_weight(w) * jnp.sqrt(jnp.sqrt(low_bit.decode(square)))


def uniform(w: jax.Array, key: jax.Array) -> jax.Array:
    """Uniform numbers in [0, 1), placed like the weight."""
    return placement.placed(jax.random.uniform(key, w.shape, jnp.float32), w)


def weight_in_deviations(w: jax.Array, average: jax.Array) -> jax.Array:
    """|w| / std(A); where std(A) is 0, 0 for a zero weight and infinity for others."""
    size, deviation = (
        size_of_weight(w),
        _deviation(low_bit.decode(average)),
    )  # deviation: ()
    # A leaf whose averages are all equal has no unit: only zeros are under any rate.
    constant = jnp.where(size > 0, jnp.inf, 0.0)
    return jnp.where(deviation > 0, size / deviation, constant)


def _deviation(values: jax.Array) -> jax.Array:
    """The population's, by sums that are the same on any sharding."""
    # Exact sums, or another sharding would give another threshold in the last bit.
    mean = exact_sum.total(values) / values.size
    return jnp.sqrt(exact_sum.total(jnp.square(values - mean)) / values.size)


def average_in_deviations(_: jax.Array, average: jax.Array) -> jax.Array:
    """|A| / std(A)."""
    return weight_in_deviations(average, average)
