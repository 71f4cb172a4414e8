"""Phi-3-vision at its published size on 8 devices, compiled and never run.

`python -m benchmarks.vision_memory` compiles a training step of the 4.15 B parameters
for 8 CPU devices, ahead of time and without weights, and tells for each mesh and each
way to hold the averages what XLA reports of one device: bytes of what the step is given
(parameters, moments, averages, batch), and of its temporary memory.
"""

import dataclasses
import itertools
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxprune as jp
from benchmarks import measure
from experiments.harness import device_mesh
from jaxprune.lm.models.decoder.model import cross_entropy
from jaxprune.lm.models.hf import vision_config
from jaxprune.lm.models.phi3_vision import Phi3Vision, Phi3VisionConfig, unused

# As published, but for the factors of the long rope, which change no shape.
PUBLISHED: dict[str, Any] = {
    "model_type": "phi3_v",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 131072,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0] * 48,
        "long_factor": [1.0] * 48,
    },
}

Storage = Literal["none", "float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles training steps of the published size.

    Attributes:
      meshes: how 8 devices share the work.
      storages: how averages are held; "none" tracks nothing.
      lora: rank of each matrix's change; trained in full if left out.
      dtype: dtype of the parameters, and so of Adam's moments.
      batch: pictures in a batch, one crop and the global view each.
      time: tokens of a sequence, at least 320.
      layers: number of layers of the decoder; fewer compile sooner.
    """

    meshes: tuple[str, ...] = ("fsdp=8", "fsdp=2,model=4")
    storages: tuple[Storage, ...] = ("none", "float32", "bfloat16", "int8")
    lora: int | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch: int = 8
    time: int = 512
    layers: int = 32


def main(config: Config) -> None:
    """Prints one JSON line, in it a row for each mesh and storage."""
    rows = []
    shape = vision_config({**PUBLISHED, "num_hidden_layers": config.layers})
    shape = shape.with_dtype("bfloat16")
    cells = list(itertools.product(config.meshes, config.storages))
    for mesh, storage in measure.progress(cells, "compiling", "cell"):
        rows.append(compiled(config, shape, mesh, storage))
    measure.report("vision_memory", config=dataclasses.asdict(config), rows=rows)


def compiled(
    config: Config, shape: Phi3VisionConfig, mesh_text: str, storage: Storage
) -> dict[str, Any]:
    """One step, compiled: gigabytes of a device."""
    mesh = device_mesh.make_mesh(mesh_text, config.batch)
    assert mesh is not None
    # Shapes of the 4.15 billion parameters, no arrays.
    model = nnx.eval_shape(lambda: Phi3Vision(shape, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model, nnx.Param)
    places = device_mesh.shardings(state, mesh)
    params = _placed(state, places, jnp.dtype(config.dtype))
    optimizer = _optimizer(config, shape, storage)
    state_shardings = jp.contrib.state_shardings(optimizer, params)
    opt_state = _placed(jax.eval_shape(optimizer.init, params), state_shardings)
    split = device_mesh.of_batch(mesh)
    size, views = shape.tower.image, 2
    tokens = _array((config.batch, config.time), jnp.int32, split)
    pixels = _array((config.batch, views, size, size, 3), jnp.float32, split)

    def step(params: Any, state: Any, tokens: Any, sources: Any, pixels: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params)
            flat = pixels.reshape(-1, size, size, 3)  # (batch * views, size, size, 3)
            x = model.embed(tokens, flat, sources)
            states, _ = model.decoder.states(x)
            return cross_entropy(model.decoder, states, tokens).mean()

        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    program = jax.jit(
        step, donate_argnums=(0, 1), out_shardings=(places, state_shardings)
    )
    # Tokens stand for the sources too: both are (batch, time) int32.
    executable = program.lower(params, opt_state, tokens, tokens, pixels).compile()
    memory = executable.memory_analysis()
    return {
        "mesh": mesh_text,
        "storage": storage,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "compile_seconds": time.perf_counter() - start,
    }


def _optimizer(
    config: Config, shape: Phi3VisionConfig, storage: Storage
) -> optax.GradientTransformation:
    """AdamW, in full or by LoRA, and a tracker behind it if there is a storage."""
    parts: list[Any] = [optax.adamw(1e-5)]
    if config.lora is not None:
        targets = jp.tree.excluding(*unused(shape), "separator", "row_end")
        parts = [jp.contrib.lora(*parts, config.lora, targets=targets)]
    if storage != "none":
        parts.append(jp.track_importance(storage=storage))
    return optax.chain(*parts)


def _placed(tree: Any, places: Any, dtype: Any = None) -> Any:
    """The shapes at their places, all of one dtype or of their own."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype if dtype is None else dtype, sharding=place
        ),
        tree,
        places,
    )


def _array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    # The batch is split, all axes behind it are whole.
    spec = PartitionSpec(*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    place = NamedSharding(sharding.mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


if __name__ == "__main__":
    main(tyro.cli(Config))
