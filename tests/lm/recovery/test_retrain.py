import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune.arrays import tree
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.model import loss_per_token
from jaxprune.lm.recovery import checkpoints, retrain
from tests.support.compilations import compiled
from tests.support.plain_decoder import initial

CONFIG = DecoderConfig(
    vocab_size=17, context=8, layers=1, width=8, heads=2, kv_heads=2, head_dim=4,
    mlp_width=8,
)  # fmt: skip
SEQUENCES = np.random.default_rng(0).integers(0, 17, (4, 8)).astype(np.int32)


def leaves(model):
    named = tree.named_leaves(nnx.split(model)[1])
    return {name: np.asarray(leaf) for name, leaf in named.items()}


def losses_of(model, tokens):
    graphdef, params = nnx.split(model)

    def losses(params, tokens):
        model = nnx.merge(graphdef, params)
        return loss_per_token(model, tokens[:, :-1], tokens[:, 1:])

    return np.asarray(jax.jit(losses)(params, tokens))


@pytest.fixture(scope="module")
def half():
    """A model whose MLP lacks half of its weights, and the names of those leaves."""
    graphdef, params = nnx.split(initial(CONFIG))
    names = {name for name in tree.names(params) if "mlp" in name}
    masked = [
        jnp.asarray(np.where(np.arange(leaf.size).reshape(leaf.shape) % 2, leaf, 0))
        if name in names
        else leaf
        for name, leaf in tree.named_leaves(params).items()
    ]
    params = jax.tree.unflatten(jax.tree.structure(params), masked)
    return nnx.merge(graphdef, params), names


@pytest.mark.full
def test_the_loss_falls_the_zeros_stay_and_all_else_is_as_it_was(half):
    model, names = half
    before = leaves(model)
    settings = retrain.Settings(steps=8, learning_rate=0.1)
    found, losses = retrain.retrain(model, names, SEQUENCES, settings)
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


@pytest.mark.parametrize(("steps", "first"), [(8, 1.0), (40, 1 / 3)])
def test_the_rate_rises_in_a_twentieth_of_the_steps_and_falls_to_zero(
    half, monkeypatch, steps, first
):
    rates = []

    def without_steps(rate):
        rates.extend(float(rate(step)) for step in range(steps + 1))
        raise KeyboardInterrupt

    monkeypatch.setattr(retrain.optax, "adamw", without_steps)
    settings = retrain.Settings(steps=steps, learning_rate=0.5)
    with pytest.raises(KeyboardInterrupt):
        retrain.retrain(*half, SEQUENCES, settings)
    top = steps // 20
    assert rates[0] == pytest.approx(0.5 * first)
    assert rates[top] == pytest.approx(0.5)
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    assert rates[-1] == pytest.approx(0, abs=1e-6)


def test_a_relative_rate_moves_a_leaf_by_a_share_of_its_root_mean_square(half):
    model, names = half
    settings = retrain.Settings(steps=1, learning_rate=1e-3, relative=True)
    trained, _ = retrain.retrain(model, names, SEQUENCES, settings)
    for name in names:
        before, after = (leaves(m)[name].astype(np.float64) for m in (model, trained))
        # Adam's first step changes each weight by the whole rate.
        rate = 1e-3 * np.sqrt(np.square(before).mean())
        np.testing.assert_allclose(np.abs(after - before).max(), rate, rtol=1e-2)


def test_a_loss_that_is_not_finite_is_refused_by_its_step(half):
    settings = retrain.Settings(steps=8, learning_rate=float("inf"))
    with pytest.raises(ValueError, match=r"got (nan|inf) at step [23]; lower the"):
        retrain.retrain(*half, SEQUENCES, settings)


@pytest.mark.parametrize(
    ("names", "rows", "steps", "told"),
    [
        ({"layers/0/mlp/pu/kernel"}, 4, 3, "leaves, got 'layers/0/mlp/pu/kernel'; jp"),
        (set(), 4, 3, "leaves, got none"),
        (None, 0, 3, "one sequence, got 3, 4 and 0"),
        (None, 4, 0, "at least one step, .* got 0, 4 and 4"),
    ],
)
def test_nothing_to_train_is_refused(half, names, rows, steps, told):
    model, known = half
    names = known if names is None else names
    settings = retrain.Settings(steps=steps, learning_rate=0.1)
    with pytest.raises(ValueError, match=told):
        retrain.retrain(model, names, SEQUENCES[:rows], settings)


