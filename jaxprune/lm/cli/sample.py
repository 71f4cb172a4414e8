"""`jaxprune sample`: what a model writes after a prompt."""

import dataclasses
import itertools
import sys
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import tyro

from jaxprune.arrays import processes
from jaxprune.arrays.rules import check, within
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.checkpoints.compact_source import open_source
from jaxprune.lm.cli.options import Options
from jaxprune.lm.models import hf
from jaxprune.lm.models.generate import generate
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.opening import note_ignored, text_beginning
from jaxprune.lm.steps.option_rules import SEED, at_least, option_values
from jaxprune.lm.steps.option_types import Count, MaybeCount, ModelPath, Number
from jaxprune.lm.steps.packing import (
    PACKING_RULES,
    Packing,
    open_packable,
    read_decoder,
)
from jaxprune.lm.steps.settings import Loading, LoadingGroup

_RULES = (
    *PACKING_RULES,
    at_least("top_k", 1),
    SEED,
    at_least("steps", 0),
    within(
        "temperature",
        0,
        sys.float_info.max,
        "--temperature must be 0 or more and finite, got {temperature}",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Options):
    """Continues a prompt.

    Attributes:
      model: the directory, or a compact file of one.
      prompt: the beginning of the text.
      steps: how many tokens are drawn.
      temperature: 0 takes the likeliest token, 1 draws as the model says, a higher one
        draws more at random.
      top_k: draw among this many of the likeliest tokens; among all if left out.
      seed: decides the draws.
    """

    EXAMPLE: ClassVar = 'jaxprune sample MODEL --prompt "Once upon a time"'

    model: ModelPath
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    steps: Count = 100
    temperature: Number = 1.0
    top_k: MaybeCount = None
    seed: Count = 0
    loading: LoadingGroup = dataclasses.field(default_factory=Loading)
    packing: Packing = dataclasses.field(default_factory=Packing)

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Draws the text."""
        check(_RULES, **option_values(self))
        with open_source(self.model) as source:
            return self._run(console, source)

    def _run(self, console: Console, source: CheckpointDir) -> dict[str, Any]:
        model = open_packable(source, self.loading, self.packing)
        tokenizer = hf.load_tokenizer(source.path)
        vocab_size, context = model.config.vocab_size, model.config.context
        _, begins = text_beginning(tokenizer, self.loading.bos, vocab_size)
        # Its tokenizer begins with BOS where the options or the directory say so.
        prompt = tokenizer.encode(self.prompt, bos=False)
        if begins.token is not None:
            prompt = [begins.token, *prompt]  # (prompt,)
        if not prompt:
            raise ValueError("--prompt must have at least one token, got none")
        length, steps = len(prompt), self.steps
        total = length + steps
        if not length + steps <= context:
            raise ValueError(
                f"the prompt and --steps must fit the model's context of {context} "
                f"tokens, got {length} and {steps}, {total} in all; take a shorter "
                "prompt or fewer steps"
            )
        note_ignored(model, console)
        # Only now are the weights read.
        decoder, packed = read_decoder(model, source, self.packing, console)
        written = generate(
            decoder,
            jnp.array([prompt], jnp.int32),  # (1, prompt)
            steps=steps,
            key=jax.random.key(self.seed),
            temperature=self.temperature,
            top_k=self.top_k,
        )  # (1, prompt + steps)
        tokens = [int(token) for token in processes.fetch(written)[0, length:]]
        # A token that ends a text ends what is shown.
        shown = itertools.takewhile(lambda token: token not in tokenizer.eos, tokens)
        text = tokenizer.decode([*prompt, *shown])
        console.note(f"the prompt begins with {begins.why}")
        console.say(text)
        return {
            "text": text,
            "prompt": self.prompt,
            "bos": begins.why,
            "tokens": tokens,
            "seed": self.seed,
            "ignored_config": model.ignored,
            "packed": packed,
        }
