"""Ours: whole neurons, heads and layers out of a checkpoint, the rest updated.

`python -m benchmarks.jax_shrinking MODEL OUT --ffn 0.25 --calibration TOKENS.npy`
writes a smaller Hugging Face directory, and one JSON line. Layers go first, by the
search of `jaxprune shrink`; then neurons and heads by `jp.shrink` with batches. Where
transformers would not read so many heads, the directory keeps its size and has zeros
for what was removed, which computes the same.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx

import jaxprune as jp
from benchmarks import measure
from jaxprune.files.safetensors_file import read_json
from jaxprune.lm.models import hf
from jaxprune.lm.shrinking import layer_search


@dataclasses.dataclass(frozen=True)
class Config:
    """Removes units of a causal language model in float32 and prints one JSON line.

    Attributes:
      model: a Hugging Face directory.
      out: the directory to write.
      calibration: token ids, int32 (sequences, length), `.npy`.
      ffn: the share of each MLP's neurons to remove.
      heads: the share of the query heads, where all share one key head.
      drop: how many layers to remove.
      draw: which `sequences` of the file: 0 for the first so many, 1 for the next.
      sequences: how many to calibrate on.
      searched: sequences of the draw that the search of layers looks at.
      batch: sequences that the model sees at once.
      relative: whether each token is divided by the size of its activations.
    """

    model: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    calibration: Path
    ffn: float = 0.0
    heads: float = 0.0
    drop: int = 0
    draw: int = 0
    sequences: int = 32
    searched: int = 4
    batch: int = 1
    relative: bool = True


def main(config: Config) -> None:
    """Loads, removes, writes."""
    start = config.draw * config.sequences  # draws do not overlap
    ids = np.load(config.calibration)[start : start + config.sequences]
    loaded = hf.load(config.model, dtype="float32")
    started = time.perf_counter()
    state = nnx.state(loaded.model, nnx.Param)
    kept = kept_layers(loaded.config, state, ids, config)
    # Layers first: neurons are then chosen for the inputs that the remaining layers
    # see.
    shape, params = hf.keep_layers(loaded.config, state, kept)
    rows: list[Any] = []
    zeros = False
    if config.ffn or config.heads:
        result = narrower(shape, params, ids, config)
        params, rows = result.params, result.report["weights"]
        heads = hf.resized(shape, params).heads
        source = read_json(config.model / "config.json")
        if zeros := heads not in hf.heads_that_fit(source, shape):
            params = at_the_old_size(result)
    seconds = time.perf_counter() - started
    hf.write_smaller(config.model, config.out, params, loaded.names, kept=kept)
    settings = {k: str(v) for k, v in dataclasses.asdict(config).items()}
    measure.report(
        "jax_shrinking",
        config=settings,
        prune_seconds=seconds,
        kept=kept,
        rows=rows,
        zeros_for_what_went=zeros,
    )


def kept_layers(shape: Any, params: Any, ids: np.ndarray, config: Config) -> list[int]:
    """The layers that stay: searched on some of the sequences."""
    if not config.drop:
        return list(range(shape.layers))
    graphdef, _ = nnx.split(hf.abstract(shape), nnx.Param)
    few, layers = ids[: config.searched], shape.layers - config.drop
    return layer_search.search_layers(
        graphdef, params, few, layers, batch=config.batch
    ).kept


def narrower(
    shape: Any, params: Any, ids: np.ndarray, config: Config
) -> jp.ShrinkResult:
    """The model with fewer neurons and heads."""
    graphdef, _ = nnx.split(hf.abstract(shape), nnx.Param)

    def states(params: Any, ids: Any) -> Any:
        model = nnx.merge(graphdef, params)
        return model.states(model.embed(ids))[0]  # what the head would be given

    shares = {"layers/*/mlp/*": config.ffn, "layers/*/attention/*": config.heads}
    batches = [ids[i : i + config.batch] for i in range(0, len(ids), config.batch)]
    return jp.shrink(
        states,
        params,
        batches[0],
        sparsity=shares,
        batches=batches,
        relative=config.relative,
    )


def at_the_old_size(result: jp.ShrinkResult) -> Any:
    """The smaller parameters among zeros for what was removed."""

    def whole(name: str, leaf: Any) -> np.ndarray:
        cut = result.fn.cuts[name]
        (kept,) = cut.kept  # of leaves that are not stacked
        new = np.zeros(cut.before, leaf.dtype)  # of the size before
        places = zip(kept, cut.before, strict=True)
        new[np.ix_(*(range(n) if units is None else units for units, n in places))] = (
            leaf
        )
        return new

    smaller = jp.tree.named_leaves(result.params)
    leaves = [whole(name, leaf) for name, leaf in smaller.items()]
    return jax.tree.unflatten(jax.tree.structure(result.params), leaves)


if __name__ == "__main__":
    main(tyro.cli(Config))
