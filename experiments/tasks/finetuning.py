"""A checkpoint directory's language model and texts, as the stages of a run see them.

A window of `length` tokens begins with BOS where the model wants that: it takes the
place of the token before the window, so that as many are predicted with it as without.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.datasets import Batches, validation_batches
from experiments.harness.task import Looks, Mean, Task
from experiments.tasks.pure_model import PureModel
from jaxprune.arrays import processes
from jaxprune.arrays.low_bit import Storage
from jaxprune.lm.models import generate, hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.model import Decoder, cross_entropy
from jaxprune.typing import Params

TABLES = ("embedding/*", "position_embedding/*", "head/*")
"""The tables of the vocabulary and of the positions, most of a small model; no
criterion ranks them (`jp.tree.prunable`)."""

_PROMPT = 32  # tokens of the held-out text that a sample begins with
_CALIBRATION = 2**32  # a seed that no training run has


class DecoderModel(PureModel[Decoder]):
    """A decoder's functions, its parameters those of a directory.

    Attributes:
      config: the model's shape.
      remat: whether the activations inside a layer are made again for the gradient.
    """

    def __init__(
        self, config: DecoderConfig, start: Callable[[], Params], *, remat: bool = False
    ) -> None:
        """Traces the model once; `start` reads the parameters, for every seed."""
        super().__init__(lambda rngs: Decoder(config, rngs=rngs), start)
        self.config, self.remat = config, remat


class Texts(NamedTuple):
    """What is trained on, and what is measured on.

    Attributes:
      train: tokens, (length,).
      held_out: tokens of the same text, not trained on.
      foreign: tokens of other texts, by name: how much of them the model forgets.
    """

    train: np.ndarray
    held_out: np.ndarray
    foreign: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class FinetuningTask(Task):
    """Next tokens of a text, for a model that knows others.

    Attributes:
      model: the model's functions.
      tokenizer: tokenizer of its directory.
      texts: its data.
      sequence: tokens of a sequence.
      looks: how it is measured.
      foreign_tokens: number of tokens of each foreign text, at most; None for all.
      calibration: sequences that a solver sees.
      frozen: globs of the leaves that are not trained, nor watched.
      storage: how averages are held.
      write: writer of the model's directory; see `Task`.
    """

    model: DecoderModel
    tokenizer: hf.Tokenizer
    texts: Texts
    sequence: int
    looks: Looks
    foreign_tokens: int | None = None
    calibration: int = 32
    frozen: tuple[str, ...] = TABLES
    storage: Storage = "float32"
    write: Callable[[Mapping[str, jax.Array], Path, Mapping[str, Any]], None] | None = (
        None
    )
    begins_trained: ClassVar[bool] = True

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.sequence

    def token_losses(self, params: Params, inputs: Any, targets: Any) -> jax.Array:
        """Nats of each target; the logits of all never exist at once."""
        model = self.model.bind(params)
        states, _ = model.states(model.embed(inputs), remat=self.model.remat)
        return cross_entropy(model, states, targets)

    def batches(
        self, batch_size: int, seed: int
    ) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """Windows of the training text, a pure function of the step."""
        windows = Batches(self.texts.train, batch_size, self.length, seed)

        def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
            inputs, targets = windows(step)
            return self._begun(inputs), targets

        return batch

    def _begun(self, inputs: np.ndarray) -> np.ndarray:
        """Windows that begin with BOS where the directory's texts do."""
        if not self.tokenizer.begins:
            return inputs
        return np.concatenate(
            # In the first token's place: lengths and targets are those of a model
            # without BOS.
            [np.full_like(inputs[:, :1], self.tokenizer.bos), inputs[:, 1:]],
            axis=1,
        )

    def _windows(
        self, tokens: np.ndarray, batch_size: int, limit: int | None
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        cut = validation_batches(tokens, batch_size, self.length, limit)
        return [(self._begun(x), targets, weights) for x, targets, weights in cut]

    def validation(
        self, batch_size: int, limit: int | None
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Windows that predict each token of the held-out text once."""
        return self._windows(self.texts.held_out, batch_size, limit)

    def measured(self, params: Params, loss: float, mean: Mean) -> dict[str, Any]:
        """The perplexity, and both of the foreign texts: together, and each loss."""
        losses, total, count = {}, 0.0, 0
        for name, tokens in self.texts.foreign.items():
            windows = self._windows(tokens, self.looks.batch, self.foreign_tokens)
            losses[name] = mean(params, windows)
            targets = sum(int(weights.sum()) for *_, weights in windows)
            total, count = total + losses[name] * targets, count + targets
        return {
            "perplexity": perplexity(loss),
            "foreign_loss": total / count,
            "foreign_perplexity": perplexity(total / count),
            "foreign_by_text": losses,
        }

    def shown(self, params: Params, label: str, length: int) -> dict[str, Any]:
        """A text that the model writes, begun with the first held-out words."""
        # The prompt and what is written fit the context, however short that is.
        room = max(1, self.model.config.context - length)
        prompt = self.texts.held_out[None, : min(_PROMPT, room)].astype(np.int32)
        generated = generate.generate(
            self.model.bind(params),
            jnp.asarray(self._begun(prompt)),
            steps=length,
            key=jax.random.key(0),
            temperature=0.8,
            sliding=True,
        )
        tokens = processes.fetch(generated)[0].tolist()
        return {"label": label, "text": self.tokenizer.decode(tokens)}

    def solved(
        self,
        params: Params,
        *,
        method: Any,
        seed: int,
    ) -> Params:
        """Pruned layer by layer, from sequences of the training text."""
        draw = self.batches(1, _CALIBRATION + seed)  # sequences of (1, length)
        # Embedded here: the table is no part of what a solver looks at.
        table = self.model.bind(params).embed
        embedded = [
            table(jnp.asarray(draw(step)[0])) for step in range(self.calibration)
        ]
        return jp.prune_trained(
            lambda params, x: self.model.bind(params).states(x)[0],
            params,
            embedded,
            method,
        ).params


def perplexity(loss: float) -> float | None:
    """exp(loss); None where that is too large to be written down."""
    return math.exp(loss) if loss < 700 else None
