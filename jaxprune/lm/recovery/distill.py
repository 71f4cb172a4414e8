"""Distillation: a model learns the next-token distribution of another one.

The loss is KL(teacher || student) at every token, both in float32. The teacher's logits
are made in the same step, a few tokens at a time, and never stored.

References:
  Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531,
  section 2: the temperature, and its square before the loss. Muralidharan et al.,
  "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), 2024,
  arXiv 2407.14679, section 3: the whole model teaches the pruned one by its logits and
  its hidden states. Of the hidden states only the final ones are used here, since every
  smaller model has them; each token's squared distance is divided by the squared norm
  of the teacher's state.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.lm.models.decoder.model import Decoder, cross_entropy, map_tokens
from jaxprune.lm.recovery.retrain import Loss


def check_vocabulary(teacher: int, student: int) -> None:
    """Refuses a teacher whose vocabulary has another size than its student's."""
    if teacher != student:
        raise ValueError(
            f"a teacher must have the vocabulary of its student, got {teacher} and "
            f"{student} tokens; distil from the model that was made smaller"
        )


def divergence(
    teacher: Decoder,
    student: Decoder,
    tokens: Int[Array, "batch time"],
    *,
    temperature: float = 1.0,
    rows: int | None = None,
) -> Float[Array, "batch time"]:
    """KL(teacher || student) of the token after each token, in nats.

    sum over v of p_v (log p_v - log q_v), times temperature squared, where p and q are
    softmax(logits / temperature) of teacher and student.

    Args:
      teacher: the model that is followed.
      student: the model that follows, of the same vocabulary.
      tokens: integers (batch, time).
      temperature: divisor of the logits; over 1 makes unlikely tokens count more.
      rows: number of tokens whose logits are held at a time; see `loss_per_token`.

    Returns:
      Float32 (batch, time).

    Raises:
      ValueError: the vocabularies differ.

    Example:
      >>> from jaxprune.lm.models.decoder.config import DecoderConfig
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=1, width=16, heads=4, kv_heads=2,
      ...     head_dim=8, mlp_width=32,
      ... )
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> float(divergence(model, model, jnp.zeros((2, 10), jnp.int32)).max())
      0.0
    """
    teacher_states, _ = teacher.states(teacher.embed(tokens))
    student_states, _ = student.states(student.embed(tokens))
    return divergence_of_states(
        teacher,
        student,
        teacher_states,
        student_states,
        temperature=temperature,
        rows=rows,
    )


def from_teacher(
    teacher: Decoder,
    *,
    temperature: float = 1.0,
    text: float = 0.0,
    hidden: float = 0.0,
) -> Loss:
    """The loss of `retrain` that follows a teacher.

    (1 - text) KL(teacher || student) + text times the cross entropy of the text +
    hidden times |t - s|^2 / |t|^2, with t and s the states that the heads of teacher
    and student read; means over all tokens.

    Args:
      teacher: the model that is followed; it is not changed.
      temperature: divisor of the logits; see `divergence`.
      text: the share of the text itself, in [0, 1].
      hidden: the weight of the states, at least 0; teacher and student then have one
        width.

    Returns:
      The loss; its arrays are the teacher's parameters.

    Raises:
      ValueError: the temperature is not positive, `text` not in [0, 1], or `hidden`
        negative.
    """
    if not (0 < temperature < math.inf and 0 <= text <= 1 and (0 <= hidden < math.inf)):
        raise ValueError(
            "distillation needs a temperature over 0, a share of the text in [0, 1] "
            f"and a weight of the states of at least 0, got temperature={temperature}, "
            f"text={text} and hidden={hidden}"
        )
    graphdef, params = nnx.split(teacher)

    def loss(student: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
        teacher = nnx.merge(graphdef, params)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (batch, length - 1)
        t, _ = teacher.states(teacher.embed(inputs))  # (batch, length - 1, width)
        # Activations of all layers would take more than the parameters.
        s, _ = student.states(student.embed(inputs), remat=True)
        value = divergence_of_states(
            teacher, student, t, s, temperature=temperature
        ).mean()
        if text:
            of_text = cross_entropy(student, s, targets).mean()
            value = (1 - text) * value + text * of_text
        return value + hidden * _distance(t, s).mean() if hidden else value

    name = f"teacher, temperature {temperature!r}, {text!r} text, {hidden!r} states"
    return Loss(name, loss, params)


def _distance(
    t: Float[Array, "batch time width"], s: Float[Array, "batch time width"]
) -> Float[Array, "batch time"]:
    """|t - s|^2 / |t|^2 of the states of teacher and student."""
    if t.shape != s.shape:
        raise ValueError(
            f"states are compared by a teacher as wide as its student, got widths "
            f"{t.shape[-1]} and {s.shape[-1]}; leave hidden at 0"
        )
    # Squares of bfloat16 lose digits.
    t, s = t.astype(jnp.float32), s.astype(jnp.float32)
    return jnp.sum((t - s) ** 2, -1) / jnp.sum(t**2, -1)


def divergence_of_states(
    teacher: Decoder,
    student: Decoder,
    teacher_states: Float[Array, "batch time width"],
    student_states: Float[Array, "batch time width"],
    *,
    temperature: float = 1.0,
    rows: int | None = None,
) -> Float[Array, "batch time"]:
    """`divergence` by what the heads of the two read, as `Decoder.states` returns it.

    Args:
      teacher: the model that is followed.
      student: the model that follows, of the same vocabulary.
      teacher_states: final hidden states of the teacher (batch, time, width).
      student_states: final hidden states of the student (batch, time, its width).
      temperature: divisor of the logits; see `divergence`.
      rows: number of tokens at a time; see `loss_per_token`.

    Returns:
      Float32 (batch, time), in nats.

    Raises:
      ValueError: the vocabularies differ.
    """
    vocab = teacher.config.vocab_size
    check_vocabulary(vocab, student.config.vocab_size)

    def kl(t: Float[Array, "batch width"], s: Float[Array, "batch width"]) -> Array:
        log_p = jax.nn.log_softmax(teacher.logits(t) / temperature)  # (batch, vocab)
        log_q = jax.nn.log_softmax(student.logits(s) / temperature)
        return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    # Two models' logits lie beside each other.
    return map_tokens(kl, (teacher_states, student_states), vocab=2 * vocab, rows=rows)
