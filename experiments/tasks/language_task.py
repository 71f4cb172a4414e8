"""A GPT and a corpus, as the stages of a run see them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from experiments.datasets import Batches, Corpus, validation_batches
from experiments.harness.task import Task
from experiments.tasks.language_model import LanguageModel
from jaxprune.typing import Params


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageTask(Task):
    """Next characters of a text.

    Attributes:
      model: the GPT's functions.
      corpus: the text.
    """

    model: LanguageModel
    corpus: Corpus

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.model.config.context

    def loss(self, params: Params, inputs: Any, targets: Any, key: Any) -> jax.Array:
        """Mean nats per token."""
        return self.model.loss(params, inputs, targets, key)

    def token_losses(self, params: Params, inputs: Any, targets: Any) -> jax.Array:
        """Nats of each token."""
        return self.model.token_losses(params, inputs, targets)

    def batches(self, batch_size: int, seed: int) -> Batches:
        """Windows of the training text."""
        return Batches(self.corpus.train, batch_size, self.length, seed)

    def validation(
        self, batch_size: int, limit: int | None
    ) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """Windows that predict each token of the validation text once."""
        tokens = self.corpus.validation
        return validation_batches(tokens, batch_size, self.length, limit)

    def shown(self, params: Params, label: str, length: int) -> dict[str, Any]:
        """A text that the model writes, begun with the first validation words."""
        # A quarter of the context: enough to set the tone, most is the model's.
        prompt = self.corpus.validation[: self.length // 4]
        generated = self.model.sample(params, prompt, length)
        vocabulary = self.corpus.vocabulary
        # "gpt2" has more entries than a text has characters; one may be drawn.
        new = [
            vocabulary.decode([t])
            if t < len(vocabulary)
            else "\N{REPLACEMENT CHARACTER}"
            for t in generated
        ]
        return {"label": label, "text": vocabulary.decode(prompt) + "".join(new)}
