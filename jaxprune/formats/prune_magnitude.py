"""Magnitude pruning of any safetensors directory, tensor by tensor, with no model code.

Memory holds one tensor: a model larger than the machine passes through. Magnitudes are
compared as integers, the bits without the sign, so that counts are exact; ties keep the
first by flat index, as in `prune`. A matrix of Hugging Face is [out, in], GPT-2's is
[in, out]; of three axes the first is a stack of matrices (experts), each pruned by
itself.
"""

import functools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.arrays import tree
from jaxprune.arrays.axes import Axes
from jaxprune.formats import rewrite
from jaxprune.formats.checkpoint_dir import Directory, TensorInfo
from jaxprune.masking import allocation, patterns
from jaxprune.typing import Pattern, Prunable

# The models whose matrices, or stacks of them, are [in, out].
_INPUT_FIRST = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_STACKED_INPUT_FIRST = {"gpt_oss", "llama4", "llama4_text"}
_FLOATS = tuple(map(np.dtype, ("f2", "f4", "f8", "bfloat16")))
_CHUNK = 1 << 20
_DIGIT = 16


class Pruned(NamedTuple):
    """What became of a directory.

    Attributes:
      path: the new folder.
      achieved: the share of zeros in the pruned tensors.
      tensors: name to (zeros, size) of each pruned tensor.
      skipped: the names of the tensors left alone.
    """

    path: Path
    achieved: float
    tensors: dict[str, tuple[int, int]]
    skipped: tuple[str, ...]


def prune_directory(
    source: Directory,
    out: str | os.PathLike[str],
    *,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: Pattern = patterns.Unstructured(),
    prunable: Prunable = tree.prunable,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: rewrite.Progress | None = None,
) -> Pruned:
    """Sets the smallest weights of each matrix to zero and writes the directory again.

    A run that was killed goes on after the last file of weights that it finished, when
    it is started again with the same arguments, and gives the same bytes.

    Args:
      source: the directory.
      out: the new folder, apart from the source.
      sparsity: the share to remove from each matrix, in [0, 1), or {glob on the name
        with "/" for ".": share}. None where the pattern fixes it.
      pattern: `Unstructured`, `PerOutput` or `NM`.
      prunable: name (with "/" for ".") and `TensorInfo` to whether a tensor may be
        pruned. Of those it chooses, floating tensors of two axes are, and of three
        unless they are a convolution's.
      provenance: what else `jaxprune.json` is to say: "command", "perplexity".
      overwrite: whether an earlier result may be replaced.
      progress: called after every tensor.

    Returns:
      The new folder and its zeros.

    Raises:
      ValueError: no tensor may be pruned, the sparsity or the pattern does not fit,
        weights are not finite, or as for `export.write`.
      TypeError: the pattern is none of the three.
      OSError: the folder could not be written.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> from jaxprune import directory, streaming
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> (folder / "a").mkdir()
      >>> _ = (folder / "a" / "config.json").write_text("{}")
      >>> weights = {"up.weight": np.array([[3.0, -1.0], [2.0, 4.0]], "f4")}
      >>> save_file(weights, folder / "a" / "model.safetensors")
      >>> model = directory.open_directory(folder / "a")
      >>> streaming.prune_directory(model, folder / "b", sparsity=0.5).achieved
      0.5
      >>> directory.open_directory(folder / "b").read("up.weight").tolist()
      [[3.0, 0.0], [0.0, 4.0]]
    """
    if not isinstance(
        pattern, patterns.Unstructured | patterns.PerOutput | patterns.NM
    ):
        raise TypeError(
            f"directories are pruned by Unstructured, PerOutput or NM, got {pattern}; "
            f"load the model and use prune for other patterns"
        )
    chosen = {
        name: info
        for name, info in source.tensors.items()
        if _is_matrix(name, info) and prunable(name.replace(".", "/"), info)
    }
    if not chosen:
        raise ValueError(
            f"'{source.path}' must have a tensor that may be pruned, but has none; "
            f"give another rule for prunable"
        )
    first = {name: _input_first(source.config, info) for name, info in chosen.items()}
    _check_pattern(pattern, chosen, first)
    counts = _counts(pattern, sparsity, chosen)
    replaced = {
        name: functools.partial(
            _pruned, source, name, counts[name], pattern, input_first=first[name]
        )
        for name in chosen
    }
    asked = pattern.sparsity if sparsity is None else sparsity
    told: dict[str, Any] = {"method": "magnitude", "pattern": str(pattern)}
    told["sparsity"] = dict(asked) if isinstance(asked, Mapping) else float(asked or 0)
    paths = rewrite.write(
        source,
        out,
        replaced,
        provenance=told | dict(provenance or {}),
        overwrite=overwrite,
        resume=True,
        progress=progress,
    )
    record = rewrite.read_provenance(paths[-1].parent)
    return Pruned(
        path=paths[-1].parent,
        achieved=record["achieved"],
        tensors={k: (v["zeros"], v["size"]) for k, v in record["tensors"].items()},
        skipped=tuple(name for name in source.tensors if name not in chosen),
    )


def _is_matrix(name: str, info: TensorInfo) -> bool:
    stack = info.ndim == 3 and "conv" not in name.lower()
    return info.dtype in _FLOATS and (info.ndim == 2 or stack)


def _input_first(config: Mapping[str, Any], info: TensorInfo) -> bool:
    text = config.get("text_config") or {}
    types = {config.get("model_type"), text.get("model_type")}
    return bool(types & (_STACKED_INPUT_FIRST if info.ndim == 3 else _INPUT_FIRST))


