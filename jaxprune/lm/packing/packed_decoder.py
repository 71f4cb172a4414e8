"""A decoder whose matrices are read packed, in the place of a `Decoder`.

`generate`, `measure_perplexity` and `measure_speed` run it as they run a `Decoder`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.arrays import tree
from jaxprune.lm.checkpoints import compact_sizes
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.models.decoder.cache import Cache, empty_cache
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.packing.packed_tensor import packed_tensor
from jaxprune.sparse.pack import PackResult, Values, pack
from jaxprune.sparse.packed_matrix import PackedMatrix, stack_packed
from jaxprune.sparse.stored_matrix import StoredMatrix


class PackedDecoder(nnx.Module):
    """A decoder of packed parameters, from `pack_decoder`."""

    def __init__(self, packed: PackResult, config: DecoderConfig):
        """Keeps the packed function and its arrays.

        Args:
          packed: what `jp.pack` made of `decoder_function`.
          config: shape of the model.
        """
        self.config = config
        # Flat, since a parameter of NNX is one array: a packed matrix has several.
        arrays, self._structure = jax.tree.flatten(packed.params)
        self.arrays = nnx.List([nnx.Param(array) for array in arrays])
        self._fn = packed.fn

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time w"]:
        """The residual stream before the first layer, as of a `Decoder`."""
        return self._run(tokens=tokens)

    def states(
        self, x: Float[Array, "batch time w"], *, cache: Cache | None = None
    ) -> tuple[Float[Array, "batch time w"], Cache | None]:
        """The final hidden states and the longer cache, as of a `Decoder`."""
        return self._run(x=x) if cache is None else self._run(x=x, cache=cache)

    def next_logits(
        self, x: Float[Array, "batch time w"], cache: Cache | None = None
    ) -> tuple[Float[Array, "batch vocab"], Cache | None]:
        """Logits after the last of embedded tokens, and the longer cache."""
        x, cache = self.states(x, cache=cache)  # (batch, time, w)
        return self.logits(x[:, -1]), cache

    def logits(self, x: Float[Array, "... w"]) -> Float[Array, "... vocab"]:
        """Float32 logits of final hidden states."""
        return self._run(states=x)

    def init_cache(self, batch: int, size: int | None = None) -> Cache:
        """An empty cache for at most, and by default, `context` tokens."""
        config = self.config
        heads = [config.kv_heads] * config.layers
        return empty_cache(config, batch, size, heads, config.head_dim)

    def _run(self, **batch: Any) -> Any:
        arrays = [array[...] for array in self.arrays]
        return self._fn(jax.tree.unflatten(self._structure, arrays), batch)


class PackedModel(NamedTuple):
    """A packed language model.

    Attributes:
      decoder: the model itself.
      leaves: leaf name to what stands in its place: an array, a `PackedMatrix`, or
        several.
      report: report of `jp.pack`.
    """

    decoder: PackedDecoder
    leaves: dict[str, Any]
    report: dict[str, Any]


def decoder_function(graphdef: Any) -> Any:
    """The parts of a decoder as one function of parameters and a batch.

    Args:
      graphdef: graph definition of a `Decoder`.

    Returns:
      Function of parameters and a dict: "text" gives logits, "tokens" what they are
      embedded as, "x" (and "cache") the states, "states" the logits.
    """

    # One function, so that all parts share the packed matrices of one trace.
    def run(params: Any, batch: dict[str, Any]) -> Any:
        model = nnx.merge(graphdef, params)
        if "text" in batch:
            return model(batch["text"])
        if "tokens" in batch:
            return model.embed(batch["tokens"])
        if "states" in batch:
            return model.logits(batch["states"])
        return model.states(batch["x"], cache=batch.get("cache"))

    return run


def pack_decoder(
    model: LoadedModel,
    source: CheckpointDir,
    *,
    values: Values | None = None,
    group: int = 128,
) -> PackedModel:
    """A language model with its matrices packed, leaf by leaf.

    Matrices without zeros are stored whole. What lies packed in a compact file, or on
    levels in a directory, is packed as it is.

    Args:
      model: model whose parameters are still in its files.
      source: directory or compact file that it was opened from.
      values: encoding of the kept values; as they are stored if None.
      group: number of inputs that share a scale, where `values` rounds to levels.

    Returns:
      The decoder, and what was packed.

    Raises:
      Damaged: a compact file is not what its contents say.
    """
    grid = compact_sizes.provenance_grid(source)
    named = tree.named_leaves(model.params)
    structure: Any = jax.tree.structure(model.params)
    leaves = [
        _stored_leaf(leaf, source, model.names[name], grid)
        for name, leaf in named.items()
    ]
    # Stored whole, a matrix without zeros is still one that the kernels multiply.
    packed = pack(
        decoder_function(model.graphdef),
        jax.tree.unflatten(structure, leaves),
        {"text": jax.ShapeDtypeStruct((1, 1), jnp.int32)},
        values=values,
        group=group,
        dense=True,
    )
    decoder = PackedDecoder(packed, model.config)
    in_place = structure.flatten_up_to(packed.params)
    return PackedModel(decoder, dict(zip(named, in_place, strict=True)), packed.report)


def _stored_leaf(leaf: Any, source: CheckpointDir, tensor: Any, grid: Any) -> Any:
    """A lazy leaf that can be packed as its file has it."""
    if leaf.ndim != (3 if tensor.experts else 2):
        return leaf

    def packed(transposed: bool) -> PackedMatrix | None:
        # A tensor may be the leaf transposed, and the matrix either of both.
        matrices = [
            packed_tensor(
                source,
                name,
                leaf.dtype,
                transposed=transposed != tensor.transposed,
                grid=grid,
            )
            for name in tensor.names
        ]
        return stack_packed(matrices) if tensor.experts else matrices[0]

    return StoredMatrix(leaf.shape, leaf.dtype, leaf.read, leaf.sharding, packed=packed)
