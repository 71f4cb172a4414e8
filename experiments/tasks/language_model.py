"""A GPT as pure functions of its parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import gpt
from experiments.tasks.pure_model import PureModel
from jaxprune.arrays import processes
from jaxprune.lm.models import generate


class LanguageModel(PureModel[gpt.GPT]):
    """A configuration's functions, its parameters initialised as nanoGPT's.

    Attributes:
      config: the model's shape.
    """

    def __init__(self, config: gpt.GPTConfig) -> None:
        """Traces the model once; makes no parameters."""
        super().__init__(lambda rngs: gpt.GPT(config, rngs=rngs))
        self.config = config

    def loss(
        self, params: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Mean nats per token, with dropout by `key` where there is dropout."""
        dropout = key if self.config.dropout else None
        return gpt.loss(self.bind(params), inputs, targets, key=dropout)

    def token_losses(
        self, params: Any, inputs: jax.Array, targets: jax.Array
    ) -> jax.Array:
        """Nats of each token, (batch, context), without dropout."""
        logits = self.bind(params)(inputs)  # (batch, context, vocabulary)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    def sample(self, params: Any, prompt: np.ndarray, length: int) -> np.ndarray:
        """`length` sampled tokens after the prompt, at temperature 0.8, seed 0.

        The context holds the prompt and what is written; a longer text is written in
        windows, each going on from the second half of the one before.
        """
        model, half = self.bind(params), self.config.context // 2
        text = list(prompt)
        # A model with learned positions knows none behind its context, so it starts
        # anew.
        for window in range(-(-length // half)):
            context = jnp.asarray([text[-half:]], jnp.int32)  # (1, at most half)
            new = generate.generate(
                model,
                context,
                steps=half,
                key=jax.random.key(window),
                temperature=0.8,
            )
            text += processes.fetch(new)[0, context.shape[1] :].tolist()
        return np.array(text[len(prompt) : len(prompt) + length])
