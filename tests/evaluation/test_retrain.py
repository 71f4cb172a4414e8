import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune.arrays import tree
from jaxprune.evaluation import perplexity, retrain
from jaxprune.models.decoder.config import DecoderConfig
from jaxprune.models.decoder.model import Decoder, loss_per_token

CONFIG = DecoderConfig(
    vocab_size=17, context=8, layers=1, width=8, heads=2, kv_heads=2, head_dim=4,
    mlp_width=8,
)  # fmt: skip
SEQUENCES = np.random.default_rng(0).integers(0, 17, (4, 8)).astype(np.int32)


def leaves(model):
    return dict(tree.named_leaves(nnx.split(model)[1]))


def losses_of(model, tokens):
    graphdef, params = nnx.split(model)

    def losses(params, tokens):
        model = nnx.merge(graphdef, params)
        return loss_per_token(model, tokens[:, :-1], tokens[:, 1:])

    return np.asarray(jax.jit(losses)(params, tokens))


@pytest.fixture(scope="module")
def half():
    """A model whose MLP lacks half of its weights, and the names of those leaves."""
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    names = {name for name in tree.names(params) if "mlp" in name}
    masked = [
        jnp.where(jnp.arange(leaf.size).reshape(leaf.shape) % 2, leaf, 0)
        if name in names
        else leaf
        for name, leaf in tree.named_leaves(params).items()
    ]
    params = jax.tree.unflatten(jax.tree.structure(params), masked)
    return nnx.merge(graphdef, params), names


def test_the_loss_falls_the_zeros_stay_and_all_else_is_as_it_was(half):
    model, names = half
    before = {name: np.asarray(leaf) for name, leaf in leaves(model).items()}
    found, losses = retrain.retrain(
        model, names, SEQUENCES, batch=4, steps=8, learning_rate=0.1
    )
    assert losses[-1] < losses[0]
    assert losses[0] == pytest.approx(losses_of(model, SEQUENCES).mean(), rel=1e-5)
    for name, leaf in leaves(found).items():
        if name in names:
            np.testing.assert_array_equal(leaf == 0, before[name] == 0)
            assert (leaf != before[name])[before[name] != 0].all()
        else:
            np.testing.assert_array_equal(leaf, before[name])
    for name, leaf in leaves(model).items():
        np.testing.assert_array_equal(leaf, before[name])


def test_a_loss_that_is_not_finite_is_refused_by_its_step(half):
    with pytest.raises(ValueError, match=r"got (nan|inf) at step [23]; lower the"):
        retrain.retrain(*half, SEQUENCES, batch=4, steps=8, learning_rate=float("inf"))


@pytest.mark.parametrize("batch", [2, 3])
def test_perplexity_is_exp_of_the_mean_loss_of_each_token(half, batch):
    model, _ = half
    tokens = SEQUENCES.reshape(-1)
    done = []
    found = perplexity.measure(
        model, perplexity.slide(tokens, context=9), batch=batch, tick=done.append
    )
    whole = np.stack([tokens[start : start + 9] for start in (0, 8, 16)])
    expected = [
        losses_of(model, whole).reshape(-1),
        losses_of(model, tokens[None, 24:])[0],
    ]
    nats = np.concatenate(expected).mean()
    assert found["nats"] == pytest.approx(nats, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nats), rel=1e-5)
    assert (found["tokens"], found["windows"], sum(done)) == (31, 4, 4)
