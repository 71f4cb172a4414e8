"""The competitor: magnitude, Wanda and SparseGPT in plain torch, from the papers.

Layer by layer, as the papers have it: the sequences go through a decoder layer as it
is and the inputs of its linear layers are summed up; all its linear layers are pruned;
the sequences go through it again, and what comes out is the next layer's input.

What scripts of this kind are known to get wrong is right here, so that the method,
speed and memory are compared and nothing else: every layer is called with its own
arguments (Gemma's differ), layers with one input (q, k, v) share its sums, one copy of
the activations is held, the head is not run, counts are exact, ties keep the first, and
a matrix that cannot be factorised raises.

References: Sun et al., A Simple and Effective Pruning Approach for Large Language
Models, 2024, arXiv:2306.11695. Frantar and Alistarh, SparseGPT: Massive Language Models
Can Be Accurately Pruned in One-Shot, 2023, arXiv:2301.00774, algorithm 1.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import transformers
import tyro
from torch import Tensor, nn

from benchmarks.cost import Cost

Method = Literal["none", "magnitude", "magnitude-output", "wanda", "sparsegpt"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Prunes a causal language model in float32 and prints one JSON line.

    Attributes:
      model: a Hugging Face directory.
      method: "magnitude" ranks each matrix as a whole, "magnitude-output" the weights
        of each output; "none" only evaluates.
      sparsity: the share to remove of each matrix.
      pattern: n:m, n kept of each m consecutive inputs, in place of the sparsity.
      calibration: token ids, int32 (sequences, length), `.npy`.
      evaluate: NAME=FILE, held-out texts of the same form.
      before: whether to evaluate the dense model too.
      save: where to write the pruned model; not timed.
      batch: sequences that go through a layer together.
      block: columns that SparseGPT chooses together.
      damping: SparseGPT's, times the mean of the Hessian's diagonal.
      threads: number of threads of torch.
    """

    model: Annotated[Path, tyro.conf.Positional]
    method: Method
    sparsity: float = 0.5
    pattern: str | None = None
    calibration: Path | None = None
    evaluate: tuple[str, ...] = ()
    before: bool = False
    save: Path | None = None
    batch: int = 1
    block: int = 128
    damping: float = 0.01
    threads: int = 2


