"""Distillation from predictions that a teacher made once and that lie on disk.

Of each token's next-token distribution p the largest k probabilities are kept, and the
sum of all others as one more: k + 1 outcomes. The loss is the divergence of student and
teacher over these,

  sum over v in top k of p_v (log p_v - log q_v) + p_r (log p_r - log q_r),

with p_r and q_r what the teacher and the student give to all other tokens together.
Putting outcomes together lowers no divergence below zero and raises none (log sum
inequality), so it is at most KL(p || q) of the whole vocabulary, and that itself for
k = vocabulary - 1. So the teacher is not in memory while the student trains.

References:
  Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in
  LLMs", 2025, arXiv 2503.16870: a teacher's predictions are kept once; the largest
  alone, without the others' sum, give a biased teacher. Hübotter et al.,
  "Reinforcement Learning via Self-Distillation", 2026, arXiv 2601.20802: the largest of
  a teacher's probabilities with a tail, as here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxprune.lm.models.decoder.model import Decoder, map_tokens, sampled_logits
from jaxprune.lm.recovery.distill import check_vocabulary
from jaxprune.lm.recovery.retrain import Loss
from jaxprune.lm.recovery.sampled_tokens import TokenSampler
from jaxprune.posttraining import fingerprint
from jaxprune.posttraining.progress import ProgressLog


class Predictions(NamedTuple):
    """What a teacher predicts after each token of some sequences, on disk.

    Attributes:
      name: name that tells them from others, by teacher, sequences and number kept.
      vocab_size: number of tokens of the teacher's vocabulary.
      shape: number of tokens that are predicted of a sequence, length - 1, and number
        of likeliest tokens that are kept of each, k.
      places: where each sequence lies, int (sequences,): its place among the different
        ones that were predicted, -1 for none.
      batch: number of sequences of a file.
      log: directory of the files. Each has "ids", the likeliest tokens, int32
        (batch, length - 1, k), and "log_p", their log probabilities and last that of
        all other tokens together, float32 (batch, length - 1, k + 1).
    """

    name: str
    vocab_size: int
    shape: tuple[int, int]
    places: Int[np.ndarray, " sequences"]
    batch: int
    log: ProgressLog

    def rows(self, rows: Int[np.ndarray, " rows"]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log probabilities of sequences, from disk; zeros for others."""
        time, top = self.shape
        ids = np.zeros((len(rows), time, top), np.int32)
        log_p = np.zeros((len(rows), time, top + 1), np.float32)
        for i, place in enumerate(self.places[rows]):
            if place >= 0:
                file, row = divmod(int(place), self.batch)
                # Mapped for this step alone: a map holds a file open, and few may be.
                ids[i] = self.log.array(_file_name(file), "ids")[row]
                log_p[i] = self.log.array(_file_name(file), "log_p")[row]
        return ids, log_p

    def likeliest(self, row: int) -> Int[np.ndarray, "time k"]:
        """The likeliest tokens after each token of a sequence, zeros for none."""
        return self.rows(np.array([row]))[0][0]


def _file_name(file: int) -> str:
    return f"batch_{file:05d}"


def keep_predictions(
    teacher: Decoder,
    sequences: Int[np.ndarray, "sequences length"],
    directory: Path,
    *,
    top: int = 64,
    batch: int = 4,
    followed: Bool[np.ndarray, " sequences"] | None = None,
    progress: Callable[[int], Any] = lambda sequences: None,
) -> Predictions:
    """Lets a teacher predict every token of some sequences, once, to disk.

    A token takes 8 `top` + 4 bytes; equal sequences are predicted and kept once. A
    killed call goes on where it was.

    Args:
      teacher: model that is followed later.
      sequences: tokens, int32 (sequences, length).
      directory: directory of its own.
      top: number of likeliest tokens that are kept of each prediction, k; at most the
        vocabulary without one.
      batch: number of sequences that the teacher sees at once.
      followed: which sequences are predicted, the others being learned as texts; all
        if left out.
      progress: function that is called with the number of sequences that are done
        since the last call, equal ones and those that are not followed among them.

    Returns:
      The predictions, for `from_predictions`.

    Raises:
      ValueError: a number is out of range, or the directory is of another teacher,
        other sequences or another number.
    """
    count, length = sequences.shape
    if not (top >= 1 and batch >= 1 and (count >= 1) and (length >= 2)):
        raise ValueError(
            "keep_predictions needs at least one likeliest token, a batch of one, and "
            f"one sequence of 2 tokens, got top={top}, batch={batch} and {count} "
            f"sequences of {length}"
        )
    followed = np.ones(count, bool) if followed is None else followed
    distinct, inverse = np.unique(sequences[followed], axis=0, return_inverse=True)
    places = np.full(count, -1)
    places[followed] = inverse.ravel()  # (followed, 1) in NumPy 2.0.0
    graphdef, params = nnx.split(teacher)
    vocab = teacher.config.vocab_size
    top = min(top, vocab - 1)
    start = fingerprint.of_arrays([params, distinct])
    log = ProgressLog(directory, {"top": top, "batch": batch, "start": start})

    @jax.jit
    def predict(params: Any, tokens: Int[Array, "batch length"]) -> tuple[Array, Array]:
        teacher = nnx.merge(graphdef, params)
        states, _ = teacher.states(teacher.embed(tokens[:, :-1]))

        def likeliest(state: Float[Array, "batch width"]) -> tuple[Array, Array]:
            logits = teacher.logits(state)  # (batch, vocab)
            _, ids = jax.lax.top_k(logits, top)  # (batch, k)
            return ids, log_outcomes(logits, ids)

        return map_tokens(likeliest, (states,), vocab=2 * vocab)

    progress(count - int(followed.sum()))
    for file, first in enumerate(range(0, len(distinct), batch)):
        tokens = distinct[first : first + batch]
        if log.read(_file_name(file)) is None:
            # The last batch is filled up, or it would be another program.
            ids, log_p = predict(params, np.resize(tokens, (batch, length)))
            arrays = {"ids": ids, "log_p": log_p}
            arrays = {k: np.asarray(x)[: len(tokens)] for k, x in arrays.items()}
            log.write(_file_name(file), arrays, {"sequences": len(tokens)})
        progress(int(np.sum((places >= first) & (places < first + batch))))
    name = f"top {top} of {start}"
    return Predictions(name, vocab, (length - 1, top), places, batch, log)


