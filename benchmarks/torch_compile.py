"""How long a large torch model takes to become a pruned one: traced, compiled, pruned.

`python -m benchmarks.torch_compile --layers 12` makes a random BERT of so many layers
of base size (width 768) and prints, in JSON: seconds to take it as a function, to list
its weights, to compile its forward pass as one program, and to prune it by SparseGPT on
one batch. `prune_trained` compiles segment by segment, and layers that are alike share
their programs, so its time should not grow as that of one program for all layers does.
It needs the extra [transformers].
"""

import dataclasses
import json
import os
import time
from typing import Any

import jax
import torch
import transformers
import tyro

import jaxprune as jp


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
        return result

    fn, params = timed("function", lambda: jp.torch.function(module, example))
    timed("trace", lambda: jp.trace(fn, params, batch))
    lowered = timed("lower", lambda: jax.jit(fn).lower(params, batch))
    timed("compile", lowered.compile)
    if config.prune:
        timed(
            "prune",
            lambda: jp.prune_trained(
                fn, params, [batch], "sparsegpt", sparsity=0.5, progress=False
            ),
        )
    facts = {
        **dataclasses.asdict(config),
        "parameters": sum(leaf.size for leaf in params.values()),
        "seconds": seconds,
        "load": round(os.getloadavg()[0], 1),
        "versions": [torch.__version__, transformers.__version__, jax.__version__],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(tyro.cli(Config))
