"""The library where nothing is but its base dependencies: train, prune, shrink.

    python -I tests/support/bare_library.py        in an environment that has no more
    python tests/support/bare_library.py refuse    where more is installed, but unused

`.ci/run` runs the first with the wheel that it has built, outside of the checkout.
"""

import importlib.metadata
import sys
from collections.abc import Iterator, Sequence

# What the extras of pyproject.toml bring, and `import jaxprune` must not need.
EXTRAS = (
    "flax",
    "orbax",
    "safetensors",
    "tokenizers",
    "jinja2",
    "matplotlib",
    "tyro",
    "pyarrow",
    "torch",
)


class Refuse:
    """A finder that refuses to import what the extras bring."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raises for a package of `EXTRAS`; finds nothing else either."""
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"{name} is not a base dependency", name=name)


def installed() -> Iterator[str]:
    """Top-level names of all that is installed here."""
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            yield file.parts[0].removesuffix(".py")


def use() -> None:
    """Trains under a tracker and under masks, prunes after training, shrinks."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jaxprune as jp

    def model(params, x):
        return jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]

    def check_zeros(params):
        zeros = {
            name: count for name, (count, _) in jp.sparsity(params).by_leaf.items()
        }
        assert zeros == {"up": 128, "bias": 0, "down": 64}, zeros

    def loss(params):
        return jnp.mean((model(params, x) - y) ** 2)

    def train(tx, params):
        @jax.jit
        def step(params, state):
            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        state, values = jax.jit(tx.init)(params), []
        for _ in range(40):
            params, state, value = step(params, state)
            values.append(float(value))
        assert values[-1] < values[0], values
        return params, state

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)  # (batch, in)
    y = np.sin(x[:, :4])  # (batch, out)
    dense = {
        "up": (rng.normal(size=(8, 32)) / 3).astype(np.float32),
        "bias": np.zeros(32, np.float32),
        "down": (rng.normal(size=(32, 4)) / 6).astype(np.float32),
    }
    dense, state = train(optax.chain(optax.adam(1e-2), jp.track_importance()), dense)
    scores = jp.scores.averaged_weight(dense, state)
    pruned = jp.prune(dense, scores, 0.5, allocation="layer")
    check_zeros(pruned)
    masks = jp.masks.make(scores, 0.5, allocation="layer")
    retrained, _ = train(jp.keep_masks(optax.adam(1e-2), masks), pruned)
    check_zeros(retrained)

    result = jp.prune_trained(model, dense, [x], method="wanda", sparsity=0.5)
    check_zeros(result.params)

    small = jp.shrink(model, dense, [x], jp.scores.magnitude, 0.5)
    assert small.params["up"].shape == (8, 16), small.params["up"].shape
    assert small.fn(small.params, x).shape == y.shape


def main(arguments: Sequence[str]) -> None:
    """Checks what is here, uses the library, checks what was imported."""
    if "refuse" in arguments:
        sys.meta_path.insert(0, Refuse())
    else:
        present = sorted({*EXTRAS} & {*installed()})
        assert not present, f"{present} are installed: this environment is not bare"
    use()
    imported = [name for name in EXTRAS if name in sys.modules]
    assert not imported, f"{imported} were imported"
    import jaxprune

    print("used", jaxprune.__file__, "without", *EXTRAS)


if __name__ == "__main__":
    main(sys.argv[1:])
