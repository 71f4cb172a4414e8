"""A model of a directory, ready to run, and what its texts begin with."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
from flax import nnx

from jaxprune.arrays import lazy, meshes
from jaxprune.lm.cli.console import Console, Options
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.model import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """How a model is run.

    Attributes:
      dtype: the dtype of parameters and products; as they are stored if left out.
      mesh: devices to run on, "data=2,fsdp=4" say: each parameter is split over the
        devices of "fsdp" and repeated over those of "data". `prune` takes a batch of
        calibration on each device. The first device alone if left out.
      bos: begin each sequence of a text with the BOS token, whatever the directory
        says. If left out, the directory decides.
      no_bos: begin no sequence with it.
      ignore_config: attributes of config.json to read as if they were not there; an
        unknown one that could change what the model computes is refused otherwise.
    """

    GROUPS: ClassVar = {
        "model": ("dtype", "bos", "no_bos", "ignore_config"),
        "devices": ("mesh",),
    }

    dtype: Literal["float32", "bfloat16"] | None = None
    mesh: str | None = None
    bos: bool = False
    no_bos: bool = False
    ignore_config: tuple[str, ...] = ()


_AXES = ("data", "fsdp")


class Model(NamedTuple):
    """A loaded model.

    Attributes:
      graphdef: of a `Decoder`, without its parameters.
      params: its parameters, `nnx.State`, in memory or in their files.
      config: its shape.
      names: leaf name to where it came from.
      ignored: attributes of its config.json that were not looked at.
    """

    graphdef: Any
    params: Any
    config: DecoderConfig
    names: dict[str, hf.Source]
    ignored: tuple[str, ...]

    def read(self) -> "Model":
        """The same with all parameters in memory."""
        return self._replace(params=lazy.loaded(self.params))

    def decoder(self) -> Decoder:
        """The model itself."""
        return nnx.merge(self.graphdef, self.params)


def find(path: Path, options: ModelOptions) -> Model:
    """A model whose parameters are still in its files, as lazy arrays."""
    mesh = device_mesh(options)
    split = None if mesh is None else hf.split_over(mesh, ("fsdp",))
    loaded = hf.load(
        path,
        dtype=options.dtype,
        shardings=split,
        lazy=True,
        ignore_config=options.ignore_config,
    )
    if not isinstance(loaded.config, DecoderConfig):
        raise ValueError(
            f"the command runs language models, got '{path}', which sees pictures; "
            "jaxprune.lm.models.hf.load reads it"
        )
    graphdef, params = nnx.split(loaded.model, nnx.Param)
    _check_split(mesh, params)
    return Model(graphdef, params, loaded.config, loaded.names, loaded.ignored)


def _check_split(mesh: jax.sharding.Mesh | None, params: Any) -> None:
    size = mesh.shape.get("fsdp", 1) if mesh else 1
    leaves = jax.tree.leaves(params)
    if size > 1 and all(leaf.sharding.is_fully_replicated for leaf in leaves):
        raise ValueError(
            f"the axis fsdp={size} of --mesh must divide an axis of a parameter, but "
            "it divides none; give another size"
        )


def device_mesh(options: ModelOptions) -> jax.sharding.Mesh | None:
    """The mesh of --mesh, or None; refuses what the devices do not make up."""
    if options.mesh is None:
        return None
    axes = meshes.parse_mesh(options.mesh, _AXES)
    meshes.check_devices(axes)
    return meshes.make_mesh(axes)


def say_ignored(model: Model, console: Console) -> None:
    """Says which attributes of config.json were not looked at."""
    if model.ignored:
        console.note(f"of config.json not looked at: {', '.join(model.ignored)}")


class Beginning(NamedTuple):
    """What the sequences of a text begin with.

    Attributes:
      token: BOS, or None.
      why: in words.
    """

    token: int | None
    why: str


def beginning(
    tokenizer: hf.Tokenizer | None, options: ModelOptions, vocab_size: int
) -> Beginning:
    """Whether sequences begin with BOS; there is no tokenizer for mere token ids."""
    found = _beginning(tokenizer, options)
    if found.token is not None and not 0 <= found.token < vocab_size:
        raise ValueError(
            f"sequences would begin with {found.why}, but the model's vocabulary has "
            f"tokens from 0 to {vocab_size - 1}; repair bos_token in "
            "tokenizer_config.json or bos_token_id in config.json, or give --no-bos"
        )
    return found


def as_begun(tokenizer: hf.Tokenizer | None, begins: Beginning) -> hf.Tokenizer | None:
    """The tokenizer, which begins texts as the options say."""
    if tokenizer is None:
        return None
    return dataclasses.replace(tokenizer, begins=begins.token is not None)


def _beginning(tokenizer: hf.Tokenizer | None, options: ModelOptions) -> Beginning:
    if options.bos and options.no_bos:
        raise ValueError("--bos and --no-bos exclude each other; leave one out")
    if tokenizer is None:
        return Beginning(None, "token ids are used as they are")
    if options.no_bos:
        return Beginning(None, "no BOS, as asked for")
    if options.bos and tokenizer.bos is None:
        raise ValueError(
            "--bos needs a token that begins a text, but the model's directory names "
            "none; leave --bos out"
        )
    if options.bos:
        return Beginning(tokenizer.bos, f"BOS ({tokenizer.bos}), as asked for")
    if tokenizer.begins:
        return Beginning(tokenizer.bos, f"BOS ({tokenizer.bos}), as the directory says")
    return Beginning(None, "no BOS, as the directory says")
