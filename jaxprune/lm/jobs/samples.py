"""What a model writes after a prompt."""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.arrays import processes
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs.inputs import JobTexts, optional_tokenizer
from jaxprune.lm.jobs.opening import text_beginning
from jaxprune.lm.jobs.prune_settings import PruneEvaluation, PruneJob
from jaxprune.lm.jobs.settings import Loading
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.models.generate import generate
from jaxprune.lm.models.hf import Tokenizer

_PROMPT, _TEMPERATURE = 16, 0.8  # tokens of a text that are a prompt


class Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
      steps: number of tokens.
      temperature: 0 takes the likeliest token.
      top_k: number of the likeliest tokens that are drawn among; all if None.
      seed: seed of the draws.
    """

    steps: int
    temperature: float = _TEMPERATURE
    top_k: int | None = None
    seed: int = 0


def encode_prompt(tokenizer: Tokenizer, prompt: str, bos: int | None) -> list[int]:
    """The tokens of a prompt after `bos`, at least one."""
    tokens = tokenizer.encode(prompt, bos=False)
    tokens = [bos, *tokens] if bos is not None else tokens  # (prompt,)
    if not tokens:
        raise ValueError("--prompt must have at least one token, got none")
    return tokens


def draw_tokens(decoder: Decoder, prompt: list[int], sampling: Sampling) -> list[int]:
    """The tokens that a model draws after a prompt, as `generate` draws them.

    Args:
      decoder: model that writes.
      prompt: tokens of the prompt, at least one.
      sampling: number of tokens and how they are drawn.

    Returns:
      The tokens behind the prompt.
    """
    written = generate(
        decoder,
        jnp.array([prompt], jnp.int32),  # (1, prompt)
        steps=sampling.steps,
        key=jax.random.key(sampling.seed),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
    )  # (1, prompt + steps)
    return [int(token) for token in processes.fetch(written)[0, len(prompt) :]]


def decode_sample(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of a prompt and of the tokens behind it, up to one that ends it."""

    def goes_on(token: int) -> bool:
        return token not in tokenizer.eos

    return tokenizer.decode([*prompt, *itertools.takewhile(goes_on, tokens)])


@dataclasses.dataclass
class Samples:
    """What a model writes after one prompt, stage by stage.

    Attributes:
      tokenizer: tokenizer of the model, or None.
      prompt: tokens of the prompt, or None where no sample is made.
      sampling: how tokens are drawn.
      written: "label" and "text" of each stage.
    """

    tokenizer: Tokenizer | None
    prompt: list[int] | None
    sampling: Sampling
    written: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, stage: str, decoder: Decoder) -> None:
        """Lets the model write at a stage."""
        if self.prompt is None or self.tokenizer is None:
            return
        tokens = draw_tokens(decoder, self.prompt, self.sampling)
        text = decode_sample(self.tokenizer, self.prompt, tokens)
        self.written.append({"label": stage, "text": text})


def prepare_samples(
    job: PruneJob, source: CheckpointDir, texts: JobTexts, context: int
) -> Samples:
    """The samples of a pruning, none written yet.

    Args:
      job: settings of the prompt and of the draws.
      source: directory of the model, whose tokenizer may not have been read for texts.
      texts: what is evaluated, whose first tokens are the prompt if none is given.
      context: number of tokens that the model sees at once.

    Returns:
      The samples.

    Raises:
      ValueError: there is no tokenizer, or prompt and sample do not fit the context.
    """
    if texts.tokenizer is None:
        texts = texts._replace(tokenizer=optional_tokenizer(source))
    prompt = choose_prompt(job.evaluation, job.loading, texts, context)
    steps, seed = job.evaluation.prompt_steps, job.calibration.seed
    return Samples(texts.tokenizer, prompt, Sampling(steps, seed=seed))


def choose_prompt(
    evaluation: PruneEvaluation, loading: Loading, texts: JobTexts, context: int
) -> list[int] | None:
    """The tokens before the samples of a pruning, or None where none is made.

    Args:
      evaluation: settings with a prompt and a number of steps.
      loading: settings that say what a text begins with.
      texts: what is evaluated, whose first tokens are the prompt if none is given.
      context: number of tokens that the model sees at once.

    Returns:
      The tokens.

    Raises:
      ValueError: there is no tokenizer, or prompt and sample do not fit the context.
    """
    prompt, steps = evaluation.prompt, evaluation.prompt_steps
    tokenizer = texts.tokenizer
    tokens: list[int] = []
    if steps and tokenizer is not None:
        # Token ids are used as they are, but a prompt in words begins as a text does.
        bos = text_beginning(tokenizer, loading, texts.vocab_size)[1].token
        if prompt is not None:
            tokens = encode_prompt(tokenizer, prompt, bos)
        elif texts.windows:
            first = next(iter(texts.windows.values())).tokens[0]  # (length,)
            most = max(1, min(_PROMPT, context - steps))  # the sample must fit
            tokens = [int(token) for token in first[:most]]
        else:  # no text: the model begins by itself, if it can
            tokens = [] if bos is None else [bos]
    if prompt is not None and tokenizer is None:
        raise ValueError(
            "--prompt needs a tokenizer, but the model's directory has no "
            "tokenizer.json; leave --prompt out"
        )
    if tokens and not len(tokens) <= context - steps:
        raise ValueError(
            f"a sample must fit the model's context of {context} tokens, got a prompt "
            f"of {len(tokens)} and --prompt-steps {steps}; take fewer steps"
        )
    return tokens or None
