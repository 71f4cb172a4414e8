"""Zeros make decoding faster: packed matrices and whole decode, candidates in turn.

    python -m benchmarks.packed matrices --vectors 1
    python -m benchmarks.packed decode --model smollm2 --batch 1

Matrices of 4096 x 11008 beyond the last-level cache, and decoding with the shapes of
SmolLM2 135M, Gemma 3 270M or the GPT of the experiments (random weights, masks at
random, the head stored whole), in one process: XLA in float32 and bfloat16, the dense
kernel of the same encoding, which is the control, and packed weights. torch's products
where it is installed, and llama.cpp of GGUF files that are named. One JSON line:
medians with their spread, ratios of medians, the path of the kernels and the load.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import jaxprune as jp
from benchmarks import measure
from experiments.datasets import Batches, load
from experiments.gpt.config import preset
from experiments.gpt.model import GPT
from experiments.harness import training
from experiments.tasks.language_model import LanguageModel
from jaxprune.lm.models.decoder import rope
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.sparse import cpu_kernels
from jaxprune.sparse.matmul import matmul
from jaxprune.sparse.packed_matrix import pack_matrix

ZEROS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
SMOLLM2 = DecoderConfig(
    vocab_size=49152,
    context=2048,
    layers=30,
    width=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp_width=1536,
    norm="rms",
    ropes=(rope.linear(100000.0, 64),),
    tie_weights=True,
)
# At so few tokens its local layers see as far as its global ones.
GEMMA3 = DecoderConfig(
    vocab_size=262144,
    context=2048,
    layers=18,
    width=640,
    heads=4,
    kv_heads=1,
    head_dim=256,
    mlp_width=2048,
    activation="gelu_tanh",
    norm="rms_plus_one",
    qk_norm="head",
    block="sandwich",
    ropes=(rope.linear(1000000.0, 256),),
    embedding_scale=640**0.5,
    tie_weights=True,
)
MODELS: dict[str, tuple[Any, Any]] = {
    "smollm2": (Decoder, SMOLLM2),
    "gemma3": (Decoder, GEMMA3),
    "gpt": (GPT, preset("cpu", vocab_size=78)),
}
"""Name to class and shape."""
_CACHE = 64  # positions that a cache has room for


@dataclasses.dataclass(frozen=True)
class Config:
    """Times packed matrices or whole decode.

    Attributes:
      what: what is timed.
      encodings: how values are stored.
      zeros: shares of zeros.
      vectors: number of vectors of a product.
      shape: (out, in) of a matrix; of each candidate there are `copies`.
      copies: matrices of a candidate that are multiplied in turn.
      model: name of a shape in `MODELS`.
      batch: sequences that are decoded together.
      steps: tokens that are decoded in a measured call.
      train: steps of training in which the GPT loses its weights; 0 takes masks at
        random. It needs the model "gpt" whole.
      layers: number of layers of the decoder; None for those of the shape.
      llama: GGUF files that llama.cpp decodes with too, one sequence.
      repeats: number of measured rounds.
      clock: "wall", or "cpu" for what all threads of the process worked, where other
        programs have the processor too.
    """

    what: Annotated[Literal["matrices", "decode"], tyro.conf.Positional]
    encodings: tuple[str, ...] = ("bfloat16", "int8", "int4")
    zeros: tuple[float, ...] = ZEROS
    vectors: int = 1
    shape: tuple[int, int] = (4096, 11008)
    copies: int = 3
    model: Literal["smollm2", "gemma3", "gpt"] = "smollm2"
    batch: int = 1
    steps: int = 8
    train: int = 0
    layers: int | None = None
    llama: tuple[Path, ...] = ()
    repeats: int = 7
    clock: measure.Clock = "wall"


def main(config: Config) -> None:
    """Times the candidates in turn and reports.

    Raises:
      ValueError: another model, or a part of it, is to be trained.
    """
    if config.train and (config.model != "gpt" or config.layers):
        raise ValueError("--train is for all layers of --model gpt")
    before = os.getloadavg()
    make = _matrices if config.what == "matrices" else _decoders
    candidates, sizes = make(config)
    timings = measure.interleaved(
        candidates, config.repeats, clock=measure.CLOCKS[config.clock]
    )
    times = {name: measure.median_and_spread(t) for name, t in timings.items()}
    measure.report(
        f"packed_{config.what}",
        config=json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        path=str(cpu_kernels.path()),
        milliseconds={
            name: {key: 1e3 * t[key] for key in ("median", "min", "q1", "q3")}
            for name, t in times.items()
        },
        # Of all sequences together.
        tokens_per_second={
            name: config.steps * config.batch / t["median"]
            for name, t in times.items()
            if config.what == "decode"
        },
        bytes=sizes,
        # Of the dense kernel of the same encoding, and of XLA in float32.
        ratios={
            name: {
                reference: times[reference]["median"] / t["median"]
                for reference in (f"{name.split()[0]} dense", "XLA float32")
            }
            for name, t in times.items()
            if name.split()[0] in config.encodings
        },
        load={"before": before, "after": os.getloadavg()},
    )


def zeros_of(encoding: str, config: Config) -> tuple[float, ...]:
    """The shares of zeros that are timed; int4 is stored whole."""
    return (0.0,) if encoding == "int4" else (0.0, *config.zeros)


Candidates = tuple[dict[str, Callable[[], Any]], dict[str, int]]
"""Name to what is timed, and to the bytes that it reads."""


def _matrices(config: Config) -> Candidates:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=config.shape).astype(np.float32)  # (out, in)
    uniform = rng.random(config.shape, np.float32)
    x = rng.normal(size=(config.vectors, config.shape[1])).astype(np.float32)
    candidates: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}

    def add(name: str, product: Any, matrix: Any, vectors: Any) -> None:
        # Copies, so that each is read from memory.
        copies = [jax.tree.map(lambda a: a + 0, matrix) for _ in range(config.copies)]
        candidates[name] = lambda: [product(vectors, copy) for copy in copies]
        sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(matrix))

    # The order of operands in which XLA is the faster one.
    dense = jax.jit(lambda x, w: (w @ x.T).T)
    for dtype in ("float32", "bfloat16"):
        add(f"XLA {dtype}", dense, jnp.asarray(weights, dtype), jnp.asarray(x, dtype))
    packed = jax.jit(matmul)
    for name in config.encodings:
        for zeros in zeros_of(name, config):
            pruned = np.where(uniform < zeros, np.float32(0), weights)
            label = f"{name} {zeros:.0%} zeros" if zeros else f"{name} dense"
            add(label, packed, pack_matrix(pruned, values=name), jnp.asarray(x))
    _add_torch(config, candidates, weights, x)
    return candidates, sizes


def _add_torch(
    config: Config, candidates: dict[str, Callable[[], Any]], weights: Any, x: Any
) -> None:
    """Products of torch, where it is installed."""
    try:
        import torch
    except ImportError:
        return
    for dtype in (torch.float32, torch.bfloat16):
        copies = [torch.tensor(weights).to(dtype) for _ in range(config.copies)]
        vectors = torch.tensor(x).to(dtype)
        products = functools.partial(_torch_products, copies, vectors)
        candidates[f"torch {str(dtype).removeprefix('torch.')}"] = products


def _torch_products(copies: Any, vectors: Any) -> None:
    for copy in copies:
        vectors @ copy.T


def _decoders(config: Config) -> Candidates:
    model_class, shape = MODELS[config.model]
    shape = dataclasses.replace(shape, layers=config.layers or shape.layers)
    candidates: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    for dtype in ("float32", "bfloat16"):
        model = model_class(dataclasses.replace(shape, dtype=dtype), rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(model, nnx.Param)
        params = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), params)
        cache = model.init_cache(config.batch, _CACHE)
        _add_decoder(
            f"XLA {dtype}", _step(graphdef), params, cache, config, candidates, sizes
        )
    model = model_class(shape, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    cache = model.init_cache(config.batch, _CACHE)
    step = _step(graphdef)
    first = (jnp.zeros(config.batch, jnp.int32), cache)
    for name in config.encodings:
        for zeros in zeros_of(name, config):
            pruned = _pruned(config, params, zeros) if zeros else params
            packed = jp.pack(step, pruned, first, values=name, dense=True)
            label = f"{name} {zeros:.0%} zeros" if zeros else f"{name} dense"
            _add_decoder(
                label, packed.fn, packed.params, cache, config, candidates, sizes
            )
    if config.llama:
        _add_llama(config, candidates, sizes)
    return candidates, sizes


def _pruned(config: Config, params: Any, zeros: float) -> Any:
    """The parameters with zeros: at random, or pruned while the GPT trains."""
    if not config.train:
        return jp.prune(params, jp.scores.random(params), zeros, allocation="layer")
    leaves = jax.tree.leaves(_trained(config.train, zeros))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@functools.cache  # for all encodings
def _trained(steps: int, zeros: float) -> Any:
    """The parameters of a GPT that was pruned while it trained."""
    corpus = load()  # the plays, of 78 characters
    model = LanguageModel(preset("cpu", vocab_size=len(corpus.vocabulary)))
    sparsity = jp.schedules.cubic(zeros, begin=steps // 10, end=steps * 4 // 5)
    tx = jp.gradual(optax.adamw(1e-3), sparsity)
    state = training.train(
        training.init(model.init(0), tx),
        training.make_step(model.loss, tx),
        Batches(corpus.train, 64, model.config.context, 0),
        steps=steps,
        key=jax.random.key(0),
    )
    return state.params


def _add_llama(
    config: Config, candidates: dict[str, Callable[[], Any]], sizes: dict[str, int]
) -> None:
    """Decoding by llama.cpp, of files whose weights are others and as many."""
    from llama_cpp import Llama

    for path in config.llama:
        threads = len(os.sched_getaffinity(0))
        llama = Llama(str(path), n_ctx=_CACHE, n_threads=threads, verbose=False)
        name = f"llama.cpp {path.stem}"
        candidates[name] = functools.partial(_llama_tokens, llama, config.steps)
        sizes[name] = path.stat().st_size


def _llama_tokens(llama: Any, steps: int) -> None:
    llama.reset()
    for _ in range(steps):
        llama.eval([1])


def _step(graphdef: Any) -> Callable[[Any, Any], Any]:
    """A token and a cache to the next ones."""

    def step(params: Any, state: Any) -> Any:
        token, cache = state
        model = nnx.merge(graphdef, params)
        logits, cache = model.next_logits(model.embed(token[:, None]), cache)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return step


def _add_decoder(
    name: str,
    step: Any,
    params: Any,
    cache: Any,
    config: Config,
    candidates: dict[str, Callable[[], Any]],
    sizes: dict[str, int],
) -> None:
    """Adds the decoding of so many tokens, from an empty cache."""

    @jax.jit
    def decode(params: Any, token: jax.Array, cache: Any) -> Any:
        def body(state: Any, _: None) -> Any:
            state = step(params, state)
            return state, state[0]

        return jax.lax.scan(body, (token, cache), length=config.steps)[1]

    token = jnp.zeros(config.batch, jnp.int32)
    candidates[name] = lambda: decode(params, token, cache)
    sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    main(tyro.cli(Config))
