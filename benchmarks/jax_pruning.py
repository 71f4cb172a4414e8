"""Ours, on the sequences of the competitor `benchmarks.torch_pruning`, measured alike.

The model is read as a Hugging Face directory into the package's decoder, pruned by
`jp.prune_trained` and evaluated on held-out token files. Compilation counts as pruning;
so does reading each leaf when its layer's turn comes, and writing it once it is pruned.
"""

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import jaxprune as jp
from benchmarks import measure
from benchmarks.cost import Cost
from jaxprune.arrays import lazy
from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.model import loss_per_token
from jaxprune.lm.recovery import distill, retrain

Method = Literal["magnitude", "wanda", "ria", "sparsegpt", "alps"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Prunes a causal language model in float32 and prints one JSON line.

    Attributes:
      model: a Hugging Face directory.
      method: how.
      sparsity: the share to remove of each matrix.
      inputs: whether weights are pruned for the inputs that are left, or those of their
        dense layer as in the papers.
      pattern: n:m, n kept of each m consecutive inputs, in place of the sparsity.
      allocation: how the sparsity is allocated to the matrices; "gradients" is by one
        ranking of |w| E[g^2]^(1/4), the gradients those of the model's own loss.
      gradient_sequences: number of calibration sequences that "gradients" looks at.
      calibration: token ids, int32 (sequences, length), `.npy`.
      evaluate: NAME=FILE, held-out texts of the same form.
      batch: sequences in a batch.
      damping: damping of the solvers that have one.
      relative: whether each token is divided by the size of its activations.
      correction: how much of what earlier layers lost a matrix makes up for.
      distill: steps of distillation from the dense model into the whole pruned model,
        on the calibration sequences, 4 a step; 0 for none.
      distill_learning_rate: learning rate of its first step.
      bits: 4 or 8, of the kept weights; None leaves them as they are.
      group: inputs that share a scale with `bits`.
    """

    model: Annotated[Path, tyro.conf.Positional]
    method: Method
    calibration: Path
    sparsity: float = 0.5
    inputs: Literal["left", "dense"] = "left"
    pattern: str | None = None
    allocation: Literal["layer", "erk", "owl", "gradients"] = "layer"
    gradient_sequences: int = 8
    evaluate: tuple[str, ...] = ()
    batch: int = 2
    damping: float = 0.01
    relative: bool = False
    correction: float = 0.0
    distill: int = 0
    distill_learning_rate: float = 3e-5
    bits: Literal[4, 8] | None = None
    group: int = 128


def main(config: Config) -> None:
    """Loads, prunes, evaluates; each timed apart, with the peak of resident memory."""
    if config.relative and config.method == "magnitude":
        raise ValueError("magnitude has no relative; leave --relative out")
    if config.correction and config.method not in ("sparsegpt", "alps"):
        raise ValueError(f"{config.method} has no correction; leave --correction out")
    costs = {name: Cost() for name in ("load", "prune", "distill", "evaluate")}
    ids = np.load(config.calibration)
    with costs["load"]:
        loaded = hf.load(config.model, dtype="float32", lazy=True)
        # Lazy leaves: each is read when its layer's turn comes, which is timed as
        # pruning.
        graphdef, params = nnx.split(loaded.model, nnx.Param)
    texts = {k: np.load(v) for k, v in (x.split("=", 1) for x in config.evaluate)}
    parts = np.split(ids, range(config.batch, len(ids), config.batch))
    names, shape = loaded.names, loaded.config
    batches = (
        hf.embedded(config.model, names, shape, part, "float32") for part in parts
    )
    with tempfile.TemporaryDirectory() as folder:
        with costs["prune"]:
            rule = allocation(config, graphdef, params, ids)
            params, report = pruned(config, graphdef, params, batches, folder, rule)
        rows = report["weights"]
        matrices = {row["name"] for row in rows}
        with costs["distill"]:
            params = lazy.loaded(params)
            if config.distill:
                params = distilled(config, graphdef, params, matrices, ids)
        with costs["evaluate"]:
            after = {k: perplexity(graphdef, params, x) for k, x in texts.items()}
    measure.report(
        "jax_pruning",
        config={k: str(v) for k, v in dataclasses.asdict(config).items()},
        perplexities={"after": after},
        zeros=zeros_of(params, matrices),
        error=float(np.mean([row["error"] for row in rows])),
        solve_seconds=sum(row["seconds"] for row in rows),
        programs=report["programs"],
        seconds={name: cost.seconds for name, cost in costs.items()},
        peak_bytes={name: cost.peak for name, cost in costs.items()},
    )


def zeros_of(params: Any, matrices: Set[str]) -> float:
    """The share of zeros among the weights of the pruned matrices."""
    leaves = [x for k, x in jp.tree.named_leaves(params).items() if k in matrices]
    zeros = sum(x.size - int(jnp.count_nonzero(x)) for x in leaves)
    return zeros / sum(x.size for x in leaves)


def allocation(config: Config, graphdef: Any, params: Any, ids: np.ndarray) -> Any:
    """The rule that the sparsity is allocated by."""
    if config.allocation != "gradients":
        return jp.allocation.parse(config.allocation)

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return loss_per_token(model, ids[:, :-1], ids[:, 1:]).mean()

    params, tx = lazy.loaded(params), jp.track_gradients(jp.weightings.uniform())
    importance, gradient = tx.init(params), jax.jit(jax.grad(loss))
    for row in ids[: config.gradient_sequences]:  # of single sequences
        _, importance = tx.update(gradient(params, row[None]), importance, params)
    return jp.allocation.Ranked(jp.scores.preconditioned_magnitude(params, importance))


def pruned(
    config: Config,
    graphdef: Any,
    params: Any,
    batches: Iterable[jax.Array],
    folder: str,
    rule: Any,
) -> tuple[Any, dict[str, Any]]:
    """The pruned parameters and its report."""
    settings: dict[str, Any] = {}
    if config.method in ("sparsegpt", "alps"):
        settings["damping"] = config.damping
    if config.method != "magnitude":
        settings |= {"inputs": config.inputs, "relative": config.relative}
    pattern = config.pattern and jp.patterns.NM(*map(int, config.pattern.split(":")))
    settings |= {"pattern": pattern or None, "allocation": rule}
    passes: list[jp.passes.Pass] = [jp.passes.METHODS[config.method](**settings)]
    if config.correction:
        passes.append(jp.passes.correct(config.correction))
    if config.bits:
        levels: Any = f"int{config.bits}"
        passes.append(jp.passes.quantize(levels, group=config.group))
    return jp.prune_trained(
        lambda params, x: nnx.merge(graphdef, params).states(x)[0],
        params,
        batches,
        method=jp.passes.chain(*passes),
        sparsity=None if pattern else config.sparsity,
        directory=folder,
    )


def distilled(
    config: Config, graphdef: Any, params: Any, masked: Set[str], ids: np.ndarray
) -> Any:
    """All parameters, distilled from the dense model; zeros of those named held."""
    rate = config.distill_learning_rate
    with Progress(config.distill, "distilling", unit="step") as progress:

        def tick(steps: int, loss: float) -> None:
            progress.note(f"loss {loss:.3f}")
            progress.update(steps)

        student, _ = retrain.retrain(
            nnx.merge(graphdef, params),
            set(jp.tree.names(params)),
            ids,
            retrain.Settings(steps=config.distill, learning_rate=rate),
            loss=distill.from_teacher(hf.load(config.model, dtype="float32").model),
            masked=masked,
            progress=tick,
        )
    return nnx.state(student, nnx.Param)


def perplexity(graphdef: Any, params: Any, sequences: np.ndarray) -> float:
    """exp of the mean negative log-likelihood of all tokens but each first."""

    @jax.jit
    def total(params: Any, ids: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return loss_per_token(model, ids[:, :-1], ids[:, 1:]).sum()

    # A sequence at a time: the logits of a vocabulary of 262,144 are large.
    sums = [float(total(params, jnp.asarray(ids[None]))) for ids in sequences]
    return math.exp(sum(sums) / sequences[:, 1:].size)


if __name__ == "__main__":
    main(tyro.cli(Config))
