import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.product import product
from tests.support.plain_decoder import initial


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("result", [None, jnp.float32])
def test_product_has_the_gradient_of_the_plain_product(dtype, result):
    rng = np.random.default_rng(0)
    x, kernel, g = (
        jnp.asarray(rng.normal(size=shape), operand_dtype)
        for shape, operand_dtype in (
            ((2, 3, 4), dtype),
            ((4, 5), dtype),
            ((2, 3, 5), result or dtype),
        )
    )

    @jax.jit
    def pulled(x, kernel, g):
        y, pull = jax.vjp(
            lambda *a: product(*a, preferred_element_type=result), x, kernel
        )
        return y, *pull(g)

    gradients = pulled(x, kernel, g)
    x64, kernel64, g64 = (np.asarray(a, np.float64) for a in (x, kernel, g))
    expected = (
        x64 @ kernel64,
        g64 @ kernel64.T,
        np.einsum("bti,bto->io", x64, g64),
    )
    # A gradient is rounded to 8 bits in bfloat16, once on its way in and once out.
    tolerance = 1e-6 if dtype == "float32" else 0.02
    for gradient, target in zip(gradients, expected, strict=True):
        scale = np.abs(target).max()
        np.testing.assert_allclose(gradient, target, rtol=0, atol=tolerance * scale)
    assert [a.dtype for a in gradients[1:]] == [x.dtype, kernel.dtype]


@pytest.mark.parametrize(("sequences", "again"), [(2, 2), (3, 8)])
def test_a_gradient_makes_the_products_of_many_tokens_again(sequences, again):
    """Of 16 tokens, twice the width, the two products of the attention alone."""
    config = DecoderConfig(
        vocab_size=11, context=8, layers=2, width=8, heads=2, kv_heads=2, head_dim=4,
        mlp_width=8,
    )  # fmt: skip
    graphdef, params = nnx.split(initial(config, 0))

    def products(remat):
        def total(params, tokens):
            model = nnx.merge(graphdef, params)
            return model.states(model.embed(tokens), remat=remat)[0].sum()

        tokens = jnp.zeros((sequences, 8), jnp.int32)
        return str(jax.make_jaxpr(jax.grad(total))(params, tokens)).count("dot_general")

    assert products(remat=True) - products(remat=False) == again * config.layers
