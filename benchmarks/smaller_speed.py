"""A shrunk model is as fast as one that was built at its shape.

`python -m benchmarks.smaller_speed MODEL --ffn 0.5` times prefill and decode of a
decoder's body, without its head: dense, what `jp.shrink` returns, and the model class
at that shape, which is what the written checkpoint is read into. The three run in turn
in one process. One JSON line: tokens per second, medians with their spread.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx

import jaxprune as jp
from benchmarks import measure
from jaxprune.lm.models import hf


@dataclasses.dataclass(frozen=True)
class Config:
    """Times one shape of one model.

    Attributes:
      model: a Hugging Face directory.
      ffn: the share of each MLP's neurons that is gone.
      heads: the share of the query heads, where all share one key head.
      drop: how many layers are gone, the last ones.
      prefill: tokens of the prompt.
      decode: tokens that are decoded, one by one, behind the prompt.
      repeats: measured rounds.
    """

    model: Annotated[Path, tyro.conf.Positional]
    ffn: float = 0.5
    heads: float = 0.0
    drop: int = 0
    prefill: int = 512
    decode: int = 16
    repeats: int = 7


def main(config: Config) -> None:
    """Times and reports."""
    loaded = hf.load(config.model, dtype="float32")
    shape, params = loaded.config, nnx.state(loaded.model, nnx.Param)
    shape_kept, params_kept = hf.keep_layers(
        shape, params, range(shape.layers - config.drop)
    )
    cache = loaded.model.init_cache(1, config.prefill + config.decode)
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (1, config.prefill))
    ids = ids.astype(np.int32)  # (1, prefill)

    candidates: dict[str, Callable[[], Any]] = {}
    for stage, tokens in (("prefill", ids), ("decode", ids[:, :1])):
        decode = stage == "decode"
        # Prefill is bound by arithmetic, decode by reading the weights: two speeds.
        run = _decode(config.decode) if decode else _prefill
        batch = (tokens, cache if decode else None)
        candidates[f"{stage} dense"] = run(_states(shape), params, batch)
        # The cache has a pair of arrays a layer; layers that are gone have none.
        batch = (tokens, _first(cache, shape_kept.layers) if decode else None)
        small = _shrunk(config, _states(shape_kept), params_kept, batch)
        candidates[f"{stage} shrunk"] = run(small.fn, small.params, batch)
        # The very same weights under the model class of that shape: only the program
        # differs.
        built = hf.resized(shape_kept, small.params)
        candidates[f"{stage} built"] = run(_states(built), small.params, batch)
    times = measure.interleaved(candidates, config.repeats)
    counts = {"prefill": config.prefill, "decode": config.decode}
    speeds = {
        name: measure.median_and_spread([counts[name.split()[0]] / s for s in seconds])
        for name, seconds in times.items()
    }
    ratios = {
        f"{stage} shrunk to {reference}": _ratio(times, stage, reference)
        for stage in counts
        for reference in ("dense", "built")
    }
    measure.report(
        "smaller_speed",
        config={k: str(v) for k, v in dataclasses.asdict(config).items()},
        parameters={"dense": _size(params), "shrunk": _size(small.params)},
        tokens_per_second=speeds,
        times_as_fast=ratios,
    )


def _ratio(times: dict[str, list[float]], stage: str, reference: str) -> float:
    """How many times as fast as another: the median over the rounds."""
    # Ratios of one round, in which the machine was alike for both.
    pairs = zip(times[f"{stage} {reference}"], times[f"{stage} shrunk"], strict=True)
    return float(
        np.median([reference_seconds / seconds for reference_seconds, seconds in pairs])
    )


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _first(cache: Any, layers: int) -> Any:
    """The cache of the first layers."""
    return cache._replace(keys=cache.keys[:layers], values=cache.values[:layers])


def _states(shape: Any) -> Callable[[Any, Any], Any]:
    """A function of parameters and (tokens, cache): the body's states and cache."""
    graphdef, _ = nnx.split(hf.abstract(shape), nnx.Param)

    def states(params: Any, batch: Any) -> Any:
        tokens, cache = batch
        model = nnx.merge(graphdef, params)
        return model.states(model.embed(tokens), cache=cache)

    return states


def _shrunk(config: Config, fn: Any, params: Any, batch: Any) -> jp.ShrinkResult:
    shares = {}
    if config.ffn:
        shares["layers/*/mlp/*"] = config.ffn
    if config.heads:
        shares["layers/*/attention/*"] = config.heads
    return jp.shrink(fn, params, batch, jp.scores.magnitude(params), shares)


def _prefill(fn: Any, params: Any, batch: Any) -> Callable[[], Any]:
    step = jax.jit(fn)
    return lambda: step(params, batch)


def _decode(count: int) -> Callable[[Any, Any, Any], Callable[[], Any]]:
    """One token after the other, each with the cache that the last one left."""

    def run(fn: Any, params: Any, batch: Any) -> Callable[[], Any]:
        step = jax.jit(fn)

        def tokens() -> Any:
            ids, cache = batch
            for _ in range(count):
                states, cache = step(params, (ids, cache))
            return states

        return tokens

    return run


if __name__ == "__main__":
    main(tyro.cli(Config))