def test_sequences_of_one_token_teach_nothing(half):
    settings = retrain.Settings(steps=1, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"at least 2 tokens.* got 1; give longer"):
        retrain.retrain(*half, SEQUENCES[:, :1], settings)


@pytest.mark.full
def test_leaves_of_which_some_are_committed_to_their_device_compile_one_step(half):
    """As after a solver, whose results are, beside leaves that it left alone."""
    model, names = half
    graphdef, params = nnx.split(model)
    some = [
        jax.device_put(leaf, jax.devices()[0]) if name == min(names) else leaf
        for name, leaf in tree.named_leaves(params).items()
    ]
    mixed = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(params), some))
    programs = []
    for steps in (1, 3):
        jax.clear_caches()
        settings = retrain.Settings(steps=steps, learning_rate=0.1)
        with compiled() as seconds:
            retrain.retrain(mixed, names, SEQUENCES, settings)
        programs.append(len(seconds))
    assert programs[0] == programs[1]


@pytest.mark.full
def test_only_leaves_that_are_masked_keep_their_zeros(half):
    model, names = half
    settings = retrain.Settings(steps=1, learning_rate=0.1)
    found, _ = retrain.retrain(model, names, SEQUENCES, settings, masked=set())
    moved = [(leaves(found)[name] != 0) & (leaves(model)[name] == 0) for name in names]
    assert sum(int(each.sum()) for each in moved) > 0


@pytest.mark.full
def test_a_change_of_low_rank_is_one_and_zeros_stay(half):
    model, names = half
    names = {name for name in names if leaves(model)[name].ndim == 2}
    settings = retrain.Settings(steps=2, learning_rate=0.1, rank=1)
    free, _ = retrain.retrain(model, names, SEQUENCES, settings, masked=set())
    held, _ = retrain.retrain(model, names, SEQUENCES, settings)
    for name in names:
        change = (leaves(free)[name] - leaves(model)[name]).astype(np.float64)
        values = np.linalg.svd(change, compute_uv=False)
        assert values[1] < 1e-5 * values[0]
        zero = leaves(model)[name] == 0
        np.testing.assert_array_equal(leaves(held)[name] == 0, zero)


def test_a_killed_run_goes_on_to_the_same_bits(half, tmp_path, monkeypatch):
    model, names = half
    monkeypatch.setattr(checkpoints.Checkpoints, "due", lambda self: True)
    settings = retrain.Settings(steps=5, learning_rate=0.1, batch=3, seed=1)
    whole, losses = retrain.retrain(model, names, SEQUENCES, settings)
    done = []

    def dies(steps, loss):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(steps)

    args = (model, names, SEQUENCES)
    with pytest.raises(KeyboardInterrupt):
        retrain.retrain(*args, settings, directory=tmp_path, progress=dies)
    # The newer of the two slots is half written; the other one still holds.
    records = {p: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    steps = {p: own["record"]["step"] for p, own in records.items() if "record" in own}
    newer = max(steps, key=steps.__getitem__)
    newer.with_suffix(".safetensors").write_bytes(b"half")
    done = []
    found, again = retrain.retrain(
        *args, settings, directory=tmp_path, progress=lambda n, loss: done.append(n)
    )
    assert done == [2, 1, 1, 1]
    assert again == losses
    for name, leaf in leaves(found).items():
        np.testing.assert_array_equal(leaf, leaves(whole)[name])
    other = dataclasses.replace(settings, seed=2)
    with pytest.raises(ValueError, match="another job: seed was 1 and is 2"):
        retrain.retrain(*args, other, directory=tmp_path)


@pytest.mark.parametrize("batch", [2, 3])
def test_perplexity_is_exp_of_the_mean_loss_of_each_token(half, batch):
    model, _ = half
    tokens = SEQUENCES.reshape(-1)
    done = []
    found = perplexity.measure_perplexity(
        model, perplexity.slide(tokens, context=9), batch=batch, progress=done.append
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
