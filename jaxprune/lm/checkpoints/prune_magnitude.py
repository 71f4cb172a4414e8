"""Magnitude pruning of any safetensors directory, tensor by tensor, with no model code.

Memory holds one tensor: a model larger than the machine passes through. Counts are
exact and ties keep the first by flat index, as in `prune`. A matrix of Hugging Face is
[out, in], GPT-2's is [in, out]; of three axes the first is a stack of matrices
(experts), each pruned by itself.
"""

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune import leaves
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.messages import listed
from jaxprune.arrays.rules import refusal
from jaxprune.leaves import checked_rule
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import (
    CheckpointDir,
    Progress,
    TensorInfo,
)
from jaxprune.lm.checkpoints.directory_writer import Finish
from jaxprune.masking import counts, matrix_mask, patterns
from jaxprune.typing import Pattern, PrunableLike

# The models whose matrices, or stacks of them, are [in, out].
_INPUT_FIRST = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_STACKED_INPUT_FIRST = {
    *("gpt_oss", "llama4", "llama4_text", "aria", "aria_text"),
    *("qwen3_vl_moe", "qwen3_vl_moe_text"),
}
_FLOATS = tuple(map(np.dtype, ("f2", "f4", "f8", "bfloat16")))


class Pruned(NamedTuple):
    """What became of a directory.

    Attributes:
      path: the new directory.
      achieved: the share of zeros in the pruned tensors.
      tensors: name to (zeros, size) of each pruned tensor.
      skipped: the names of the tensors left alone.
    """

    path: Path
    achieved: float
    tensors: dict[str, tuple[int, int]]
    skipped: tuple[str, ...]


