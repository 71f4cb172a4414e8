"""`jaxprune sample`: what a model writes after a prompt."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import tyro

from jaxprune.arrays import processes
from jaxprune.lm.cli import models, parse
from jaxprune.lm.cli.console import Console
from jaxprune.lm.models import hf
from jaxprune.lm.models.generate import generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(models.ModelOptions):
    """Continues a prompt.

    Attributes:
      model: the directory.
      prompt: the beginning of the text.
      steps: how many tokens are drawn.
      temperature: 0 takes the likeliest token, 1 draws as the model says, a higher one
        draws more at random.
      top_k: draw among this many of the likeliest tokens; among all if left out.
      seed: decides the draws.
    """

    EXAMPLE: ClassVar = 'jaxprune sample MODEL --prompt "Once upon a time"'

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    prompt: str
    steps: int = 100
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def run(self, console: Console, arguments: list[str]) -> dict[str, Any]:
        """Draws the text."""
        self._check()
        model = models.find(self.model, self)
        tokenizer = hf.load_tokenizer(self.model)
        begins = models.beginning(tokenizer, self, model.config.vocab_size)
        prompt = start(tokenizer, self.prompt, begins.token)
        if (whole := len(prompt) + self.steps) > model.config.context:
            raise ValueError(
                f"the prompt and --steps must fit the model's context of "
                f"{model.config.context} tokens, got {len(prompt)} and {self.steps}, "
                f"{whole} in all; take a shorter prompt or fewer steps"
            )
        models.say_ignored(model, console)
        tokens = continued(
            model.read(),
            prompt,
            self.steps,
            self.temperature,
            self.top_k,
            self.seed,
        )
        text = shown(tokenizer, prompt, tokens)
        console.note(f"the prompt begins with {begins.why}")
        console.say(text)
        return {"text": text, "prompt": self.prompt, "bos": begins.why} | {
            "tokens": tokens,
            "seed": self.seed,
            "ignored_config": model.ignored,
        }

    def _check(self) -> None:
        """Refuses options before the model is looked at."""
        parse.check_at_least_one(top_k=self.top_k)
        parse.check_seed(self.seed)
        if self.steps < 0:
            raise ValueError(f"--steps must not be negative, got {self.steps}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"--temperature must be 0 or more and finite, got {self.temperature}"
            )


def start(tokenizer: hf.Tokenizer, prompt: str, bos: int | None) -> list[int]:
    """The tokens of a prompt after `bos`, at least one."""
    tokens = tokenizer.encode(prompt, bos=False)
    tokens = [bos, *tokens] if bos is not None else tokens
    if not tokens:
        raise ValueError("--prompt must have at least one token, got none")
    return tokens


def continued(
    model: models.Model,
    prompt: list[int],
    steps: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> list[int]:
    """The tokens that a model draws after a prompt, as `generate` draws them."""
    whole = generate(
        model.decoder(),
        jnp.array([prompt], jnp.int32),
        steps=steps,
        key=jax.random.key(seed),
        temperature=temperature,
        top_k=top_k,
    )
    return [int(token) for token in processes.fetch(whole)[0, len(prompt) :]]


def shown(tokenizer: hf.Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of a prompt and of the tokens behind it, up to one that ends it."""
    going_on = lambda token: token not in tokenizer.eos  # noqa: E731
    return tokenizer.decode([*prompt, *itertools.takewhile(going_on, tokens)])
