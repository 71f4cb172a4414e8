"""Our models against the reference implementations, on tiny random configurations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import gpt
from experiments.gpt.config import GPTConfig
from jaxprune.arrays import tree
from jaxprune.lm.models.generate import generate

pytestmark = pytest.mark.parity

CONFIG = GPTConfig(
    vocab_size=17, context=12, layers=2, heads=4, width=16, bias=True, gelu="tanh"
)
NAMES = {
    "token_embedding/embedding": "wte.weight",
    "position_embedding/embedding": "wpe.weight",
    "norm/scale": "ln_f.weight",
    "norm/bias": "ln_f.bias",
}
for _i in range(CONFIG.layers):
    for _ours, _theirs in {
        "norm_attention": "ln_1",
        "attention/qkv": "attn.c_attn",
        "attention/out": "attn.c_proj",
        "norm_mlp": "ln_2",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
    }.items():
        _weight = "scale" if _ours.startswith("norm") else "kernel"
        NAMES[f"blocks/{_i}/{_ours}/{_weight}"] = f"h.{_i}.{_theirs}.weight"
        NAMES[f"blocks/{_i}/{_ours}/bias"] = f"h.{_i}.{_theirs}.bias"


def _flat(params):
    """Leaf name -> array."""
    return dict(zip(tree.names(params), jax.tree.leaves(params), strict=True))


@pytest.fixture(scope="module")
def pair():
    """A torch GPT-2 with every weight random, and ours with the same weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=CONFIG.vocab_size,
            n_positions=CONFIG.context,
            n_layer=CONFIG.layers,
            n_head=CONFIG.heads,
            n_embd=CONFIG.width,
            activation_function="gelu_new",
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and scales too
            parameter += 0.1 * torch.randn_like(parameter)
    tensors = dict(theirs.transformer.named_parameters())
    assert set(tensors) == set(NAMES.values())
    shapes = nnx.eval_shape(lambda: gpt.GPT(CONFIG, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(shapes, nnx.Param)
    arrays = [
        jnp.asarray(tensors[NAMES[name]].detach().numpy()) for name in _flat(params)
    ]
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert [array.shape for array in arrays] == shapes
    ours = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(params), arrays))
    return theirs, ours


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    return rng.integers(0, CONFIG.vocab_size, (3, CONFIG.context)).astype(np.int32)


def test_logits_are_those_of_transformers_gpt2(pair, tokens):
    torch = pytest.importorskip("torch")
    theirs, ours = pair
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(expected).max() > 0.1
    found = nnx.jit(lambda model: model(tokens))(ours)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_loss_and_gradients_are_those_of_transformers_gpt2(pair, tokens):
    torch = pytest.importorskip("torch")
    theirs, ours = pair
    labels = torch.from_numpy(tokens).long()
    theirs.zero_grad()
    expected = theirs(labels, labels=labels).loss  # shifts the labels itself
    expected.backward()
    graphdef, params = nnx.split(ours, nnx.Param)

    def loss(params):
        model = nnx.merge(graphdef, params)
        return gpt.loss(model, tokens[:, :-1], tokens[:, 1:])

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    tensors = dict(theirs.transformer.named_parameters())
    for name, gradient in _flat(gradients).items():
        wanted = tensors[NAMES[name]].grad.numpy()
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def test_generation_is_that_of_transformers_gpt2(pair, tokens):
    torch = pytest.importorskip("torch")
    theirs, ours = pair
    prompt = tokens[:, :4]
    expected = theirs.generate(
        torch.from_numpy(prompt).long(),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    got = generate(ours, prompt, steps=8, key=jax.random.key(0), temperature=0.0)
    np.testing.assert_array_equal(got, expected)
