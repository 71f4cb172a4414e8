"""The competitors: whole neurons, heads and layers out of a model, in plain torch.

The methods of the papers, as their code runs them. Each method removes units by zeroing
the columns of the next matrix that read their outputs, which computes the same as
removing the units. `--out` writes a checkpoint without neurons that are gone.

- magnitude-sp: the norms of those columns.
- wanda-sp: abs(W_ij) ||X_j|| summed over the outputs, layer after layer, each for the
  inputs that the pruned layers before it leave.
- flap: Var(X_j) ||W_:j||^2, and a bias makes up for the mean of what is gone. A layer
  loses as many as any other; "flap-adaptive" ranks standardised scores of all layers
  together, so that layers differ in size. Neither can be written as a checkpoint of a
  family without biases and with one size for all layers, as Gemma's.
- block-influence: the layers go whose output is most like their input.
- from-scratch: new random weights, and as many neurons less, whichever.

References: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language
Models, AAAI 2024, arXiv:2312.11983, whose code defines magnitude-sp and wanda-sp too.
Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You
Expect, 2024, arXiv:2403.03853.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import tyro
from torch import Tensor, nn

from benchmarks.cost import Cost
from benchmarks.torch_pruning import capture, hooked, perplexity, report, tokens
from benchmarks.torch_recovery import recover

Method = Literal[
    *("none", "magnitude-sp", "wanda-sp", "flap", "flap-adaptive", "block-influence"),
    "from-scratch",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Removes units of a causal language model and prints one JSON line.

    Attributes:
      model: a Hugging Face directory.
      method: see above; "none" only evaluates, a model that is smaller already, say.
      ffn: the share of each MLP's neurons to remove.
      heads: the share of the query heads, where all share one key head.
      drop: how many layers to remove, of block-influence.
      calibration: token ids, int32 (sequences, length), `.npy`.
      draw: which `sequences` of them: 0 for the first so many, 1 for the next.
      sequences: how many to calibrate on.
      evaluate: NAME=FILE, held-out texts of the same form.
      recover: steps of `benchmarks.torch_recovery` before that, on the same sequences.
      dense: the directory of the dense model, for that.
      learning_rate: learning rate of its first step.
      out: the directory to write a Llama to, smaller by its neurons; none if left out.
      threads: number of threads of torch.
    """

    model: Annotated[Path, tyro.conf.Positional]
    method: Method
    ffn: float = 0.0
    heads: float = 0.0
    drop: int = 0
    calibration: Path | None = None
    draw: int = 0
    sequences: int = 32
    evaluate: tuple[str, ...] = ()
    recover: int = 0
    dense: Path | None = None
    learning_rate: float = 2e-5
    out: Path | None = None
    threads: int = 2


@torch.no_grad()
def main(config: Config) -> None:
    """Loads, removes, evaluates."""
    torch.set_num_threads(config.threads)
    texts = {k: tokens(v) for k, v in (x.split("=", 1) for x in config.evaluate)}
    costs = {name: Cost() for name in ("load", "prune", "recover", "evaluate")}
    with costs["load"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32
        ).eval()
    with costs["prune"]:
        remove(model, config)
    with costs["recover"]:
        if config.recover:
            ids = calibrated(config)
            rate = config.learning_rate
            recover(model, config.dense or config.model, ids, config.recover, rate)
    if config.out is not None:
        write_smaller(model, config.model, config.out)
    with costs["evaluate"]:
        perplexities = {k: perplexity(model, x) for k, x in texts.items()}
    report(
        config,
        perplexities=perplexities,
        parameters=model.num_parameters(),
        seconds={name: cost.seconds for name, cost in costs.items()},
        peak_bytes={name: cost.peak for name, cost in costs.items()},
    )


def remove(model: nn.Module, config: Config) -> None:
    """Removes units by the method that is asked for, in place."""
    if config.method == "none":
        return
    layers = model.base_model.layers
    if config.method == "from-scratch":
        torch.manual_seed(0)
        model.load_state_dict(type(model)(model.config).state_dict())
    if config.method in ("magnitude-sp", "from-scratch"):
        for layer in layers:
            for units in units_of(layer, config):
                units.zero(units.weight.square().sum(0).sqrt())
        return
    hidden, arguments = capture(model, calibrated(config))
    if config.method == "block-influence":
        drop_layers(model, hidden, arguments, config.drop)
    elif config.method == "wanda-sp":
        for layer, kwargs in zip(layers, arguments, strict=True):
            with moments(layer, config) as unit_moments:
                # A copy: this pass only gathers the moments, the next one goes on with
                # the rest.
                advance(layer, hidden.clone(), kwargs)
            for units, (_, square, _) in unit_moments.items():
                units.zero((units.weight.abs() * square.sqrt()).sum(0))  # (in,)
            advance(layer, hidden, kwargs)
    else:
        fluctuation(layers, hidden, arguments, config)


def write_smaller(model: nn.Module, source: Path, out: Path) -> None:
    """Writes a model without the neurons whose columns are zero.

    Args:
      model: a Llama, whose layers lost as many neurons each; it is changed.
      source: the directory that it came from, for the tokenizer.
      out: the directory to write.
    """
    mlps = [layer.mlp for layer in model.base_model.layers]
    biased = any(mlp.down_proj.bias is not None for mlp in mlps)
    for mlp in mlps:
        kept = mlp.down_proj.weight.any(0)  # (neurons,)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = nn.Parameter(linear.weight[kept])
            if biased:  # config.json has one word for all three
                linear.bias = nn.Parameter(torch.zeros(int(kept.sum())))
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, kept])
    model.config.intermediate_size = len(mlps[0].gate_proj.weight)
    model.config.mlp_bias = biased
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    model.save_pretrained(partial)
    for path in source.glob("tokenizer*.json"):
        shutil.copy(path, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)  # a directory that is there is whole


