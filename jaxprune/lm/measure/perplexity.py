"""Perplexity: exp of the mean loss of each token, in windows of a context and stride.

Each window moves on by the stride, and only the tokens that no earlier window predicted
count, so that every token of the text counts once (without BOS all but the first one).
A window begins with BOS where the model wants that; the model does not see the tokens
before the window. Losses are float32, their sum is float64.
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
from jaxprune.lm.models.decoder.model import Decoder, loss_per_token
from jaxprune.lm.texts.texts import AnyText, Text


class Windows(NamedTuple):
    """What is evaluated.

    Attributes:
      tokens: int32 (windows, context); all but the first of a window are predicted.
      counted: bool (windows, context - 1), which predictions count.
      facts: JSON-able: context, stride, bos.
    """

    tokens: Int[np.ndarray, "windows context"]
    counted: Bool[np.ndarray, "windows context-1"]
    facts: dict[str, Any]


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
      tokens: (tokens,).
      context: tokens of a window, BOS included, at least 2.
      stride: how far each window moves on, from 1 to context. A window predicts
        context - 1 tokens: this is the stride if left out, and the most that is used.
      bos: what each window begins with, or None; then the first token of the text is
        context only.
      limit: at most so many windows, from the beginning.

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
    reach = context - 1
    stride = reach if stride is None else stride
    if limit is not None and limit < 1:
        raise ValueError(f"windows need a limit of at least 1, got {limit}")
    if context < 2 or not 1 <= stride <= context:
        raise ValueError(
            f"windows need context >= 2 and 1 <= stride <= context, got context "
            f"{context} and stride {stride}"
        )
    stride = min(stride, reach)
    first = 0 if bos is not None else 1
    if tokens.size <= first:
        raise ValueError(
            f"a text must have a token to predict, got {tokens.size} tokens; give a "
            "longer text"
        )
    number = 1 + max(0, math.ceil((tokens.size - first - reach) / stride))
    starts = first + stride * np.arange(min(number, limit or number))
    # (windows, context - 1): the place in the text of each predicted token.
    place = starts[:, None] + np.arange(reach)[None, :]
    # (windows,): the first place that no window before has predicted.
    done = np.where(np.arange(len(starts)) > 0, starts - stride + reach, 0)
    counted = (place >= done[:, None]) & (place < tokens.size)
    last = tokens.size - 1
    if bos is None:
        before = tokens[np.minimum(starts - 1, last)]
    else:
        before = np.full(len(starts), bos)
    whole = np.concatenate([before[:, None], tokens[np.minimum(place, last)]], axis=1)
    facts = {"context": context, "stride": stride, "bos": bos is not None}
    return Windows(whole.astype(np.int32), counted, facts)


def windows(
    text: AnyText,
    *,
    context: int,
    stride: int | None = None,
    bos: int | None = None,
    limit: int | None = None,
    longest: int,
) -> Windows:
    """The windows of a text's file, or the rows of `.npy` as they are.

    Args:
      text: the file.
      context: as for `slide`.
      stride: as for `slide`.
      bos: as for `slide`.
      limit: at most so many windows or rows.
      longest: the model's context.

    Returns:
      The windows.

    Raises:
      ValueError: they do not fit the text or the model.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"windows need a limit of at least 1, got {limit}")
    if isinstance(text, Text) and text.is_rows:
        rows = text.tokens[:limit].astype(np.int32)
        counted = np.ones((len(rows), rows.shape[1] - 1), bool)
        facts = {"context": rows.shape[1], "stride": None, "bos": None}
        found = Windows(rows, counted, facts)
    else:
        # One window more than is wanted, so that what is seen is that of the whole.
        some = None if limit is None else (limit + 1) * context + 1
        try:
            found = slide(
                text.first(some), context=context, stride=stride, bos=bos, limit=limit
            )
        except ValueError as error:
            raise ValueError(f"'{text.path}': {error}") from None
    if (size := found.tokens.shape[1] - 1) > longest:
        raise ValueError(
            f"the model sees at most {longest} tokens, but a window of '{text.path}' "
            f"has {size} before its last; give a context of {longest} or less"
        )
    return found


def measure(
    model: Decoder,
    seen: Windows,
    *,
    batch: int = 4,
    tick: Callable[[int], Any] = lambda number: None,
) -> dict[str, Any]:
    """The perplexity of a model.

    Args:
      model: all its parameters in memory.
      seen: what it is evaluated on.
      batch: windows at a time; one program is compiled.
      tick: called after each batch with the number of its windows.

    Returns:
      "perplexity" and "nats" a token (None where they are not finite), "tokens" and
      "windows" that count.

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
      >>> found = measure(model, slide(np.arange(60), context=8))
      >>> found["tokens"], round(found["perplexity"])  # untrained: one in vocab_size
      (59, 65)
    """
    graphdef, params = nnx.split(model)
    number = len(seen.tokens)
    if min(batch, number) < 1:
        raise ValueError(
            "measure needs at least one window and a batch of at least 1, got "
            f"{number} and {batch}"
        )
    batch = min(batch, number)
    total = 0.0
    for start in range(0, number, batch):
        rows = np.arange(start, start + batch)
        # (batch, context): the last batch is filled up, so that one program serves all.
        tokens = seen.tokens[np.minimum(rows, number - 1)]
        found = processes.fetch(_losses(graphdef, params, tokens))
        losses = np.asarray(found, np.float64)
        own = min(batch, number - start)
        total += losses[:own][seen.counted[start : start + own]].sum()
        tick(own)
    count = int(seen.counted.sum())
    nats = total / count
    finite = math.isfinite(nats)
    return {
        "perplexity": math.exp(nats) if finite and nats < 700 else None,
        "nats": nats if finite else None,
        "tokens": count,
        "windows": number,
    }


def by_frequency(seen: Windows) -> float:
    """The perplexity of guessing each token by how often it occurs, context unseen.

    exp(H + (K - 1) / N): H is the entropy of the N counted tokens' frequencies, and the
    second term is what it is too low for K frequencies having been taken from the same
    N tokens.

    Args:
      seen: what is evaluated.

    Returns:
      A perplexity that a model which knows the language stays well under.
    """
    tokens = seen.tokens[:, 1:][seen.counted]  # (N,)
    counts = np.unique(tokens, return_counts=True)[1]
    share = counts / counts.sum()
    entropy = -(share * np.log(share)).sum()
    return float(np.exp(entropy + (len(counts) - 1) / counts.sum()))


def is_sane(result: dict[str, Any], frequency: float, vocab_size: int) -> bool:
    """Whether a perplexity is under guessing by frequency and uniform guessing."""
    found = result["perplexity"]
    return found is not None and found < min(frequency, vocab_size)


@functools.partial(jax.jit, static_argnames="graphdef")
def _losses(
    graphdef: Any, params: Any, tokens: Int[jax.Array, "batch context"]
) -> Float[jax.Array, "batch context-1"]:
    model = nnx.merge(graphdef, params)
    return loss_per_token(model, tokens[:, :-1], tokens[:, 1:])
