"""Inputs of a model as arrays by name, and which of them calibrate or measure.

The first axis of each array is that of the samples. Samples are told apart by a seed;
those that calibrate never measure, unless other files are evaluated.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.lm.measure.perplexity import Windows

HELD_OUT = 10
"""One in so many samples is held out from calibration."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Inputs of a model.

    Attributes:
      arrays: {argument: array}, (samples, ...) each.
    """

    arrays: Mapping[str, np.ndarray]

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(next(iter(self.arrays.values())))

    def take(self, rows: Any) -> "Samples":
        """Some of the samples, by a slice or by their numbers."""
        return Samples({name: array[rows] for name, array in self.arrays.items()})

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """The samples, so many at a time; the last batch may have fewer."""
        for start in range(0, self.count, size):
            yield dict(self.take(slice(start, start + size)).arrays)


class Measured(NamedTuple):
    """What a model is measured on.

    Attributes:
      samples: inputs of the model.
      role: what they are to the calibration.
      targets: tokens to predict, (samples, length), -1 where none counts; None for
        models that are compared with the dense one.
      windows: the same as the windows of a perplexity, or None.
    """

    samples: Samples
    role: str
    targets: np.ndarray | None = None
    windows: Windows | None = None


class JobInputs(NamedTuple):
    """All that a job reads of inputs.

    Attributes:
      calibration: samples that are calibrated on, or None.
      measured: name of what is evaluated to its samples.
      files: what jaxprune.json says of the files: "name", "sha256", "sequences".
      length: tokens of a sequence; None where samples are no texts.
      special: what sequences of tokens begin and end with, in words.
    """

    calibration: Samples | None
    measured: Mapping[str, Measured]
    files: Sequence[dict[str, Any]]
    length: int | None
    special: str


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Samples of several files, which must have the same arguments and shapes.

    Args:
      parts: samples of each file.

    Returns:
      All of them, one file after the other.

    Raises:
      ValueError: arguments or shapes differ.
    """
    forms = [{n: array.shape[1:] for n, array in part.arrays.items()} for part in parts]
    if any(form != forms[0] for form in forms):
        raise ValueError(
            "files of inputs must have the same arguments and shapes, but they have "
            f"{forms}; give one of them"
        )
    return Samples(
        {
            name: np.concatenate([part.arrays[name] for part in parts])
            for name in parts[0].arrays
        }
    )


def divide_samples(
    samples: Samples, *, sequences: int, batch: int, seed: int, held_out: int
) -> tuple[Samples, Samples | None]:
    """Samples that calibrate, and samples that measure.

    Args:
      samples: all that there are.
      sequences: greatest number that calibrate.
      batch: number of samples of a batch; calibrated is on whole batches.
      seed: rng seed that decides which.
      held_out: greatest number that is held out; 0 holds out none.

    Returns:
      Both.

    Raises:
      ValueError: there is not a batch of them.
    """
    # (samples,)
    order = np.random.default_rng(seed).permutation(samples.count)
    held = min(held_out, max(1, samples.count // HELD_OUT)) if held_out else 0
    available = samples.count - held
    # Batches have one shape, so that one program serves all.
    count = min(sequences, available) // batch * batch
    if not count:
        raise ValueError(
            f"calibration needs a batch of {batch} samples beside {held} that are held "
            f"out, but there are {samples.count}; give more, or a smaller --batch"
        )
    # In their own order, so that a text's or a folder's is kept.
    calibration = samples.take(np.sort(order[held : held + count]))
    return calibration, samples.take(np.sort(order[:held])) if held else None


def digest_files(paths: Sequence[Path]) -> str:
    """The SHA-256 of files, one behind the other.

    Args:
      paths: the files, in order.

    Returns:
      Hexadecimal digits.
    """
    sink = hashlib.sha256()
    # Of a folder the files in the order in which they are samples.
    for path in paths:
        sink.update(path.read_bytes())
    return sink.hexdigest()


def as_tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A batch of samples as what a torch module is called with.

    Args:
      batch: {argument: array}.

    Returns:
      {argument: tensor}; integers have 64 bits, as torch's embeddings take them.
    """
    # It imports torch, which reading the other names here does not need.
    from jaxprune.torch.conversion import as_tensor

    return {
        name: as_tensor(
            array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else array
        )
        for name, array in batch.items()
    }