def calibrated(config: Config) -> Tensor:
    """The sequences of the draw (sequences, length)."""
    start = config.draw * config.sequences
    return tokens(config.calibration)[start : start + config.sequences]


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
    """The columns by which a layer's units go out.

    Attributes:
      linear: the linear layer that has them, (out, in).
      features: how many columns a unit has.
      lost: how many units go.
    """

    linear: nn.Linear
    features: int
    lost: int

    @property
    def weight(self) -> Tensor:
        """The weight (out, in)."""
        return self.linear.weight

    def pooled(self, scores: Tensor) -> Tensor:
        """Scores (in,) to those of units (units,)."""
        return scores.view(-1, self.features).mean(1)

    def zero(self, scores: Tensor, means: Tensor | None = None) -> None:
        """Zeroes the units with the lowest scores (in,); `means` become a bias."""
        order = self.pooled(scores).argsort(stable=True)
        self.zero_units(order[: self.lost], means)

    def zero_units(self, gone: Tensor, means: Tensor | None) -> None:
        """Zeroes some units; what their means gave becomes a bias."""
        columns = torch.zeros(self.linear.in_features, dtype=torch.bool)
        columns.view(-1, self.features)[gone] = True
        if means is not None:
            bias = self.weight[:, columns] @ means[columns]
            self.linear.bias = nn.Parameter(bias, requires_grad=False)
        self.weight[:, columns] = 0.0


def units_of(layer: nn.Module, config: Config) -> list[Units]:
    """The heads and the neurons of a layer, those that are to lose any."""
    units = []
    attention, down = layer.self_attn, layer.mlp.down_proj
    heads = attention.o_proj.in_features // attention.head_dim
    if config.heads:
        lost = round(config.heads * heads)
        units.append(Units(attention.o_proj, attention.head_dim, lost))
    if config.ffn:
        units.append(Units(down, 1, round(config.ffn * down.in_features)))
    return units


def advance(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> None:
    """Takes hidden states (sequences, length, width) through a layer, in place."""
    for batch in hidden.split(1):
        batch.copy_(layer(batch, **kwargs))


@contextlib.contextmanager
def moments(
    layer: nn.Module, config: Config
) -> Iterator[dict[Units, tuple[Tensor, Tensor, Tensor]]]:
    """Over all tokens: mean, sum of squares and variance of the units' columns.

    Filled when the block ends.
    """
    unit_moments: dict[Units, Any] = {}
    sums = {units.linear: [0, 0.0, 0.0] for units in units_of(layer, config)}

    def add(linear: nn.Linear, args: tuple, kwargs: dict) -> None:
        # (tokens, in) in float64: a variance as a difference of sums would cancel.
        rows = args[0].flatten(0, -2).double()
        total = sums[linear]
        total[0] += len(rows)
        total[1] = total[1] + rows.sum(0)
        total[2] = total[2] + rows.square().sum(0)

    with hooked(list(sums), add):
        yield unit_moments
    for units in units_of(layer, config):
        count, total, squares = sums[units.linear]
        mean = total / count
        variance = (squares - count * mean.square()) / (count - 1)  # (in,), unbiased
        unit_moments[units] = (mean.float(), squares.float(), variance.float())


def fluctuation(
    layers: Any, hidden: Tensor, arguments: list[dict[str, Any]], config: Config
) -> None:
    """FLAP: all scores by the dense model, then all units at once."""
    unit_scores: list[tuple[Units, Tensor, Tensor]] = []
    for layer, kwargs in zip(layers, arguments, strict=True):
        with moments(layer, config) as unit_moments:
            advance(layer, hidden, kwargs)
        for units, (mean, _, variance) in unit_moments.items():
            score = variance * units.weight.square().sum(0)  # (in,)
            unit_scores.append(
                (units, units.pooled((score - score.mean()) / score.std()), mean)
            )
    if config.method == "flap":
        for units, score, mean in unit_scores:
            units.zero_units(score.argsort(stable=True)[: units.lost], mean)
        return
    # Heads among heads and neurons among neurons, as many in all as the uniform way.
    for features in {units.features for units, _, _ in unit_scores}:
        peers = [x for x in unit_scores if x[0].features == features]
        scores = torch.cat([score for _, score, _ in peers])
        gone = torch.zeros_like(scores, dtype=torch.bool)
        gone[scores.argsort(stable=True)[: sum(u.lost for u, _, _ in peers)]] = True
        parts = gone.split([len(score) for _, score, _ in peers])
        for (units, _, mean), part in zip(peers, parts, strict=True):
            units.zero_units(part.nonzero()[:, 0], mean)


def drop_layers(
    model: nn.Module, hidden: Tensor, arguments: list[dict[str, Any]], count: int
) -> None:
    """Removes the layers with the least mean of 1 - cos(input, output)."""
    layers, influence = model.base_model.layers, []
    for layer, kwargs in zip(layers, arguments, strict=True):
        before = hidden.clone()
        advance(layer, hidden, kwargs)
        cosine = nn.functional.cosine_similarity(before, hidden, dim=-1)
        influence.append(1 - cosine.mean().item())
    order = sorted(range(len(layers)), key=influence.__getitem__)
    kept = [layers[i] for i in sorted(order[count:])]
    model.base_model.layers = nn.ModuleList(kept)
    # The cache and the masks are made for so many layers.
    model.config.num_hidden_layers = len(kept)
    if kinds := getattr(model.config, "layer_types", None):  # masks go by the number
        model.config.layer_types = [kinds[i] for i in sorted(order[count:])]


if __name__ == "__main__":
    main(tyro.cli(Config))
