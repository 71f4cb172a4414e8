"""Where torch's masks and ours part: the same procedure, layer by layer.

    python -m benchmarks.torch_pruning MODEL --method wanda --calibration IDS --save DIR
    python -m benchmarks.agreement MODEL DIR --method wanda --calibration IDS

prunes with `inputs="dense"`, as the papers and torch do, and prints the share of each
layer's masks that differs.
"""

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from flax import nnx

import jaxprune as jp
from benchmarks import jax_pruning, measure
from jaxprune.arrays import lazy
from jaxprune.lm.models import hf


@dataclasses.dataclass(frozen=True)
class Config:
    """Prunes as torch has pruned and prints one JSON line.

    Attributes:
      model: a Hugging Face directory.
      torch_model: the model that `benchmarks.torch_pruning --save` pruned and wrote.
      method: the method of that run.
      sparsity: the sparsity of that run.
      calibration: the token ids of that run, int32 (sequences, length), `.npy`.
    """

    model: Annotated[Path, tyro.conf.Positional]
    torch_model: Annotated[Path, tyro.conf.Positional]
    method: Literal["wanda", "sparsegpt"]
    calibration: Path
    sparsity: float = 0.5


def main(config: Config) -> None:
    """Prunes, compares, prints."""
    loaded = hf.load(config.model, dtype="float32", lazy=True)
    graphdef, params = nnx.split(loaded.model, nnx.Param)
    ids = np.load(config.calibration)
    batches = (
        hf.embedded(config.model, loaded.names, loaded.config, part, "float32")
        for part in np.split(ids, range(2, len(ids), 2))  # two sequences at a time
    )
    settings = jax_pruning.Config(
        config.model,
        config.method,
        config.calibration,
        sparsity=config.sparsity,
        inputs="dense",
    )
    with tempfile.TemporaryDirectory() as folder:
        pruned, _ = jax_pruning.pruned(
            settings, graphdef, params, batches, folder, "layer"
        )
        # Before the folder with the leaves on disk goes.
        ours = lazy.loaded(pruned)
    _, torch_params = nnx.split(
        hf.load(config.torch_model, dtype="float32").model, nnx.Param
    )
    measure.report(
        "agreement",
        config={k: str(v) for k, v in dataclasses.asdict(config).items()},
        sequences=len(ids),
        differing=differing(ours, torch_params),
    )


def differing(params: nnx.State, torch_params: nnx.State) -> list[float]:
    """The share of the masks that differs, layer by layer."""
    leaves, torch_leaves = (
        jp.tree.named_leaves(params),
        jp.tree.named_leaves(torch_params),
    )
    kernels = [k for k in leaves if k.startswith("layers/") and k.endswith("/kernel")]
    # By number, for "layers/10" comes before "layers/2" by name; `groupby` needs them
    # sorted.
    kernels.sort(key=_layer)
    shares = []
    for _, names in itertools.groupby(kernels, _layer):
        pairs = [
            (np.asarray(leaves[k]) == 0, np.asarray(torch_leaves[k]) == 0)
            for k in names
        ]
        parted = sum(int((a != b).sum()) for a, b in pairs)
        shares.append(parted / sum(a.size for a, _ in pairs))  # of the layer's weights
    return shares


def _layer(name: str) -> int:
    return int(name.split("/")[1])


if __name__ == "__main__":
    main(tyro.cli(Config))
