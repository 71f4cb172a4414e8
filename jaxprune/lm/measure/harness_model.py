"""A model's directory in EleutherAI's lm-evaluation-harness, the package `lm_eval`.

The scores that people quote (ARC, HellaSwag, MMLU, WikiText's perplexity) are those of
the harness's tasks. Texts are tokenized, cut and scored as its own torch model does.
"""

import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.model import map_tokens
from jaxprune.lm.models.generate import generate
from jaxprune.lm.models.loaded_model import open_model
from jaxprune.lm.packing.packed_decoder import pack_decoder

_SHORTEST = 16


class Scored(NamedTuple):
    """One continuation to score.

    Attributes:
      position: the request's place among all.
      tokens: the context and the continuation, at most one more than the model sees.
      length: number of the last tokens that are the continuation.
    """

    position: int
    tokens: list[int]
    length: int


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A checkpoint directory as `lm_eval.simple_evaluate(model=...)` takes it.

    Args:
      directory: path of a Hugging Face checkpoint directory of one of our families.
      batch_size: number of texts that the model sees at once.
      max_length: number of tokens that it sees of a text; its context if left out.
      dtype: dtype of parameters and products; as they are stored if None.
      packed: whether matrices are read packed, without their zeros.

    Raises:
      ValueError: an argument is out of range, or the directory is no language model.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        dtype: hf.Dtype | None = None,
        packed: bool = False,
    ) -> None:
        """Reads the model."""
        super().__init__()
        source = open_directory(directory)
        opened = open_model(source, dtype=dtype)
        words = hf.load_tokenizer(directory)
        prefix = words.bos if words.bos is not None else next(iter(words.eos), None)
        if not batch_size >= 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if max_length is not None and not 2 <= max_length <= opened.config.context:
            raise ValueError(
                "max_length must be 2 or more and at most the model's context of "
                f"{opened.config.context} tokens, got {max_length}"
            )
        if prefix is None:
            raise ValueError(
                "a text without a context needs BOS or EOS before it, but "
                f"'{directory}' names neither; name bos_token in tokenizer_config.json"
            )
        self.directory, self.words = str(directory), words
        self.max_length = max_length or opened.config.context
        self.batch_size, self._prefix = batch_size, prefix
        self.decoder = (
            pack_decoder(opened, source).decoder if packed else opened.read().decoder()
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; the prefix where there is none."""
        return next(iter(self.words.eos), self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS, or else EOS."""
        return self._prefix  # type: ignore[return-value]

    @property
    def tokenizer_name(self) -> str:
        """The directory, which names cached requests."""
        return self.directory

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text, with BOS as the directory says."""
        tokens, bos = self.words.encode(string, bos=False), self.words.bos
        # A text that brings its own, as one of a chat template does, has it once.
        asked = (
            tokens[:1] != [bos] if add_special_tokens is None else add_special_tokens
        )
        if bos is None or not (asked and self.words.begins):
            return tokens
        return [bos, *tokens]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, window by window."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        return [sum(s for s, _ in itertools.islice(scores, n)) for n in counts]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is the likeliest."""
        scored = [
            Scored(
                position, (context + continuation)[-self.max_length - 1 :],
                len(continuation),
            )
            for position, (_, context, continuation) in enumerate(requests)
        ]  # fmt: skip
        graphdef, params = nnx.split(self.decoder, nnx.Param)
        results: dict[int, tuple[float, bool]] = {}
        # The longest first: what does not fit the memory ends at once.
        scored.sort(key=lambda text: -len(text.tokens))
        progress = Progress(len(scored), "scoring", unit="text", shown=not disable_tqdm)
        for first in range(0, len(scored), self.batch_size):
            batch = scored[first : first + self.batch_size]
            size = self._padded(max(len(text.tokens) for text in batch) - 1)
            tokens = np.zeros((self.batch_size, size + 1), np.int32)
            for row, text in enumerate(batch):
                tokens[row, : len(text.tokens)] = text.tokens
            losses, likeliest = jax.device_get(_score(graphdef, params, tokens))
            for row, text in enumerate(batch):
                end = len(text.tokens) - 1
                cells = np.s_[row, end - min(text.length, end) : end]
                score = (-float(losses[cells].sum()), bool(likeliest[cells].all()))
                results[text.position] = score
            progress.update(len(batch))
        progress.close()
        return [results[position] for position in range(len(requests))]

    def _padded(self, length: int) -> int:
        """The length that texts are padded to, one of few, each a program."""
        size = _SHORTEST
        while size < length:
            size *= 2
        return min(size, self.max_length)

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """What the model writes after each prompt, up to a stopping sequence.

        A program is compiled for each length of a prompt.
        """
        eos = self.words.decode([self.eot_token_id], special=True)
        texts: list[str] = []
        progress = Progress(
            len(requests), "writing", unit="text", shown=not disable_tqdm
        )
        for prompt, options in (request.args for request in requests):
            settings = normalize_gen_kwargs(options, 256)
            until = handle_stop_sequences(settings["until"], eos=eos)
            steps = int(settings["max_gen_toks"])
            room = self.max_length - steps
            if not room >= 1:
                raise ValueError(
                    f"a task asks for {steps} tokens, which leaves no room for its "
                    f"prompt in the model's {self.max_length} tokens; give "
                    'gen_kwargs="max_gen_toks=..." less'
                )
            tokens = jnp.asarray([self.tok_encode(prompt)[-room:]])
            drawn = generate(
                self.decoder,
                tokens,
                steps=steps,
                key=jax.random.key(0),
                temperature=float(settings.get("temperature") or 0.0),
            )[0, tokens.shape[1] :]
            text = self.words.decode(_up_to(drawn.tolist(), self.words.eos))
            texts.append(postprocess_generated_text(text, until, None))
            progress.update()
        progress.close()
        return texts


def _up_to(tokens: Iterable[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first of some."""
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graphdef: nnx.GraphDef[Any], params: nnx.State, tokens: Int[Array, "batch time+1"]
) -> tuple[Float[Array, "batch time"], Bool[Array, "batch time"]]:
    """The loss of each next token in nats, and whether it is the likeliest."""
    model = nnx.merge(graphdef, params)
    states, _ = model.states(model.embed(tokens[:, :-1]))  # (batch, time, width)

    def measure(state: Array, target: Array) -> tuple[Array, Array]:
        logits = model.logits(state).astype(jnp.float32)  # (batch, vocab)
        logit = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - logit  # (batch,)
        return loss, logits.argmax(axis=-1) == target

    vocab = model.config.vocab_size
    return map_tokens(measure, (states, tokens[:, 1:]), vocab=vocab)  # type: ignore
