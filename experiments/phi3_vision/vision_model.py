"""Phi-3-vision as pure functions of its parameters, and its words."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxprune as jp
from experiments.phi3_vision.model import Phi3Vision, Phi3VisionConfig, unused
from experiments.tasks.pure_model import PureModel
from jaxprune.lm.models import hf
from jaxprune.typing import Params, Prunable


def prunable(config: Phi3VisionConfig) -> Prunable:
    """The default rule less what gets no gradient, and the two separators."""
    return jp.tree.excluding(*unused(config), "separator", "row_end")


class Tokenizer(NamedTuple):
    """Text to tokens.

    Attributes:
      encode: a text to integers.
      decode: integers to a text.
      bos: the token that begins each text between pictures, or None.
    """

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    bos: int | None

    @classmethod
    def of(cls, words: hf.Tokenizer) -> "Tokenizer":
        """That of a directory; where BOS goes is said by the prompts."""
        return cls(lambda text: words.encode(text, bos=False), words.decode, words.bos)


class VisionModel(PureModel[Phi3Vision]):
    """A configuration's functions; parameters are nested dicts of arrays.

    Attributes:
      config: the model's shape.
      remat: whether the activations inside a layer are made again for the gradient.
    """

    def __init__(
        self,
        config: Phi3VisionConfig,
        *,
        start: Callable[[], Params] | None = None,
        remat: bool = False,
    ) -> None:
        """Traces the model once; makes no parameters.

        `start` makes the parameters of every seed, in place of random ones.
        """
        super().__init__(lambda rngs: Phi3Vision(config, rngs=rngs), start)
        self.config, self.remat = config, remat

    def init(self, seed: int) -> Params:
        """Those to start from, or random ones, scaled by `by_inputs`."""
        params = super().init(seed)
        return by_inputs(params) if self._start is None else params

    def states(self, params: Any, inputs: Mapping[str, jax.Array]) -> jax.Array:
        """Final hidden states (batch, time, width) of `PictureTask`'s inputs."""
        model = self.bind(params)
        batch, views = inputs["pixels"].shape[:2]
        pixels = inputs["pixels"].reshape(batch * views, *inputs["pixels"].shape[2:])
        # Each example numbers its own views; those of all lie behind each other.
        offsets = views * self.config.side**2 * jnp.arange(batch)[:, None]
        local = inputs["sources"]  # (batch, time): -1 a word, 0 and 1 separators
        sources = jnp.where(local >= 2, local + offsets, local)
        x = model.embed(inputs["tokens"], pixels, sources, remat=self.remat)
        return model.decoder.states(x, remat=self.remat)[0]


def by_inputs(params: Params) -> Params:
    """Fresh parameters, the deviation of each matrix inputs^-1/2 in place of 0.02.

    0.02 is right for the published widths. At a width of 128 the layers pass on next to
    nothing, and for hundreds of steps training learns colours and reads no digit.
    """

    def scaled(name: str, leaf: jax.Array) -> jax.Array:
        if not name.endswith(("/kernel", "/patch_embedding")):
            return leaf
        inputs = math.prod(leaf.shape[:-1])  # a patch's pixels are all inputs
        return leaf * (inputs**-0.5 / 0.02)

    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, map(scaled, jp.tree.names(params), leaves))
