"""nanoGPT's optimizer, its schedule, and what is tracked of the weights on the way."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import optax

import jaxprune as jp
from jaxprune.typing import Prunable

ADAMW = 2
"""Where AdamW's own state lies in the state of `optimizer(..., track=EVERYTHING)`."""
EVERYTHING = ("square", "taylor", "weight", "magnitude")
"""All that can be tracked: E[g^2] and E|w g| of the gradients, A and E|w|."""
CLIP = 1.0
"""The norm that gradients are clipped at."""


def schedule(peak: float, steps: int, warmup: int) -> optax.Schedule:
    """nanoGPT's: linear warm-up, then a cosine to a tenth of the peak."""
    # A smoke run has fewer steps than nanoGPT's warm-up.
    warmup = min(warmup, steps // 2)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, 1), peak / 10
    )


def adamw(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """nanoGPT's AdamW without its clipping; matrices alone decay."""

    def decayed(params: Any) -> Any:
        # Biases and gains of normalisations are vectors: decay would pull gains to 0.
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    return optax.adamw(learning_rate, b1=0.9, b2=0.99, weight_decay=0.1, mask=decayed)


def optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    track: Collection[str],
    trained: Callable[[str], bool] | None = None,
    watched: Callable[[str], bool] | None = None,
    rank: int | None = None,
    targets: Prunable = jp.tree.prunable,
    storage: jp.low_bit.Storage = "float32",
) -> optax.GradientTransformation:
    """nanoGPT's AdamW (clipped at norm 1; matrices alone decay), watched or not.

    Args:
      learning_rate: a number or a schedule.
      track: which averages of weights and gradients are held, of `EVERYTHING`; AdamW
        is `ADAMW`-th in any case.
      trained: which leaves are trained, by name; the others get no moments, and their
        gradients must be zero. None for all.
      watched: which leaves have averages, by name; None for all, trained or not.
      rank: rank of each target's change by LoRA, everything else frozen; None to
        train in full.
      targets: rule that says which leaves LoRA changes.
      storage: dtype that averages are held in.

    Returns:
      The transformation.
    """
    adam = adamw(learning_rate)
    clip = optax.clip_by_global_norm(CLIP)
    clipped = (clip, adam)
    if rank is not None:
        # The factors' gradients are clipped: those of the weights need not all exist.
        low_rank = jp.contrib.lora(optax.chain(clip, adam), rank, targets=targets)
        # Two entries in either case, so that AdamW's state stays the `ADAMW`-th.
        clipped = (optax.identity(), low_rank)
    elif trained is not None:
        clipped = (clip, _of(trained, adam))
    # An identity keeps the place of what is not tracked, for the same reason.
    before, after = optax.identity(), optax.identity()
    if of_gradients := [name for name in EVERYTHING[:2] if name in track]:
        # In front of the clipping: the averages are of the gradients as they are.
        before = jp.track_gradients(average=of_gradients, storage=storage)
    if of_weights := [name for name in EVERYTHING[2:] if name in track]:
        # Behind AdamW: A needs the weight after the update.
        after = jp.track_importance(average=of_weights, storage=storage)
    return optax.chain(_of(watched, before), *clipped, _of(watched, after))


def frozen(params: Any, trained: Callable[[str], bool]) -> Any:
    """The same parameters; those that are not trained, by name, get no gradient."""
    leaves, structure = jax.tree.flatten(params)
    stopped = [
        leaf if trained(name) else jax.lax.stop_gradient(leaf)
        for name, leaf in zip(jp.tree.names(params), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, stopped)


def _of(
    chosen: Callable[[str], bool] | None, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The same without a state for the leaves that are not chosen by name."""
    if chosen is None:
        return tx

    def mask(params: Any) -> Any:
        structure = jax.tree.structure(params)
        return jax.tree.unflatten(structure, map(chosen, jp.tree.names(params)))

    return optax.masked(tx, mask)