@torch.no_grad()
def main(config: Config) -> None:
    """Loads, prunes, evaluates; each timed apart, with the peak of resident memory."""
    torch.set_num_threads(config.threads)
    texts = {k: tokens(v) for k, v in (x.split("=", 1) for x in config.evaluate)}
    costs = {name: Cost() for name in ("load", "prune", "solve", "evaluate")}
    perplexities: dict[str, dict[str, float]] = {}
    with costs["load"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32
        ).eval()
    if config.before or config.method == "none":
        with costs["evaluate"]:
            perplexities["before"] = {k: perplexity(model, x) for k, x in texts.items()}
    if config.method != "none":
        with costs["prune"]:
            prune(model, config, costs["solve"])
        with costs["evaluate"]:
            perplexities["after"] = {k: perplexity(model, x) for k, x in texts.items()}
    if config.save:
        model.save_pretrained(config.save)
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
        tokenizer.save_pretrained(config.save)
    weights = [linear.weight for linear in linears(model.base_model.layers)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    report(
        config,
        perplexities=perplexities,
        zeros=zeros / sum(weight.numel() for weight in weights),
        seconds={name: cost.seconds for name, cost in costs.items()},
        peak_bytes={name: cost.peak for name, cost in costs.items()},
    )


def prune(model: nn.Module, config: Config, solve: Cost) -> None:
    """Prunes every linear layer of the decoder, in place.

    Args:
      model: a transformers model whose decoder is `base_model.layers`.
      config: method and its settings.
      solve: cost that gets the seconds apart from the two passes through a layer.
    """
    layers = model.base_model.layers
    if config.method.startswith("magnitude"):
        for linear in linears(layers):
            linear.weight.copy_(magnitude(linear.weight, config))
        return
    # Hidden states of all sequences, and each layer's masks and positions.
    hidden, arguments = capture(model, tokens(config.calibration))
    for layer, kwargs in zip(layers, arguments, strict=True):
        with input_sums(layer, hessian=config.method == "sparsegpt") as sums:
            for batch in hidden.split(config.batch):
                layer(batch, **kwargs)
        with solve:
            for total, group in by_input(sums):
                prune_group(group, total, config)
        # Nobody needs what comes out of the last one.
        if layer is layers[-1]:
            break
        for batch in hidden.split(config.batch):
            batch.copy_(layer(batch, **kwargs))


class _Stop(Exception):
    """Ends a forward pass early."""


def capture(model: nn.Module, sequences: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """What enters the decoder, and the arguments of each of its layers.

    Args:
      model: a transformers model.
      sequences: token ids (sequences, length), all positions valid.

    Returns:
      Hidden states (sequences, length, width), and each layer's keyword arguments
      (masks, positions): the same for all sequences.
    """
    body, arguments, hidden = model.base_model, [], []

    def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments.append(kwargs)

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden.append(args[0])  # (1, length, width)
        raise _Stop

    with hooked(body.layers, note):
        # One sequence is enough: the arguments are those of all.
        body(sequences[:1], use_cache=False)
    with hooked(body.layers[:1], stop):
        for ids in sequences:
            with contextlib.suppress(_Stop):
                body(ids[None], use_cache=False)
    return torch.cat(hidden), arguments


@contextlib.contextmanager
def hooked(modules: Any, hook: Any) -> Iterator[None]:
    """Has `hook(module, args, kwargs)` called before the forward of each module."""
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def input_sums(layer: nn.Module, hessian: bool) -> Iterator[dict[nn.Linear, Tensor]]:
    """Sums over all tokens that enter the linear layers under it.

    Args:
      layer: a decoder layer.
      hessian: whether to sum X^T X, (in, in); else the squares, (in,).

    Yields:
      Linear layer to its sum; one and the same tensor where the input is.
    """
    sums: dict[nn.Linear, Tensor] = {}
    latest: dict[str, Tensor | None] = {"inputs": None, "total": None}

    def add(linear: nn.Linear, args: tuple, kwargs: dict) -> None:
        (inputs,) = args
        # q, k and v are called with the very same tensor, one after the other.
        shared = inputs is latest["inputs"]
        if linear not in sums:
            shape = (linear.in_features,) * (2 if hessian else 1)
            sums[linear] = latest["total"] if shared else inputs.new_zeros(shape)
        total, rows = sums[linear], inputs.flatten(0, -2)  # rows (tokens, in)
        if not shared and hessian:
            total.addmm_(rows.T, rows)
        elif not shared:
            total.add_(rows.square().sum(0))
        latest.update(inputs=inputs, total=total)

    with hooked(linears(layer), add):
        yield sums


def by_input(sums: dict[nn.Linear, Tensor]) -> Iterator[tuple[Tensor, list[nn.Linear]]]:
    """Yields each sum with the linear layers that share it."""
    # By identity: equal sums of two inputs are two.
    for total in {id(x): x for x in sums.values()}.values():
        yield total, [linear for linear, x in sums.items() if x is total]


def prune_group(group: list[nn.Linear], total: Tensor, config: Config) -> None:
    """Prunes linear layers in place, given the sum over the input they share."""
    method = wanda
    if config.method == "sparsegpt":
        method, total = sparsegpt, inverse_factor(total, config.damping)
    for linear in group:
        linear.weight.copy_(method(linear.weight, total, config))


def magnitude(weight: Tensor, config: Config) -> Tensor:
    """Keeps the largest, of the matrix or of each output."""
    scores = weight.abs()
    if config.pattern or config.method == "magnitude-output":
        return weight.where(keep_of_outputs(scores, config), 0.0)
    kept = scores.numel() - round(config.sparsity * scores.numel())
    return weight.where(keep_highest(scores.flatten(), kept).view_as(weight), 0.0)


def wanda(weight: Tensor, squares: Tensor, config: Config) -> Tensor:
    """Keeps the highest abs(W_ij) ||X_j|| of each output i; squares: ||X_j||^2."""
    scores = weight.abs() * squares.sqrt()  # (out, in)
    return weight.where(keep_of_outputs(scores, config), 0.0)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper R with R^T R the inverse of the damped Hessian, (in, in).

    With J turning the order round, J H J = L L^T gives R = (J L J)^-1 at once.
    """
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always 0
    diagonal += damping * diagonal.mean()
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    identity = torch.eye(len(hessian))
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def sparsegpt(weight: Tensor, factor: Tensor, config: Config) -> Tensor:
    """Removes columns from left to right; those to the right make up for it.

    A weight's score is w^2 / R_jj^2, with all columns to its left done: those of its
    block for n:m, those before its block else.

    Args:
      weight: weight of a linear layer, (out, in).
      factor: R of `inverse_factor`, (in, in).
      config: settings: sparsity or pattern, and block.

    Returns:
      The pruned and updated weight.
    """
    columns = weight.T.contiguous()  # a row of it is a column of the weight
    size, outputs = columns.shape
    n, m = n_of_m(config.pattern, size) if config.pattern else (0, 0)
    for start in range(0, size, config.block):
        stop = min(start + config.block, size)
        block, corner = columns[start:stop], factor[start:stop, start:stop]
        scale = corner.diagonal()[:, None]
        errors = torch.empty_like(block)  # (block, out)
        keep = torch.empty_like(block, dtype=torch.bool)
        if not m:
            # So that the whole matrix loses round(sparsity * size).
            removed_before, removed_after = (
                round(config.sparsity * outputs * x) for x in (start, stop)
            )
            scores = (block / scale).square().T.flatten()
            best = keep_highest(scores, len(scores) - (removed_after - removed_before))
            keep = best.view(outputs, -1).T.contiguous()
        for i in range(stop - start):
            if m and i % m == 0:
                group = slice(i, i + m)
                keep[group] = keep_first((block[group] / scale[group]).square(), n)
            kept = block[i].where(keep[i], 0.0)
            errors[i] = (block[i] - kept) / corner[i, i]
            # Inside the block at once; what is behind it gets all errors in one product
            # below.
            block[i:].addcmul_(corner[i, i:, None], errors[i], value=-1)
            block[i] = kept
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return columns.T


def keep_of_outputs(scores: Tensor, config: Config) -> Tensor:
    """The mask (out, in) of the highest scores of each output, or of each n:m group."""
    size = scores.shape[1]
    if not config.pattern:
        return keep_highest(scores, size - round(config.sparsity * size))
    n, m = n_of_m(config.pattern, size)
    groups = scores.unflatten(1, (-1, m)).movedim(-1, 0).contiguous()
    return keep_first(groups, n).movedim(0, -1).flatten(1)


def keep_highest(scores: Tensor, kept: int) -> Tensor:
    """True for the `kept` highest along the last axis; ties keep the first."""
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.kthvalue(scores.shape[-1] - kept + 1, -1, keepdim=True).values
    above, tied = scores > cut, scores == cut
    # So many of the tied scores are kept, the first ones.
    room = kept - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def keep_first(scores: Tensor, n: int) -> Tensor:
    """True for the n highest along the first axis, a short one; ties keep the first."""
    order = torch.arange(len(scores)).view(-1, *[1] * (scores.dim() - 1))
    score, rival = scores[:, None], scores[None]
    beaten = (rival > score) | ((rival == score) & (order[None] < order[:, None]))
    return beaten.sum(1) < n


def n_of_m(pattern: str, size: int) -> tuple[int, int]:
    """Reads n:m, and checks that m divides the inputs."""
    n, m = map(int, pattern.split(":"))
    if size % m:
        raise ValueError(f"{pattern} needs inputs divisible by {m}, got {size}")
    return n, m


def linears(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of a module, in its order."""
    return [x for x in module.modules() if isinstance(x, nn.Linear)]


def tokens(path: str | Path | None) -> Tensor:
    """Token ids (sequences, length) of a `.npy` file."""
    if path is None:
        raise ValueError("the method needs sequences; give --calibration TOKENS.npy")
    return torch.from_numpy(np.load(path).astype(np.int64))


def perplexity(model: nn.Module, sequences: Tensor, rows: int = 128) -> float:
    """exp of the mean negative log-likelihood of all tokens but each first.

    Args:
      model: a transformers model; its logits are not capped.
      sequences: token ids (sequences, length).
      rows: number of positions whose logits are held at once.

    Raises:
      ValueError: the model caps its logits.
    """
    if getattr(model.config, "final_logit_softcapping", None):
        raise ValueError("perplexity must be of a model that does not cap its logits")
    head, total = model.get_output_embeddings(), 0.0
    for ids in sequences:
        hidden = model.base_model(ids[None], use_cache=False).last_hidden_state[0]
        # The logits of a whole sequence would be as large as the model.
        parts = zip(hidden[:-1].split(rows), ids[1:].split(rows), strict=True)
        for states, targets in parts:
            loss = nn.functional.cross_entropy(head(states), targets, reduction="sum")
            total += loss.item()
    return math.exp(total / sequences[:, 1:].numel())


def report(config: Config, **fields: Any) -> None:
    """Prints the JSON line. JAX is imported here, after the memory was measured."""
    from benchmarks import measure

    settings = {
        k: str(v) if isinstance(v, Path) else v
        for k, v in dataclasses.asdict(config).items()
    }
    if config.calibration:
        ids = np.load(config.calibration)
        settings["calibration_sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    measure.report("torch_pruning", config=settings, **fields)


if __name__ == "__main__":
    main(tyro.cli(Config))
