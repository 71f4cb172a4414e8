"""Inputs of a model from .npz and .safetensors: arrays by the names of arguments."""

import zipfile
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxprune.files import safetensors_file
from jaxprune.lm.torch_models.samples import Samples

SUFFIXES = (".npz", ".safetensors")
_DAMAGED = (zipfile.BadZipFile, zlib.error)


def read_arrays(path: Path) -> Samples:
    """The inputs that a file holds.

    Args:
      path: path of .npz, as `numpy.savez` writes it, or of .safetensors; the names of
        its arrays are those of the model's arguments, and the first axis of each is
        that of the samples.

    Returns:
      The samples.

    Raises:
      ValueError: the file is not what its name says, or its arrays have other numbers
        of samples.
      OSError: it cannot be read.
    """
    if path.suffix == ".npz":
        arrays = _read_npz(path)
    else:  # views of the file: nothing is read until a batch is made
        infos, _ = safetensors_file.read_header(path)
        arrays = {n: safetensors_file.view(path, info) for n, info in infos.items()}
    counts = {name: np.shape(array)[:1] for name, array in arrays.items()}
    # () is of a number alone
    if len({*counts.values()}) != 1 or min(counts.values()) <= (0,):
        raise ValueError(
            "arrays of inputs must have as many samples each along their first axis, "
            f"but '{path}' has {counts}; give one array for each argument of the model"
        )
    if nonfinite := [name for name, array in arrays.items() if _has_nonfinite(array)]:
        raise ValueError(
            f"inputs must be finite, but '{path}' has NaN or infinity in {nonfinite}"
        )
    return Samples(arrays)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # Objects would be unpickled, which can run code.
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    # A .npy under this name has no names, and a cut one no directory.
    except (*_DAMAGED, ValueError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(
            f"'{path}' must be an archive that numpy.savez wrote, of numbers alone "
            f"({error})"
        ) from None


def _has_nonfinite(array: np.ndarray) -> bool:
    floating = jnp.issubdtype(array.dtype, jnp.floating)  # bfloat16 too
    return bool(floating and not np.isfinite(array).all())