def prune_directory(
    source: CheckpointDir,
    directory: str | os.PathLike[str],
    *,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: Pattern | str = "unstructured",
    prunable: PrunableLike = leaves.prunable,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> Pruned:
    """Sets the smallest weights of each matrix to zero and writes the directory again.

    A run that was killed goes on after the last file of weights that it finished, when
    it is started again with the same arguments, and gives the same bytes.

    Args:
      source: directory that is pruned.
      directory: path of the new one, apart from the source.
      sparsity: share to remove from each matrix, in [0, 1), or {glob on the name with
        "/" for ".": share}. None where the pattern fixes it.
      pattern: `Unstructured`, `PerOutput`, `NM` or `Block`, or its name, such as "2:4".
      prunable: function of a name (with "/" for ".") and a `TensorInfo` to whether a
        tensor may be pruned. Of the tensors that it chooses, floating ones of two axes
        are pruned, and those of three axes unless their name contains "conv".
      provenance: facts that `jaxprune.json` is to say besides: "command", "perplexity".
      overwrite: whether an earlier result may be replaced.
      progress: function that is called after every tensor.
      finish: function that is called at the end; see `rewrite.write_directory`.

    Returns:
      The new directory and its zeros.

    Raises:
      ValueError: no tensor may be pruned, the sparsity or the pattern does not fit,
        weights are not finite, or as for `rewrite.write_directory`.
      TypeError: the pattern is none of the four.
      OSError: the directory could not be written.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> from jaxprune.lm.checkpoints import checkpoint_dir, prune_magnitude
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> (directory / "a").mkdir()
      >>> _ = (directory / "a" / "config.json").write_text("{}")
      >>> weights = {"up.weight": np.array([[3.0, -1.0], [2.0, 4.0]], "f4")}
      >>> save_file(weights, directory / "a" / "model.safetensors")
      >>> model = checkpoint_dir.open_directory(directory / "a")
      >>> done = prune_magnitude.prune_directory(model, directory / "b", sparsity=0.5)
      >>> done.achieved
      0.5
      >>> checkpoint_dir.open_directory(directory / "b").read("up.weight").tolist()
      [[3.0, 0.0], [0.0, 4.0]]
    """
    pattern = patterns.parse(pattern)
    if not isinstance(
        pattern,
        patterns.Unstructured | patterns.PerOutput | patterns.NM | patterns.Block,
    ):
        raise TypeError(
            "directories are pruned by Unstructured, PerOutput, NM or Block, got "
            f"{pattern}; load the model and use prune for other patterns"
        )
    chosen, first = to_prune(source, pattern, prunable)
    agreed, _ = counts.agreed(sparsity, pattern)
    # Blocks, or single weights, of each matrix.
    sizes = [
        counts.unit_count(pattern, info.shape[-2:], _matrix_axes(first[name]))
        for name, info in chosen.items()
    ]
    # Rules of sparsities are globs on names of paths.
    lost = counts.by_leaf(agreed, [name.replace(".", "/") for name in chosen], sizes)
    replaced = {
        name: functools.partial(
            _pruned_tensor, source, name, size - number, pattern, first[name]
        )
        for name, size, number in zip(chosen, sizes, lost, strict=True)
    }
    requested = pattern.sparsity if sparsity is None else sparsity
    facts: dict[str, Any] = {"method": "magnitude", "pattern": str(pattern)}
    facts["sparsity"] = (
        dict(requested) if isinstance(requested, Mapping) else float(requested or 0)
    )
    paths = rewrite.write_directory(
        source,
        directory,
        replaced,
        provenance=facts | dict(provenance or {}),
        overwrite=overwrite,
        resume=True,
        progress=progress,
        finish=finish,
    )
    record = rewrite.read_provenance(paths[-1].parent)
    return Pruned(
        path=paths[-1].parent,
        achieved=record["achieved"],
        tensors={k: (v["zeros"], v["size"]) for k, v in record["tensors"].items()},
        skipped=tuple(name for name in source.tensors if name not in chosen),
    )


def _input_first(config: Mapping[str, Any], name: str, info: TensorInfo) -> bool:
    # A model of models has the configuration of "decoder.transformer..." as "decoder".
    inner = [config.get("text_config"), config.get(name.split(".")[0])]
    parts = [config, *(part for part in inner if isinstance(part, Mapping))]
    model_types = _STACKED_INPUT_FIRST if info.ndim == 3 else _INPUT_FIRST
    return any(str(part.get("model_type")) in model_types for part in parts)


def to_prune(
    source: CheckpointDir, pattern: Pattern, prunable: PrunableLike
) -> tuple[dict[str, TensorInfo], dict[str, bool]]:
    """The tensors that would be pruned, and whether their inputs come first.

    Args:
      source: directory that would be pruned.
      pattern: pattern that says which weights go together.
      prunable: rule that says which tensors may be pruned, by names with "/".

    Returns:
      Name to tensor, and name to whether it is stored (in, out).

    Raises:
      ValueError: no tensor may be pruned, one is stored in one byte, or the pattern
        does not fit a shape.
    """
    rule = checked_rule(prunable, [name.replace(".", "/") for name in source.tensors])
    chosen = {}
    for name, info in source.tensors.items():
        matrix = info.ndim == 2 or (info.ndim == 3 and "conv" not in name.lower())
        floating = jnp.issubdtype(info.dtype, jnp.floating)
        if matrix and floating and rule(name.replace(".", "/"), info):
            chosen[name] = info
    if not chosen:
        raise ValueError(
            f"'{source.path}' must have a tensor that may be pruned, but has none; "
            "give another rule for prunable"
        )
    first = {
        name: _input_first(source.config, name, info) for name, info in chosen.items()
    }
    problems = [
        f"{problem} at '{name}'"
        for name, info in chosen.items()
        if (problem := pattern.problem(info.shape, _matrix_axes(first[name])))
    ]
    narrow = [name for name, info in chosen.items() if info.dtype not in _FLOATS]
    if narrow:
        problems = [
            f"weights to prune must be of two bytes or more, but {listed(narrow)} are "
            f"{chosen[narrow[0]].dtype}; save the model in bfloat16"
        ]
    if problems:
        raise refusal(
            "; ".join(problems[:6]),
            "leave such tensors out with prunable=jp.tree.excluding('...')",
            "leave such tensors out with --exclude '...'",
        )
    return chosen, first


def _matrix_axes(input_first: bool) -> Axes:
    return Axes() if input_first else Axes((-1,), (-2,))


def _pruned_tensor(
    source: CheckpointDir,
    name: str,
    kept_units: int,
    pattern: Pattern,
    input_first: bool,
) -> np.ndarray:
    """A tensor of the directory, pruned; a copy."""
    array = np.array(source.read(name))
    # (matrices, a, b)
    stack = array.reshape(math.prod(array.shape[:-2]), *array.shape[-2:])
    with jax.enable_x64(array.itemsize == 8):  # float64 is ranked as it is
        for matrix in stack:  # (out, in), or (in, out) if input_first
            number = np.uint32(kept_units)  # may be over 2^31
            kept = _keep_mask(matrix, number, pattern, input_first=input_first)
            # In place: two copies of a large tensor would not fit.
            np.copyto(matrix, matrix.dtype.type(0), where=~np.asarray(kept))
    return array


@functools.partial(jax.jit, static_argnames=("pattern", "input_first"))
def _keep_mask(
    matrix: Float[Array, "a b"], number: Any, pattern: Pattern, *, input_first: bool
) -> Bool[Array, "a b"]:
    """Which weights stay, by magnitude; one program for each shape."""
    # NaN stays with infinity: it must not pass as a weight that was pruned.
    scores = jnp.where(jnp.isnan(matrix), jnp.inf, jnp.abs(matrix))
    # Ties of Unstructured keep the first as the file has them.
    if input_first or isinstance(pattern, patterns.Unstructured):
        return matrix_mask.mask(scores, number, pattern)
    return matrix_mask.mask(scores.T, number, pattern).T
