"""Texts as inputs: sequences of tokens with the special tokens of the model.

A text is one stream of tokens, as for the families of ours. Each sequence is a piece of
it between the tokens that the model's tokenizer puts around a text. An encoder and a
decoder share a sequence: the first half is read, the second is written.
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from jaxtyping import Int

from jaxprune.lm.corpora import text_files
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models import hf
from jaxprune.lm.torch_models.opening import TorchModel, load_reader
from jaxprune.lm.torch_models.samples import Measured, Samples

_MASKED = 0.15  # share of the tokens, as BERT was trained
# Attributes of configurations that hold the longest sequence.
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


class TextReader(NamedTuple):
    """How a model reads texts.

    Attributes:
      tokenizer: tokenizer of the model without its special tokens, or None.
      before: tokens that a sequence begins with.
      after: tokens that it ends with.
      mask: token that hides another one, or None.
      vocab_size: number of tokens that the model knows.
      longest: tokens of the longest sequence, or None.
      task: "causal", "masked", "decoder" (behind an encoder) or "other".
      start: token that a decoder begins with.
    """

    tokenizer: hf.Tokenizer | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    mask: int | None
    vocab_size: int
    longest: int | None
    task: str
    start: int | None

    @property
    def special(self) -> str:
        """What sequences begin and end with, in words."""
        begin = f"with tokens {[*self.before]}" if self.before else "with no token"
        return f"{begin} before and {[*self.after]} behind" if self.after else begin

    def fitted(self, length: int, usual: int) -> int:
        """A length that the model takes; one that was asked for must be such."""
        longest = self.longest or length
        # A length that nobody asked for gives way.
        if length > longest and length != usual:
            raise ValueError(
                f"sequences must be of at most {longest} tokens for this model, got "
                f"{length}; give fewer, or leave it out"
            )
        self._check_body(min(length, longest))
        return min(length, longest)

    def reads(self, text: text_files.AnyText) -> "TextReader":
        """How a file is read: rows are used as they are, without special tokens."""
        return self._replace(before=(), after=()) if row_length(text) else self

    def sequences(
        self, bodies: Int[np.ndarray, "sequences body"], *, whole: bool = False
    ) -> Samples:
        """Pieces of a text as inputs of the model.

        Args:
          bodies: tokens without the special ones.
          whole: whether they lose as many at the end as special tokens come around, so
            that their inputs are as long as those of rows.

        Returns:
          The inputs.
        """
        special = len(self.before) + len(self.after)
        if whole:
            self._check_body(bodies.shape[1])
            bodies = bodies[:, : bodies.shape[1] - special]
        if self.task != "decoder":
            return Samples({"input_ids": self._framed(bodies)})
        read = max(1, (bodies.shape[1] - special) // 2)  # with them half of the tokens
        # The decoder is given each token of its half to predict the next one.
        begin = np.full((len(bodies), 1), self.start)  # (sequences, 1)
        written = np.concatenate([begin, bodies[:, read:-1]], axis=1)
        return Samples(
            {
                "input_ids": self._framed(bodies[:, :read]),
                "decoder_input_ids": written.astype(np.int64),
            }
        )

    def _check_body(self, length: int) -> None:
        special = len(self.before) + len(self.after)
        if length <= special + 1:
            raise ValueError(
                f"a sequence of {length} tokens must have two beside {special} special "
                "ones; give a greater length"
            )

    def body(self, length: int) -> int:
        """Tokens of a text in a sequence of a length."""
        pieces = 2 if self.task == "decoder" else 1
        return pieces * length - len(self.before) - len(self.after)

    def measured(
        self, text: text_files.AnyText, role: str, context: int, limit: int, seed: int
    ) -> Measured:
        """A text as what the model is measured on."""
        if self.task == "causal":
            return self._causal(text, role, context, limit)
        reader = self.reads(text)
        if row_length(text):
            bodies = text.first(limit)
        else:
            body = self.body(context)
            tokens = text.first(limit * body)
            # A short text is one sequence, as long as it is.
            size = min(body, tokens.size)
            count = max(1, tokens.size // size)
            bodies = tokens[: count * size].reshape(count, size)[:limit]
        samples = reader.sequences(bodies)
        if self.task != "masked":
            return Measured(samples, role)
        return reader._masked(samples, role, seed)

    def _framed(
        self, bodies: Int[np.ndarray, "sequences body"]
    ) -> Int[np.ndarray, "sequences length"]:
        # (sequences, special)
        ends = [np.tile(ids, (len(bodies), 1)) for ids in (self.before, self.after)]
        return np.concatenate([ends[0], bodies, ends[1]], axis=1).astype(np.int64)

    def _causal(
        self, text: text_files.AnyText, role: str, context: int, limit: int
    ) -> Measured:
        windows = perplexity.windows_of_text(
            text,
            context=context,
            bos=self.before[0] if self.before else None,
            limit=limit,
            longest=self.longest or context,
        )
        tokens = windows.tokens.astype(np.int64)
        # (windows, context - 1)
        targets = np.where(windows.counted, tokens[:, 1:], -1)
        return Measured(Samples({"input_ids": tokens[:, :-1]}), role, targets, windows)

    def _masked(self, samples: Samples, role: str, seed: int) -> Measured:
        """The same tokens are hidden from every model that is measured."""
        tokens = samples.arrays["input_ids"]
        # (samples, length)
        chance = np.random.default_rng(seed)
        hidden = chance.random(tokens.shape) < _MASKED
        # Special tokens are the same in every sequence.
        hidden[:, : len(self.before)] = False
        if self.after:
            hidden[:, -len(self.after) :] = False
        # One token at least, in the middle, where the text is very short.
        hidden[0, tokens.shape[1] // 2] |= not hidden.any()
        inputs = np.where(hidden, np.int64(self.mask or 0), tokens)
        targets = np.where(hidden, tokens, -1)
        # Each token counts as the one that follows nothing: a column before the first.
        padded = np.concatenate([np.zeros_like(tokens[:, :1]), tokens], axis=1)
        facts = {"context": tokens.shape[1], "stride": None, "bos": None}
        windows = perplexity.Windows(padded.astype(np.int32), hidden, facts)
        return Measured(Samples({"input_ids": inputs}), role, targets, windows)


def row_length(text: text_files.AnyText) -> int | None:
    """Tokens of the sequences of a file that are used as they are; None of a text."""
    if isinstance(text, text_files.Text) and text.is_rows:
        return int(text.tokens.shape[1])
    return None


def text_reader(model: TorchModel, files: tuple[Path, ...]) -> TextReader:
    """How a model reads texts.

    Args:
      model: directory with a tokenizer, and the module.
      files: texts that it will read; token ids need no tokenizer.

    Returns:
      The reader.

    Raises:
      ValueError: the model takes no tokens, or there is no tokenizer.
    """
    module, config = model.module, model.module.config
    if module.main_input_name != "input_ids":
        raise _takes_more_than_tokens(model, module.main_input_name)
    tokens: hf.Tokenizer | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    mask: int | None = None
    ids_alone = all(map(text_files.is_ids, files))
    if not ids_alone:
        made = _load_tokenizer(model)
        tokens, (before, after) = _plain_tokenizer(model, made), _special_tokens(made)
        mask = made.mask_token_id
    elif (model.source.path / "tokenizer_config.json").is_file():
        # Rows are used as they are: of the tokenizer only the mask is asked.
        with contextlib.suppress(ValueError):
            mask = _load_tokenizer(model).mask_token_id
    task = _task(model, mask)
    # T5 begins with padding, and its configuration may leave that unsaid.
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(config, "pad_token_id", None) or 0
    return TextReader(
        tokenizer=tokens,
        before=before,
        after=after,
        mask=mask,
        vocab_size=_vocab_size(model),
        longest=_longest(module),
        task=task,
        start=start,
    )


def _vocab_size(model: TorchModel) -> int:
    try:
        size: int = model.module.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError) as failure:
        # CLIP has a tower for texts, whose embeddings are not the model's.
        raise _takes_more_than_tokens(model, "input_ids and more") from failure
    return size


def _takes_more_than_tokens(model: TorchModel, names: str) -> ValueError:
    return ValueError(
        f"texts are for models that take tokens alone, but {model.class_name} takes "
        f"{names}; give a folder of pictures or of wav files, or its inputs as .npz"
    )


def _task(model: TorchModel, mask: int | None) -> str:
    if getattr(model.module.config, "is_encoder_decoder", False):
        return "decoder"
    # By the names that transformers gives to classes, which are its own convention.
    if model.class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    is_masked = model.class_name.endswith("ForMaskedLM") and mask is not None
    return "masked" if is_masked else "other"


def _load_tokenizer(model: TorchModel) -> Any:
    loader = transformers.AutoTokenizer
    return load_reader(loader, model, "a text", "tokenizer", "token ids as .npy")


def _plain_tokenizer(model: TorchModel, made: Any) -> hf.Tokenizer:
    """The tokenizer as texts are read with it here: without special tokens."""
    backend: Any = getattr(made, "backend_tokenizer", None)
    if not hasattr(backend, "encode"):
        raise ValueError(
            f"texts are read with the package tokenizers, but {type(made).__name__} of "
            "transformers is not made of it; give token ids as .npy"
        )
    # A sequence is made of pieces of a long text, which is not cut or padded.
    backend.no_truncation()
    backend.no_padding()
    return hf.Tokenizer(tokens=backend, bos=None, eos=(), begins=False)


def _special_tokens(made: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a tokenizer puts before and behind a text."""
    plain = list(made("a a", add_special_tokens=False)["input_ids"])
    framed = list(made("a a")["input_ids"])
    # Where the words stand, in what the tokenizer makes of them.
    for start in range(len(framed) - len(plain) + 1):
        end = start + len(plain)
        if framed[start:end] == plain:
            return tuple(framed[:start]), tuple(framed[end:])
    return (), ()


def _longest(module: Any) -> int | None:
    """Tokens of the longest sequence that a module takes, or None."""
    lengths = [getattr(module.config, name, None) for name in _CONTEXTS]
    longest = min((n for n in lengths if isinstance(n, int) and n > 0), default=None)
    # RoBERTa numbers its positions from behind the padding.
    offsets = [
        part.padding_idx + 1
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Embedding)
        and name.endswith("position_embeddings")
        and part.padding_idx is not None
    ]
    return longest if longest is None else longest - max(offsets, default=0)
