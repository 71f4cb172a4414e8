"""The two steps by which a wrapper of an optimizer is timed beside plain adamw.

The whole training step of a GPT, and the optimizer's step alone on given gradients.
Parameters and state are donated.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import gpt
from experiments.harness import training
from experiments.harness.optimizer import optimizer, schedule
from experiments.tasks.language_model import LanguageModel

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]
Step = Callable[[], Any]

LEAVES, COLUMNS = 24, 2048


def of_gpt(
    wraps: Mapping[str, Wrap], preset: str, batch_size: int, block: int
) -> dict[str, Step]:
    """Whole training steps of a GPT.

    Args:
      wraps: name to a function that wraps adamw.
      preset: name of the GPT's size.
      batch_size: number of sequences in a batch.
      block: number of steps in one call.

    Returns:
      Name to a function that takes so many steps.
    """
    shape = gpt.GPTConfig(vocab_size=65, **gpt.PRESETS[preset])
    model, rng = LanguageModel(shape), np.random.default_rng(0)
    tokens = rng.integers(0, 65, (2, batch_size, shape.context), np.int32)
    inputs, targets = jnp.asarray(tokens[0]), jnp.asarray(tokens[1])  # (batch, context)
    key = jax.random.key(0)

    def candidate(wrap: Wrap) -> Step:
        tx = wrap(optimizer(schedule(1e-3, 1000, warmup=100), track=()))
        step = jax.jit(training.make_step(model.loss, tx), donate_argnums=0)
        # In a list, since each call uses up the state of the one before.
        carry = [training.init(model.init(0), tx)]

        def run() -> Any:
            for _ in range(block):
                carry[0], loss = step(carry[0], inputs, targets, key)
            return carry[0], loss

        return run

    return {name: candidate(wrap) for name, wrap in wraps.items()}


def of_optimizer(wraps: Mapping[str, Wrap], size: int) -> dict[str, Step]:
    """Single steps of adamw on given gradients, in 24 leaves.

    Args:
      wraps: name to a function that wraps adamw.
      size: number of parameters, about.

    Returns:
      Name to a function that takes a step.
    """
    gradients = parameters(size)

    def candidate(wrap: Wrap) -> Step:
        tx = wrap(optax.adamw(1e-3))

        def step(carry: Any, gradients: Any) -> Any:
            updates, state = tx.update(gradients, carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), state

        compiled = jax.jit(step, donate_argnums=0)
        # Any numbers do, of the gradients' shapes; copied, for they are donated.
        params = jax.tree.map(jnp.copy, gradients)
        carry = [(params, tx.init(params))]

        def run() -> Any:
            carry[0] = compiled(carry[0], gradients)
            return carry[0]

        return run

    return {name: candidate(wrap) for name, wrap in wraps.items()}


def parameters(size: int) -> dict[str, jax.Array]:
    """About so many random numbers in 24 leaves."""
    shape = (size // LEAVES // COLUMNS, COLUMNS)
    return {
        f"layer_{n}": 0.01 * jax.random.normal(jax.random.key(n), shape)
        for n in range(LEAVES)
    }
