"""A model in a directory or a compact file, and texts that show what it is for.

A model is a directory, as `transformers` reads it, so models larger than memory go
through every step leaf by leaf, and steps chain in any order.
"""

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.files import atomic
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.settings import Dtype, Loading

PathLike = str | Path


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in a directory or a compact file, and how it is read.

    Attributes:
      path: path of the directory or the file.
      loading: how it is read.
      progress: whether steps show bars and notes on stderr.
    """

    path: Path
    loading: Loading = dataclasses.field(default_factory=Loading)
    progress: bool = True
    # A result that nobody gave a place lives as long as its model.
    _place: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def record(self) -> dict[str, Any]:
        """What jaxprune.json says of how it was made; {} for a model as it came."""
        if not (self.path / rewrite.NAME).is_file():
            return {}
        return rewrite.read_provenance(self.path)


class Texts(NamedTuple):
    """Texts that show what a model is for.

    Attributes:
      files: paths of the texts, and "self" for what the model writes.
      options: options of `texts` that were given, by name.
    """

    files: tuple[Path, ...]
    options: dict[str, Any]


def open(
    path: PathLike,
    *,
    dtype: Dtype | None = None,
    bos: bool | None = None,
    ignore_config: Collection[str] = (),
    mesh: str | None = None,
    progress: bool = True,
) -> Model:
    """A model in a directory or a compact file; no weight is read yet.

    Args:
      path: directory of config.json, *.safetensors and tokenizer.json, or a file of
        `jaxprune compact`.
      dtype: dtype of parameters and products; as they are stored if left out.
      bos: whether each sequence of a text begins with the BOS token; as the directory
        says if left out.
      ignore_config: attributes of config.json to read as if they were not there.
      mesh: devices to run on, "data=2,fsdp=4" say.
      progress: whether steps show bars and notes on stderr.

    Returns:
      The model.

    Raises:
      ValueError: it is neither.
    """
    path = Path(path)
    if not path.is_file():
        open_directory(path)  # refuses what is no model
    loading = Loading(
        dtype=dtype,
        bos=None if bos is None else ("yes" if bos else "no"),
        ignore_config=tuple(ignore_config),
        mesh=mesh,
    )
    return Model(path, loading, progress)


def texts(
    *files: PathLike,
    tokens: int | None = None,
    sequences: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    batch: int | None = None,
    evaluate: Collection[PathLike] = (),
) -> Texts:
    """Texts to calibrate on, to train on and to measure by; read by each step.

    Args:
      *files: paths of .txt, .md, .jsonl, .parquet, or .npy of int32 token ids
        (sequences, length); "self" is what the model writes itself. Several are a
        mixture with as many sequences of each.
      tokens: tokens that are taken, in place of `sequences`.
      sequences: sequences that are taken: 64 to prune, 32 to shrink, 256 to recover if
        left out.
      length: tokens of a sequence: 512, to shrink 256, if left out.
      seed: decides which sequences are drawn; 0 if left out.
      batch: sequences that the model sees at once: 4, to recover 1, if left out.
      evaluate: texts to measure by, before and after a step; if left out the last
        tenth of each text, which then is not taken.

    Returns:
      The texts.
    """
    if tokens is not None and sequences is not None:
        raise ValueError(
            f"texts takes tokens or sequences, got {tokens} and {sequences}; give one"
        )
    if tokens is not None:
        length = length or 512
        sequences = max(1, tokens // length)
    options = {"sequences": sequences, "length": length, "seed": seed, "batch": batch}
    given: dict[str, Any] = {n: v for n, v in options.items() if v is not None}
    return Texts(
        tuple(map(Path, files)), given | {"evaluate": tuple(map(Path, evaluate))}
    )


def save(model: Model, out: PathLike, *, overwrite: bool = False) -> Model:
    """Copies a model's directory, with its record and report, to a place of its own.

    Args:
      model: model that is kept.
      out: directory to write.
      overwrite: whether an earlier result there may be replaced.

    Returns:
      The model there.

    Raises:
      ValueError: the place is taken.
    """
    place = atomic.apart(out, model.path)
    atomic.check_free(place, rewrite.why_not_ours if overwrite else None)
    atomic.check_room(place, atomic.bytes_in(model.path))
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model.path, partial)
    if place.exists():
        shutil.rmtree(place)
    partial.rename(place)
    return dataclasses.replace(model, path=place, _place=None)


@contextlib.contextmanager
def console_of(model: Model) -> Iterator[Console]:
    """Where a step speaks: its notes and bars on stderr, its result as a value."""
    console = Console(quiet=True)
    if model.progress:
        yield console
        return
    console.silence()
    with contextlib.redirect_stderr(io.StringIO()):  # bars too
        yield console