def _check_pattern(
    pattern: Pattern, chosen: Mapping[str, TensorInfo], first: Mapping[str, bool]
) -> None:
    problems = [
        f"{problem} at '{name}'"
        for name, info in chosen.items()
        if (
            problem := pattern.problem(
                info.shape, Axes() if first[name] else Axes((-1,), (-2,))
            )
        )
    ]
    if problems:
        raise ValueError(
            f"{'; '.join(problems[:6])}; leave such tensors out with "
            f"prunable=jp.tree.excluding('...')"
        )


def _counts(
    pattern: Pattern,
    sparsity: float | Mapping[str, float] | None,
    chosen: Mapping[str, TensorInfo],
) -> dict[str, int]:
    """How many weights each matrix of a tensor loses."""
    if pattern.sparsity is not None:
        if sparsity not in (None, pattern.sparsity):
            raise ValueError(
                f"{pattern} removes exactly {pattern.sparsity:.4g} of each matrix, but "
                f"sparsity={sparsity} was asked for; leave the sparsity out"
            )
        sparsity = pattern.sparsity
    if sparsity is None:
        raise ValueError(f"{pattern} leaves the sparsity free; give sparsity=0.5")
    names = [name.replace(".", "/") for name in chosen]
    sizes = [math.prod(info.shape[-2:]) for info in chosen.values()]
    return dict(zip(chosen, allocation.by_leaf(sparsity, names, sizes), strict=True))


def _pruned(
    source: Directory,
    name: str,
    removed: int,
    pattern: Pattern,
    *,
    input_first: bool,
) -> np.ndarray:
    """A tensor of the directory, pruned; a copy."""
    array = np.array(source.read(name))
    bits = array.view(f"u{array.itemsize}")
    stack = math.prod(array.shape[:-2])
    for matrix in bits.reshape(stack, *array.shape[-2:]):
        if isinstance(pattern, patterns.Unstructured):
            _cut(matrix.reshape(-1), removed)
            continue
        rows = matrix.T if input_first else matrix
        for part, start in _row_chunks(rows):
            magnitude = np.ascontiguousarray(part) & _magnitude(bits)
            if isinstance(pattern, patterns.NM):
                part[_outside(magnitude, pattern.n, pattern.m)] = 0
            else:
                share, rest = divmod(removed, len(rows))
                more = np.arange(start, start + len(part)) < rest
                part[_lowest(magnitude, share + more)] = 0
    return array


def _magnitude(bits: np.ndarray) -> np.unsignedinteger:
    """The bits of a float that are not its sign."""
    return bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)


def _cut(bits: np.ndarray, removed: int) -> None:
    """Sets the lowest magnitudes of a flat array to zero, in place."""
    if not removed:
        return
    threshold, ties = _threshold(bits, removed)
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        magnitude = part & _magnitude(bits)
        tied = np.flatnonzero(magnitude == threshold)
        part[magnitude < threshold] = 0
        part[tied[ties:]] = 0
        ties = max(0, ties - tied.size)


def _threshold(bits: np.ndarray, removed: int) -> tuple[Any, int]:
    """The removed-th lowest magnitude, and how many of its ties stay.

    Found digit by digit, 16 bits at a time, by counting how often each digit occurs
    among the magnitudes that begin with the digits found so far.
    """
    found, below, here = 0, 0, 0
    for shift in range(8 * bits.itemsize - _DIGIT, -1, -_DIGIT):
        histogram = np.zeros(1 << _DIGIT, np.int64)
        for start in range(0, bits.size, _CHUNK):
            part = bits[start : start + _CHUNK] & _magnitude(bits)
            if shift + _DIGIT < 8 * bits.itemsize:
                part = part[part >> (shift + _DIGIT) == found]
            digits = part >> shift & ((1 << _DIGIT) - 1)
            histogram += np.bincount(digits.astype(np.intp), minlength=1 << _DIGIT)
        reached = below + np.cumsum(histogram)
        digit = int(np.searchsorted(reached, removed))
        here = int(histogram[digit])
        below = int(reached[digit]) - here
        found = found << _DIGIT | digit
    return bits.dtype.type(found), below + here - removed


def _lowest(magnitude: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Where the lowest of each row are; the last of those tied."""
    place = np.maximum(removed - 1, 0)[:, None]
    threshold = np.take_along_axis(np.sort(magnitude, axis=1), place, axis=1)
    lower, tied = magnitude < threshold, magnitude == threshold
    needed = (removed - lower.sum(axis=1))[:, None]
    behind = np.cumsum(tied[:, ::-1], axis=1, dtype=np.int32)[:, ::-1]
    return lower | (tied & (behind <= needed))


def _outside(magnitude: np.ndarray, n: int, m: int) -> np.ndarray:
    """Where a weight is not among the n highest of its m; the last of those tied."""
    places = np.ascontiguousarray(magnitude.reshape(-1, m).T)
    lost = np.empty(places.shape, bool)
    for i, own in enumerate(places):
        ahead = np.zeros(own.shape, np.int32)
        for j, other in enumerate(places):
            if i != j:
                ahead += (other >= own) if j < i else (other > own)
        lost[i] = ahead >= n
    return lost.T.reshape(magnitude.shape)


def _row_chunks(rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Views of some rows, and where they begin."""
    step = max(1, _CHUNK // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        yield rows[start : start + step], start
