"""Stochastic rounding to few bits: exact codes, thresholds, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.arrays import low_bit

LEAN = ["bfloat16", "int8"]
RANDOM = np.random.default_rng(0)


def levels(signed):
    """What a code stands for in units, from the formula, in float64."""
    count = 128 if signed else 255
    binade, mantissa = np.divmod(np.arange(count), 16)
    above = 2.0**binade * (1 + mantissa / 16) - 1
    return np.concatenate([-above[:0:-1], above]) if signed else above


encode_int8 = jax.jit(low_bit.encode_int8, static_argnames="signed")
encode_bfloat16 = jax.jit(low_bit.encode_bfloat16)
decode = jax.jit(low_bit.decode)
unit_exponent = jax.jit(low_bit.unit_exponent, static_argnames="signed")
dither = jax.jit(low_bit.dither, static_argnums=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("exponent", [-120, -20, 0, 100])
def test_every_code_is_rounded_to_itself_whatever_the_threshold(signed, exponent):
    grid = levels(signed) * 2.0**exponent
    values = grid.astype(np.float32)
    for threshold in np.array([0, 1, 2**31, 2**32 - 1], np.uint32):
        held = encode_int8(values, np.int32(exponent), threshold, signed=signed)
        assert len(np.unique(held.codes)) == len(grid)
        np.testing.assert_array_equal(np.asarray(decode(held), np.float64), grid)


@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_magnitude_is_read_off_the_codes(signed):
    for codes in ([3, -5, 0], [100, -100, 7], [-127, 0, 0], [127, -127, 0]):
        codes = jnp.asarray(np.array(codes, np.int8))
        held = low_bit.Int8(codes, jnp.asarray(np.int32(-3)), signed)
        expected = np.nanmax(np.abs(np.asarray(held)))
        np.testing.assert_array_equal(low_bit.largest(held), expected)


def rounded(values, name, n, *, signed=True):
    noise = dither(values.shape, low_bit.phase(5), n)
    if name == "bfloat16":
        return low_bit.decode(low_bit.encode_bfloat16(values, noise))
    exponent = low_bit.unit_exponent(values, signed=signed)
    return low_bit.decode(low_bit.encode_int8(values, exponent, noise, signed=signed))


def step_at(values, name, *, signed=True):
    """The distance between the two neighbours of a value among what can be held."""
    size = np.abs(np.asarray(values, np.float64))
    if name == "bfloat16":
        return 2.0 ** (np.floor(np.log2(size)) - 7)
    unit = 2.0 ** float(unit_exponent(values, signed=signed))
    return unit * 2.0 ** np.floor(np.log2(1 + size / unit)) / 16


@pytest.mark.parametrize("name", LEAN)
def test_rounding_errs_by_less_than_a_step_and_not_at_all_on_average(name):
    values = jnp.asarray(RANDOM.normal(size=1000), jnp.float32)
    every = jax.jit(jax.vmap(lambda n: rounded(values, name, n)))(np.arange(1024))
    errors = np.asarray(every, np.float64) - np.asarray(values, np.float64)
    step = step_at(values, name)
    assert (np.abs(errors) < step).all()
    # The sequence covers [0, 1) to about 2 / n, a fresh random number to 1 / sqrt(n).
    assert (np.abs(errors.mean(0)) < 0.004 * step).all()


@pytest.mark.parametrize("name", LEAN)
def test_what_is_not_finite_stays_not_finite(name):
    values = np.array([np.nan, np.inf, -np.inf, 0.9, -0.0], np.float32)
    for n in range(8):
        noise = dither(values.shape, low_bit.phase(5), n)
        if name == "bfloat16":
            held = encode_bfloat16(values, noise)
        else:
            held = encode_int8(values, np.int32(-7), noise, signed=True)
        out = np.asarray(decode(held))
        assert not np.isfinite(out[:3]).any()
        assert 0.8 < out[3] < 1
        assert out[4] == 0


def test_thresholds_follow_the_formula():
    shape, golden, plastic = (3, 4, 5), 0x9E3779B9, 0xC13FA9A9
    start = low_bit.phase(7)
    position = np.arange(60, dtype=np.uint64).reshape(shape)
    for n in (0, 1, 10**6):
        expected = (int(start) + n * golden + position * np.uint64(plastic)) % 2**32
        np.testing.assert_array_equal(low_bit.dither(shape, start, n), expected)
    assert len({int(low_bit.phase(stream)) for stream in range(1000)}) == 1000


@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_value_lies_between_a_quarter_and_half_of_the_range(signed):
    for size in (1e-30, 0.3, 1.0, 7.0, 1e30):
        values = np.array([size, -size / 2, 0.0], np.float32)
        unit = 2.0 ** float(unit_exponent(values, signed=signed))
        top = 2.0**8 if signed else 2.0**16
        assert 1 / 4 <= size / unit / top <= 1 / 2
    assert int(unit_exponent(np.zeros(3, np.float32), signed=signed)) == -120