def from_predictions(
    predictions: Predictions,
    *,
    text: float | Float[np.ndarray, " sequences"] = 0.0,
    sampler: TokenSampler | None = None,
) -> Loss:
    """The loss of `retrain` that follows what a teacher predicted.

    (1 - text) times the divergence over k + 1 outcomes (see the module) + text times
    the cross entropy of the text; means over all tokens.

    Args:
      predictions: what `keep_predictions` gave for the sequences that are trained on,
        in their order.
      text: share of the text itself, in [0, 1]: one for all sequences, or one for
        each, 1 for texts to learn and 0 for texts that the teacher wrote, say.
      sampler: what draws the tokens of each step whose logits stand for all.

    Returns:
      The loss, which reads each step's predictions from disk.

    Raises:
      ValueError: a share is not in [0, 1], there are more or fewer than sequences, or
        it is less than 1 for a sequence that was not predicted.
    """
    count = len(predictions.places)
    shares = np.asarray(text, np.float32)  # () or (sequences,)
    if not (
        shares.shape in ((), (count,)) and bool(np.all((shares >= 0) & (shares <= 1)))
    ):
        raise ValueError(
            "from_predictions needs a share of the text in [0, 1], one or one for "
            f"each of the {count} sequences, got {shares}"
        )
    shares = np.broadcast_to(shares, count)
    missing = int(np.sum((predictions.places < 0) & (shares < 1)))
    if missing:
        raise ValueError(
            "from_predictions needs what the teacher predicts of each sequence that "
            f"is not learned as text alone, but {missing} were not predicted; give "
            "keep_predictions followed = text < 1"
        )

    vocab = predictions.vocab_size

    def read(rows: Int[np.ndarray, " rows"]) -> Any:
        sample = None if sampler is None else sampler.draw(rows)
        return sample, *predictions.rows(rows), shares[rows]

    def loss(student: Decoder, arrays: Any, tokens: jax.Array) -> jax.Array:
        # (batch, length - 1, k), (batch, length - 1, k + 1) and (batch,)
        sample, ids, log_p, share = arrays
        check_vocabulary(vocab, student.config.vocab_size)
        states, _ = student.states(student.embed(tokens[:, :-1]), remat=True)
        targets, size = tokens[:, 1:], vocab
        if sample is not None:
            size = len(sample.ids)
            ids, targets = (jnp.searchsorted(sample.ids, x) for x in (ids, targets))

        def losses(
            state: Float[Array, "batch width"],
            target: Int[Array, "batch"],
            ids: Int[Array, "batch k"],
            log_p: Float[Array, "batch outcomes"],
        ) -> tuple[Array, Array]:
            logits = sampled_logits(student, state, sample)  # (batch, vocab)
            log_q = log_outcomes(logits, ids)  # (batch, k + 1)
            logit = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
            return (
                jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1),
                jax.nn.logsumexp(logits, axis=-1) - logit,
            )

        # Logits lie beside those without the likeliest.
        by_token = (states, targets, ids, log_p)
        divergence, of_text = map_tokens(losses, by_token, vocab=2 * size)
        if not shares.any():
            return divergence.mean()
        return ((1 - share) * divergence.mean(1) + share * of_text.mean(1)).mean()

    mixed = fingerprint.of_arrays([shares])
    name = f"predictions, {predictions.name}, text {mixed}"
    if sampler is not None:
        name += f", {sampler.name}"
    return Loss(name, loss, read=read)


def log_outcomes(
    logits: Float[Array, "batch vocab"], ids: Int[Array, "batch k"]
) -> Float[Array, "batch outcomes"]:
    """Log probabilities of some tokens and, last, of all others together.

    Args:
      logits: float32 (batch, vocab).
      ids: different tokens of each row, fewer than the vocabulary, (batch, k).

    Returns:
      float32 (batch, k + 1); exp of a row sums to one.

    Example:
      >>> p = jnp.array([[0.5, 0.3, 0.1, 0.1]])
      >>> outcomes = jnp.exp(log_outcomes(jnp.log(p), jnp.array([[1, 0]])))
      >>> (10 * outcomes).round().tolist()  # tenths
      [[3.0, 5.0, 2.0]]
    """
    rows = jnp.arange(len(ids))[:, None]  # (batch, 1)
    # One minus the sum of the likeliest would lose its digits where that is near one.
    others = logits.at[rows, ids].set(-jnp.inf)  # (batch, vocab)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)  # (batch, 1)
    likeliest = jnp.take_along_axis(logits, ids, axis=-1)  # (batch, k)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # (batch, 1)
    return jnp.concatenate([likeliest, rest], axis=-1) - total
