"""How long a large torch model takes to become a pruned one: traced, compiled, pruned.

`python -m benchmarks.torch_compile --layers 12` makes a random BERT of so many layers
of base size (width 768) and prints, in JSON: seconds to take it as a function, to list
its weights, to compile its forward pass as one program, and to prune it by SparseGPT on
one batch. `prune_trained` compiles segment by segment, and layers that are alike share
their programs: how many programs it compiles, and how long that takes, are printed
beside its time, and should not grow with the layers as one program for all does.
It needs the extra [transformers].
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import torch
import transformers
import tyro

import jaxprune as jp

COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX calls the seconds that XLA takes for a program."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Size of the model and of the batch.

    Attributes:
      layers: number of layers, 12 of BERT base.
      width: width of the model, 64 for each head, four times that in the MLPs.
      batch: number of sequences.
      length: number of tokens of each.
      prune: whether it is pruned too.
    """

    layers: int = 12
    width: int = 768
    batch: int = 2
    length: int = 64
    prune: bool = True


def main(config: Config) -> None:
    """Measures one model.

    Args:
      config: size of the model.
    """
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.width // 64,
        intermediate_size=4 * config.width,
    )
    module = transformers.BertModel(settings).eval()
    tokens = torch.randint(0, settings.vocab_size, (config.batch, config.length))
    example = {"input_ids": tokens}
    batch = jp.torch.as_arrays(example)
    seconds: dict[str, float] = {}

    def timed(name: str, run: Any) -> Any:
        start = time.perf_counter()
        result = run()
        seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{name}: {seconds[name]} s", file=sys.stderr)  # a kill leaves these
        return result

    fn, params = timed("function", lambda: jp.torch.function(module, example))
    timed("trace", lambda: jp.trace(fn, params, batch))
    lowered = timed("lower", lambda: jax.jit(fn).lower(params, batch))
    timed("compile", lowered.compile)
    programs: list[float] = []
    if config.prune:
        with compilations() as programs:
            timed(
                "prune",
                lambda: jp.prune_trained(
                    fn, params, [batch], "sparsegpt", sparsity=0.5, progress=False
                ),
            )
        seconds["compile in prune"] = round(sum(programs), 1)
    facts = {
        **dataclasses.asdict(config),
        "parameters": sum(leaf.size for leaf in params.values()),
        "programs of prune": len(programs),
        "seconds": seconds,
        "load": round(os.getloadavg()[0], 1),
        "versions": [torch.__version__, transformers.__version__, jax.__version__],
    }
    print(json.dumps(facts))


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Listens to what is compiled.

    Yields:
      Seconds of XLA, an entry for each program as it is done.
    """
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == COMPILED:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


if __name__ == "__main__":
    main(tyro.cli(Config))
