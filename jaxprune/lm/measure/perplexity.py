"""Perplexity: exp of the mean loss of each token, in windows of a context and stride.

Each window moves on by the stride, and only the tokens that no earlier window predicted
count, so that every token of the text counts once (without BOS all but the first one).
A window begins with BOS where the model wants that; the model does not see the tokens
before the window. Losses are float32, their sum is float64.

Perplexities of two tokenizers do not compare, since their tokens are not as long. Bits
per byte do: the loss of the text in bits over the bytes of it that were predicted.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from jaxprune.arrays import processes
from jaxprune.lm.corpora.text_files import AnyText, Text
from jaxprune.lm.models.decoder.model import Decoder, loss_per_token
from jaxprune.lm.models.hf.tokenizer import Tokenizer


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"windows need a limit of at least 1, got {limit}")


class Windows(NamedTuple):
    """What is evaluated.

    Attributes:
      tokens: int32 (windows, context); all but the first of a window are predicted.
      counted: bool (windows, context - 1), which predictions count.
      facts: JSON-able: context, stride, bos.
      text: the text itself, up to the last token that counts; None of token ids.
      bytes: number of bytes in UTF-8 of the tokens that count; None of token ids.
    """

    tokens: Int[np.ndarray, "windows context"]
    counted: Bool[np.ndarray, "windows context-1"]
    facts: dict[str, Any]
    text: str | None = None
    bytes: int | None = None


def slide(
    tokens: Int[np.ndarray, " tokens"],
    *,
    context: int,
    stride: int | None = None,
    bos: int | None = None,
    limit: int | None = None,
) -> Windows:
    """The windows of a text.

    Args:
      tokens: tokens of the text, (tokens,).
      context: number of tokens of a window, BOS included, at least 2.
      stride: number of tokens that each window moves on, from 1 to context. A window
        predicts context - 1 tokens: this is the stride if left out, and the most that
        is used.
      bos: token that each window begins with, or None; then the first token of the text
        is context only.
      limit: greatest number of windows, which are taken from the beginning.

    Returns:
      The windows; what is past the end of the text repeats its last token and does not
      count.

    Raises:
      ValueError: context, stride or limit does not fit, or no token is to predict.

    Example:
      >>> import numpy as np
      >>> windows = slide(np.arange(7), context=4, stride=2, bos=None)
      >>> windows.tokens.tolist()
      [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 6]]
      >>> windows.counted.astype(int).tolist()
      [[1, 1, 1], [0, 1, 1], [0, 1, 0]]
    """
    predictions = context - 1
    stride = predictions if stride is None else stride
    _check_limit(limit)
    if context < 2 or not 1 <= stride <= context:
        raise ValueError(
            "windows need context >= 2 and 1 <= stride <= context, got context "
            f"{context} and stride {stride}"
        )
    stride = min(stride, predictions)
    first = 0 if bos is not None else 1  # the first token that is predicted
    if not tokens.size > first:
        raise ValueError(
            f"a text must have a token to predict, got {tokens.size} tokens; give a "
            "longer text"
        )
    number = 1 + max(0, math.ceil((tokens.size - first - predictions) / stride))
    starts = first + stride * np.arange(min(number, limit or number))
    # (windows, context - 1): the position in the text of each predicted token.
    position = starts[:, None] + np.arange(predictions)[None, :]
    # (windows,): the first position that no window before has predicted.
    predicted = np.where(np.arange(len(starts)) > 0, starts - stride + predictions, 0)
    counted = (position >= predicted[:, None]) & (position < tokens.size)
    last = tokens.size - 1
    if bos is None:
        before = tokens[np.minimum(starts - 1, last)]
    else:
        before = np.full(len(starts), bos)
    tokens_of_windows = np.concatenate(
        [before[:, None], tokens[np.minimum(position, last)]], axis=1
    )
    facts = {"context": context, "stride": stride, "bos": bos is not None}
    return Windows(tokens_of_windows.astype(np.int32), counted, facts)


def windows_of_text(
    text: AnyText,
    *,
    context: int,
    stride: int | None = None,
    bos: int | None = None,
    limit: int | None = None,
    longest: int,
    tokenizer: Tokenizer | None = None,
) -> Windows:
    """The windows of a text's file, or the rows of `.npy` as they are.

    Args:
      text: the file.
      context: number of tokens of a window; see `slide`, as the two below.
      stride: number of tokens that each window moves on.
      bos: token that each window begins with.
      limit: greatest number of windows or rows.
      longest: context of the model, in tokens.
      tokenizer: tokenizer that made the tokens of a text, by which its bytes are known.

    Returns:
      The windows.

    Raises:
      ValueError: they do not fit the text or the model.
    """
    _check_limit(limit)
    if isinstance(text, Text) and text.is_rows:
        rows = text.tokens[:limit].astype(np.int32)
        counted = np.ones((len(rows), rows.shape[1] - 1), bool)
        facts = {"context": rows.shape[1], "stride": None, "bos": None}
        windows = Windows(rows, counted, facts)
    else:
        # One window more than is wanted, so that what is seen is that of the whole.
        needed = None if limit is None else (limit + 1) * context + 1
        tokens = text.first(needed)
        try:
            windows = slide(
                tokens, context=context, stride=stride, bos=bos, limit=limit
            )
        except ValueError as error:
            raise ValueError(f"'{text.path}': {error}") from None
        if tokenizer is not None:
            windows = _with_text(windows, tokens, tokenizer)
    size = windows.tokens.shape[1] - 1
    if not size <= longest:
        raise ValueError(
            f"the model sees at most {longest} tokens, but a window of '{text.path}' "
            f"has {size} before its last; give a context of {longest} or less"
        )
    return windows


def _with_text(
    windows: Windows, tokens: Int[np.ndarray, " tokens"], tokenizer: Tokenizer
) -> Windows:
    """Windows with the text that their tokens stand for."""
    first = 0 if windows.facts["bos"] else 1
    # No position counts twice, and none between two that count is left out.
    last = first + int(windows.counted.sum())
    before, text = (
        # A character that the end cuts is none of the text.
        tokenizer.decode(part.tolist(), special=True).rstrip("\ufffd")
        for part in (tokens[:first], tokens[:last])
    )
    size = len(text.encode()) - len(before.encode())
    return windows._replace(text=text, bytes=size)


def retokenize_windows(windows: Windows, tokenizer: Tokenizer) -> Windows:
    """The windows of the same text as another tokenizer splits it.

    Args:
      windows: windows of a text, not of token ids.
      tokenizer: the other tokenizer, whose BOS begins a window where one did.

    Returns:
      As many windows as the tokens now need, of the same context.

    Raises:
      ValueError: the windows are of token ids, which are no text.
    """
    tokens = np.array(tokenizer.encode(windows.text or "", bos=False), np.int32)
    facts = windows.facts
    bos = tokenizer.bos if facts["bos"] else None
    context, stride = facts["context"], facts["stride"]
    again = _with_text(
        slide(tokens, context=context, stride=stride, bos=bos), tokens, tokenizer
    )
    # A token for what is unknown spells another word than the one that it stands for.
    spelled = tokenizer.decode(tokens.tolist(), special=True)
    missing = len((windows.text or "").encode()) - len(spelled.encode())
    return again._replace(bytes=(again.bytes or 0) + missing)


def measure_perplexity(
    model: Decoder,
    windows: Windows,
    *,
    batch: int = 4,
    progress: Callable[[int], Any] = lambda windows: None,
) -> dict[str, Any]:
    """The perplexity of a model.

    Args:
      model: model with all its parameters in memory.
      windows: windows that it is evaluated on.
      batch: number of windows at a time; one program is compiled.
      progress: function that is called after each batch with the number of its windows.

    Returns:
      "perplexity", "nats" a token and "bits_per_byte" (None where they are not finite,
      the last also of token ids), "tokens" and "windows" that count.

    Raises:
      ValueError: there is no window, or the batch is under 1.

    Example:
      >>> from flax import nnx
      >>> from jaxprune.lm.models.decoder.config import DecoderConfig
      >>> model = Decoder(
      ...     DecoderConfig(vocab_size=65, context=8, layers=1, width=4, heads=1,
      ...                   kv_heads=1, head_dim=4, mlp_width=4),
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> result = measure_perplexity(model, slide(np.arange(60), context=8))
      >>> result["tokens"], round(result["perplexity"])  # untrained: one in vocab_size
      (59, 65)
    """
    graphdef, params = nnx.split(model)
    number = len(windows.tokens)
    if not min(batch, number) >= 1:
        raise ValueError(
            "measure_perplexity needs at least one window and a batch of at least 1, "
            f"got {number} and {batch}"
        )
    batch = min(batch, number)
    total = 0.0
    for start in range(0, number, batch):
        rows = np.arange(start, start + batch)
        # (batch, context): the last batch is filled up, so that one program serves all.
        tokens = windows.tokens[np.minimum(rows, number - 1)]
        losses = processes.fetch(_losses(graphdef, params, tokens))
        losses = np.asarray(losses, np.float64)  # (batch, context - 1)
        size = min(batch, number - start)
        total += losses[:size][windows.counted[start : start + size]].sum()
        progress(size)
    count = int(windows.counted.sum())
    nats = total / count
    finite = math.isfinite(nats)
    return {
        "perplexity": math.exp(nats)
        if finite and nats < 700
        else None,  # exp overflows past 709
        "nats": nats if finite else None,
        "bits_per_byte": bits_per_byte(nats, count, windows.bytes) if finite else None,
        "tokens": count,
        "windows": number,
    }


def bits_per_byte(nats: float, tokens: int, size: int | None) -> float | None:
    """Bits for each byte of a text.

    Args:
      nats: mean loss of a token.
      tokens: number of tokens that count.
      size: number of their bytes; None or 0 where there are none.

    Returns:
      nats tokens / (size log 2), or None without bytes.

    Example:
      >>> bits_per_byte(math.log(256), 10, 10)  # guessing among all bytes
      8.0
    """
    return nats * tokens / (size * math.log(2)) if size else None


def unigram_perplexity(windows: Windows) -> float:
    """The perplexity of guessing each token by how often it occurs, context unseen.

    exp(H + (K - 1) / N): H is the entropy of the N counted tokens' frequencies, and the
    second term is what it is too low for K frequencies having been taken from the same
    N tokens.

    Args:
      windows: windows that are evaluated.

    Returns:
      A perplexity that a model which knows the language stays well under.
    """
    tokens = windows.tokens[:, 1:][windows.counted]  # (N,)
    counts = np.unique(tokens, return_counts=True)[1]  # (K,)
    share = counts / counts.sum()
    entropy = -(share * np.log(share)).sum()
    return float(np.exp(entropy + (len(counts) - 1) / counts.sum()))


def is_sane(result: dict[str, Any], frequency: float, vocab_size: int) -> bool:
    """Whether a perplexity is under guessing by frequency and uniform guessing."""
    perplexity = result["perplexity"]
    return perplexity is not None and perplexity < min(frequency, vocab_size)


@functools.partial(jax.jit, static_argnames="graphdef")
def _losses(
    graphdef: Any, params: Any, tokens: Int[jax.Array, "batch context"]
) -> Float[jax.Array, "batch context-1"]:
    model = nnx.merge(graphdef, params)
    return loss_per_token(model, tokens[:, :-1], tokens[:, 1:])
