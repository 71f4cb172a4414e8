"""A language model whose parameters are still in its files, until it is to run."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxprune.arrays import lazy, meshes
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.model import Decoder

AXES = ("data", "fsdp")
"""The axes of a mesh that a model runs on: its parameters are split over "fsdp"."""


class LoadedModel(NamedTuple):
    """A language model of a directory.

    Attributes:
      graphdef: graph definition of a `Decoder`, without its parameters.
      params: parameters, `nnx.State`, in memory or in their files.
      config: shape of the model.
      names: leaf name to the tensor that it came from.
      ignored: attributes of its config.json that were not looked at.
    """

    graphdef: Any
    params: Any
    config: DecoderConfig
    names: dict[str, hf.Source]
    ignored: tuple[str, ...]

    def read(self) -> "LoadedModel":
        """The same with all parameters in memory."""
        return self._replace(params=lazy.loaded(self.params))

    def decoder(self) -> Decoder:
        """The model itself."""
        return nnx.merge(self.graphdef, self.params)

    def reshaped(self, config: DecoderConfig, params: Any) -> "LoadedModel":
        """A model of another shape, with parameters of that shape."""
        graphdef, _ = nnx.split(hf.abstract(config), nnx.Param)
        return self._replace(graphdef=graphdef, params=params, config=config)

    def with_tokens(self, kept: Int[np.ndarray, " tokens"]) -> "LoadedModel":
        """The model that knows these tokens alone; see `hf.keep_tokens`."""
        return self.reshaped(*hf.keep_tokens(self.config, self.params, kept))


def open_model(
    path: Path | CheckpointDir,
    *,
    dtype: hf.Dtype | None = None,
    compute_dtype: hf.Dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
    ignore_config: tuple[str, ...] = (),
) -> LoadedModel:
    """A language model whose parameters are still in its files, as lazy arrays.

    Args:
      path: directory of the model, or an opened one.
      dtype: dtype of parameters and products; as they are stored if None.
      compute_dtype: dtype of the products; see `hf.load`.
      mesh: devices whose axis "fsdp" each parameter is split over, or None.
      ignore_config: attributes of config.json that are read as if they were not there.

    Returns:
      The model.

    Raises:
      ValueError: the mesh divides none of its parameters.
    """
    loaded = hf.load(
        path,
        dtype=dtype,
        compute_dtype=compute_dtype,
        shardings=None if mesh is None else hf.split_over(mesh, ("fsdp",)),
        lazy=True,
        ignore_config=ignore_config,
    )
    graphdef, params = nnx.split(loaded.model, nnx.Param)
    devices = mesh.shape.get("fsdp", 1) if mesh else 1
    leaves = jax.tree.leaves(params)
    if devices > 1 and all(leaf.sharding.is_fully_replicated for leaf in leaves):
        raise ValueError(
            f"the axis fsdp={devices} of --mesh must divide an axis of a parameter, "
            "but it divides none; give another size"
        )
    return LoadedModel(graphdef, params, loaded.config, loaded.names, loaded.ignored)


def device_mesh(axes: str | None) -> jax.sharding.Mesh | None:
    """The mesh of words such as "data=2,fsdp=4", or None without any.

    Args:
      axes: sizes of the axes in `AXES`, of which one may be left out.

    Returns:
      The mesh over all devices.

    Raises:
      ValueError: the devices do not make it up.
    """
    if axes is None:
        return None
    sizes = meshes.parse_mesh(axes, AXES)
    meshes.check_devices(sizes)
    return meshes.make_mesh(sizes)
